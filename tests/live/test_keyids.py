# SPDX-License-Identifier: GPL-2.0-or-later
"""KeyIDs of live VMs: several on one platform, pages that change hands, and the next tenant."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.package import PowerEvent
from mktme.engine.xts import PAGE_BYTES
from mktme.proof.confidentiality import Canary, find_canary, search_dram
from mktme.proof.guest_ram import ram_of
from mktme.proof.isolation import Subject, canary_subject, isolation_matrix
from mktme.proof.transparency import compare_memory, run_workload
from mktme.pytest_plugin import vm_config
from mktme.service.client import EngineRefusedError
from mktme.vm.config import VmConfig
from mktme.vm.console import VmError
from mktme.vm.pages import GuestPages, PageUse
from mktme.vm.platform import Platform, Vm

from .conftest import Command

pytestmark = pytest.mark.usefixtures("quick_boots")

MIB = 1 << 20
MEMORY = 192 * MIB
FILL = "head -c 80000000 /dev/zero | tr '\\0' a >/tmp/fill"


@contextmanager
def launched(platform: Platform, configs: dict[str, VmConfig]) -> Iterator[list[Vm]]:
    """VMs that boot side by side."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(stack.enter_context, platform.launch(config, name))
            for name, config in configs.items()
        ]
        yield [job.result() for job in jobs]


def lines(data: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(data, np.uint64).reshape(-1, 8)


def test_three_key_modes_and_a_shared_page(tmp_path: Path) -> None:
    """The 4 x 4 table: three VMs under three kinds of keys, and a page that one of them shares."""
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_bytes(secrets.token_bytes(64))
    canary, shared = Canary.random(), Canary.random()
    configs = {
        "alice": vm_config(memory="192M", algorithm="aes-xts-128"),
        "bob": vm_config(memory="192M", algorithm="aes-xts-256"),
        "carol": vm_config(memory="192M", algorithm="aes-xts-256", key_file=key_file),
    }
    with Platform(3 * MEMORY) as platform, launched(platform, configs) as vms, ExitStack() as holds:
        alice = vms[0]
        shared.plant(alice.domain.console)
        alice.domain.console.run("cp /run/canary /run/shared", timeout_s=20)
        for vm in vms:
            canary.plant(vm.domain.console)
        for vm in vms:
            holds.enter_context(vm.held())
        offset = find_canary(alice, shared)
        alice.assign(GuestPages(offset, PAGE_BYTES, PageUse.SHARED))
        subjects = [canary_subject(vm, canary) for vm in vms]
        subjects.append(Subject("shared", 0, alice.base + offset, shared.page))
        matrix = isolation_matrix(platform.engine, subjects)
        assert len({subject.keyid for subject in subjects}) == 4
        assert matrix.readable == tuple(
            tuple(row == column for column in range(4)) for row in range(4)
        )
        assert matrix.passed
        for vm in vms:
            assert compare_memory(vm, platform.engine).passed
            assert search_dram(vm, canary, platform.dram_path).passed
        assert search_dram(alice, shared, platform.dram_path).passed

        # The control: a KeyID that is given carol's key reads her page, and only hers.
        twin = platform.engine.program_key(
            vms[2].config.mode, vms[2].config.algorithm, key_file=key_file
        )
        twins = [*subjects, Subject("twin", twin, subjects[2].address, canary.page)]
        again = isolation_matrix(platform.engine, twins)
        assert not again.passed
        assert [row[4] for row in again.readable] == [False, False, True, False, True]


def test_pages_are_rekeyed_under_a_guest_that_writes_them() -> None:
    config = vm_config(memory="192M")
    where = GuestPages(48 * MIB, 96 * MIB, PageUse.OTHER_KEY)  # most of what Linux has free
    with Platform(MEMORY) as platform, platform.launch(config) as vm, ThreadPoolExecutor() as pool:
        with ram_of(vm) as ram:
            before = lines(ram.read(where.guest_physical, where.size_bytes))
        working = pool.submit(run_workload, vm.domain.console)
        rounds = written = 0
        while not working.done():
            with ram_of(vm) as ram:
                now = lines(ram.read(where.guest_physical, where.size_bytes))
            written = max(written, int(np.count_nonzero((now != before).any(axis=1))))
            for use in (PageUse.OTHER_KEY, PageUse.SHARED, PageUse.NO_ENCRYPT, PageUse.PRIVATE):
                vm.assign(GuestPages(where.guest_physical, where.size_bytes, use))
            assert vm.status().further_keyids == ()  # what was programmed for it is free again
            rounds += 1
        assert working.result()  # it checks its own sums
        assert rounds >= 2
        assert written > 100_000  # the guest did write to these very pages meanwhile
        vm.assign(where)
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed
            keyids = {one.keyid: one.size_bytes for one in vm.status().pages}
            assert sorted(keyids.values()) == [MEMORY - 144 * MIB, where.size_bytes]
            # The control: under the VM's own KeyID the re-keyed pages are something else.
            with ram_of(vm) as ram:
                memory = lines(ram.read(where.guest_physical, 4 * MIB))
            assert (lines(engine.read(vm.uuid, where.guest_physical, 4 * MIB)) == memory).all()
            other = lines(engine.read(vm.uuid, where.guest_physical, 4 * MIB, vm.keyid))
            nonzero = memory.any(axis=1)
            assert np.count_nonzero(nonzero) > 1000
            assert not (other == memory).all(axis=1)[nonzero].any()


def test_pages_are_given_to_others_at_launch() -> None:
    shared = GuestPages(64 * MIB, 32 * MIB, PageUse.SHARED)
    clear = GuestPages(96 * MIB, 32 * MIB, PageUse.NO_ENCRYPT)
    config = vm_config(memory="192M")
    config = VmConfig(config.image, memory_bytes=MEMORY, pages=(shared, clear))
    with Platform(MEMORY) as platform, platform.launch(config) as vm:
        vm.domain.console.run(FILL, timeout_s=60)
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed
            status = vm.status()
            assert [(one.base - vm.base, one.size_bytes, one.keyid) for one in status.pages] == [
                (0, 64 * MIB, vm.keyid),
                (64 * MIB, 32 * MIB, 0),
                (96 * MIB, 32 * MIB, *status.further_keyids),
                (128 * MIB, 64 * MIB, vm.keyid),
            ]
            with ram_of(vm) as ram, platform.dram_path.open("rb") as dram:
                for pages, same in ((clear, True), (shared, False)):
                    memory = lines(ram.read(pages.guest_physical, pages.size_bytes))
                    stored = lines(
                        os.pread(dram.fileno(), pages.size_bytes, vm.base + pages.guest_physical)
                    )
                    equal = (memory == stored).all(axis=1)[memory.any(axis=1)]
                    assert len(equal) > 10_000
                    assert equal.all() if same else not equal.any()


def test_next_tenant_of_the_same_pages_finds_nothing(tmp_path: Path) -> None:
    """A VM is destroyed: its ciphertext stays, and nobody reads it; then others get its pages."""
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_bytes(secrets.token_bytes(32))
    config = vm_config(memory="192M")
    canary = Canary.random()
    with Platform(MEMORY) as platform:
        engine = platform.engine

        def reads_with_the_first_key() -> bool:
            """The control: that it is the key which is missing, and not the data."""
            twin = engine.program_key(KeyMode.DIRECT, key_file=key_file)
            try:
                return engine.read_dram(page.address, PAGE_BYTES, twin) == canary.page
            finally:
                engine.clear_key(twin)

        with platform.launch(vm_config(memory="192M", key_file=key_file), "first") as first:
            canary.plant(first.domain.console)
            with first.held():
                page = canary_subject(first, canary)
                # The control: while it lives, its own KeyID reads it.
                assert engine.read_dram(page.address, PAGE_BYTES, first.keyid) == canary.page
                with platform.dram_path.open("rb") as dram:
                    ciphertext = os.pread(dram.fileno(), PAGE_BYTES, page.address)
        # It stays in the DIMMs.
        with platform.dram_path.open("rb") as dram:
            assert os.pread(dram.fileno(), PAGE_BYTES, page.address) == ciphertext
        # A KeyID of that number and others, old and new, and the TME key.
        assert engine.program_key(config.mode, keyid=first.keyid) == first.keyid
        for keyid in (*range(64), None):
            assert canary.line not in engine.read_dram(page.address, PAGE_BYTES, keyid)
        engine.clear_key(first.keyid)
        assert reads_with_the_first_key()

        with platform.launch(config, "second") as second:
            # The allocator erased them before it gave them away.
            assert not reads_with_the_first_key()
            assert (second.base, second.keyid) == (first.base, first.keyid)
            second.domain.console.run(FILL, timeout_s=60)
            with second.held():
                assert compare_memory(second, engine).passed
                with pytest.raises(VmError, match="does not hold its canary"):
                    find_canary(second, canary)
                for keyid in (second.keyid, 0):
                    for offset in range(0, MEMORY, 4 * MIB):
                        data = engine.read(second.uuid, offset, 4 * MIB, keyid)
                        assert canary.line not in data


@pytest.mark.parametrize("event", PowerEvent)
def test_power_event_takes_the_guest_and_its_memory(event: PowerEvent) -> None:
    """A shared page outlives standby, when firmware saves the TME key; a guest's own never."""
    config = PlatformConfig(save_key_for_standby=True)
    canary, shared = Canary.random(), Canary.random()
    with Platform(MEMORY, config=config) as platform:
        engine = platform.engine
        with platform.launch(vm_config(memory="192M")) as vm:
            shared.plant(vm.domain.console)
            vm.domain.console.run("cp /run/canary /run/shared", timeout_s=20)
            canary.plant(vm.domain.console)
            with vm.held():
                private = vm.base + find_canary(vm, canary)
                public = vm.base + find_canary(vm, shared)
                vm.assign(GuestPages(public - vm.base, PAGE_BYTES, PageUse.SHARED))
                assert engine.read_dram(public, PAGE_BYTES) == shared.page
                assert engine.read_dram(private, PAGE_BYTES) == canary.page
            pid = vm.status().qemu_pid
            assert pid is not None
            qemu = os.pidfd_open(pid)
            engine.power(event)
            Command.wait_ended(qemu)  # the host went down: so did its guest
            with pytest.raises(EngineRefusedError, match="no VM"):
                engine.flush(vm.uuid)
        kept = event is PowerEvent.STANDBY
        assert (engine.read_dram(public, PAGE_BYTES) == shared.page) is kept
        for keyid in (None, *range(64)):
            assert canary.line not in engine.read_dram(private, PAGE_BYTES, keyid)
        with platform.launch(vm_config(memory="192M")) as vm, vm.held():
            assert compare_memory(vm, engine).passed
