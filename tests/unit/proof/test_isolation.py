# SPDX-License-Identifier: GPL-2.0-or-later
"""The isolation matrix: of real memory under real keys, and its verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mktme.engine.keys import KeyMode
from mktme.engine.xts import PAGE_BYTES
from mktme.proof.confidentiality import Canary, search_dram
from mktme.proof.isolation import IsolationMatrix, Subject, canary_subject, isolation_matrix
from mktme.service.client import EngineProcess
from mktme.vm.console import VmError
from mktme.vm.platform import Vm

from .fake_vm import launch

CANARY = Canary.random()


@pytest.fixture(scope="module")
def vms(engine: EngineProcess, write_tracking: None) -> Iterator[dict[str, Vm]]:
    """Three VMs with the same page, each a process of its own; the third is not encrypted."""
    modes = {"alice": KeyMode.RANDOM, "bob": KeyMode.RANDOM, "clear": KeyMode.NO_ENCRYPT}
    with ExitStack() as stack:
        yield {
            name: launch(engine.client, stack, name, CANARY.page, mode=mode)
            for name, mode in modes.items()
        }


def matrix_of(vms: Iterable[Vm], *further: Subject, canary: Canary = CANARY) -> IsolationMatrix:
    subjects = [canary_subject(vm, canary) for vm in vms]
    (engine,) = {vm.require_engine() for vm in vms}
    return isolation_matrix(engine, [*subjects, *further])


def test_only_the_diagonal_is_readable(vms: dict[str, Vm]) -> None:
    matrix = matrix_of([vms["alice"], vms["bob"]])
    assert matrix == IsolationMatrix(
        names=("alice", "bob"), keyids=(1, 2), readable=((True, False), (False, True))
    )
    assert matrix.passed


def test_vm_without_encryption_is_isolated_by_no_key(vms: dict[str, Vm]) -> None:
    """Read with the KeyID of another, plaintext is turned into noise; in DRAM it is not."""
    matrix = matrix_of(vms.values())
    assert [row.count(True) for row in matrix.readable] == [1, 1, 1]
    dram = Path(vms["clear"].require_engine().welcome.dram_path)
    for vm in vms.values():
        found = search_dram(vm, CANARY, dram)
        assert found.dram_hits == 4 * 64
        assert found.first_hit == vms["clear"].base + 3 * 4096
        assert not found.passed


def test_keyid_with_the_same_key_reads_it(vms: dict[str, Vm]) -> None:
    """The control: what the matrix calls readable is so by the key and by nothing else."""
    alice = vms["alice"]
    twin = Vm(
        alice.uuid, alice.config, alice.domain, alice.engine, keyid=alice.keyid, base=alice.base
    )
    matrix = matrix_of([alice, twin])
    assert matrix.readable == ((True, True), (True, True))
    assert not matrix.passed


def test_page_shared_with_the_platform_is_keyid_0s_alone(vms: dict[str, Vm]) -> None:
    """The fourth row and column: a page of a VM that was given to KeyID 0."""
    bob, engine = vms["bob"], vms["bob"].require_engine()
    private = canary_subject(bob, CANARY)
    offset = private.address - bob.base
    engine.assign_pages(bob.uuid, offset, PAGE_BYTES, 0)
    try:
        shared = Subject("shared", 0, private.address, CANARY.page)
        matrix = matrix_of([vms["alice"]], shared)
        assert matrix.readable == ((True, False), (False, True))
        # Under bob's own KeyID it is no longer readable.
        assert not matrix_of([vms["alice"]], private).passed
    finally:
        engine.assign_pages(bob.uuid, offset, PAGE_BYTES)
    assert matrix_of([vms["alice"], bob]).passed


def test_canary_that_is_not_there_is_no_isolation(vms: dict[str, Vm]) -> None:
    with pytest.raises(VmError, match="alice does not hold its canary page"):
        matrix_of(vms.values(), canary=Canary.random())


@pytest.mark.parametrize(
    ("readable", "passed"),
    [
        (((True, False), (False, True)), True),
        (((True, False, False), (False, True, False), (False, False, True)), True),
        (((True, True), (False, True)), False),
        (((True, False), (True, True)), False),
        (((False, False), (False, True)), False),
        (((False, True), (True, False)), False),
        (((False, False), (False, False)), False),
        (((True, True), (True, True)), False),
        (((True,),), False),  # nothing to be isolated from
        ((), False),
    ],
)
def test_verdict(readable: tuple[tuple[bool, ...], ...], passed: bool) -> None:
    names = tuple(f"vm{index}" for index in range(len(readable)))
    assert IsolationMatrix(names, tuple(range(len(names))), readable).passed == passed
