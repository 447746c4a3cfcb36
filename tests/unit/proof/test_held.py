# SPDX-License-Identifier: GPL-2.0-or-later
"""What is found of a held guest, and whether a key of this host's reads what another's DRAM has."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mktme.engine.keys import KeyMode
from mktme.engine.xts import PAGE_BYTES, Algorithm
from mktme.proof import moving
from mktme.proof.confidentiality import Canary
from mktme.proof.held import HeldProof, prove_held
from mktme.proof.runs import throw_away_key
from mktme.service.client import EngineClient, EngineProcess
from mktme.vm.config import VmConfig
from mktme.vm.console import VmError
from mktme.vm.domain import Domain
from mktme.vm.platform import Platform, Vm

from ..remote.test_wire import PROOF
from ..vm.test_domain_xml import IMAGE
from .fake_vm import launch

CANARY = Canary.random()
BLOCKS = PAGE_BYTES // 16


def platform_of(engine: EngineClient) -> Platform:
    dram = Path(engine.welcome.dram_path)
    found = SimpleNamespace(engine=engine, dram_path=dram, check=lambda _vm: None)
    return cast("Platform", found)


@pytest.fixture(scope="module")
def vms(engine: EngineProcess, write_tracking: None) -> Iterator[dict[str, Vm]]:
    """Two VMs with the same page; the second is not encrypted."""
    with ExitStack() as stack:
        yield {
            name: dataclasses.replace(
                launch(engine.client, stack, name, CANARY.page, mode=mode),
                domain=cast("Domain", SimpleNamespace(label=name, paused=contextlib.nullcontext)),
            )
            for name, mode in (("alice", KeyMode.RANDOM), ("clear", KeyMode.NO_ENCRYPT))
        }


def test_ciphertext_is_that_of_the_canary(vms: dict[str, Vm], engine: EngineProcess) -> None:
    client, alice = engine.client, vms["alice"]
    found = prove_held(platform_of(client), alice, CANARY)
    assert found.comparison.passed
    assert found.address == alice.base + found.search.ram_offset
    # All of its blocks differ, and the search found those of its first line.
    assert len({found.ciphertext[at : at + 16] for at in range(0, PAGE_BYTES, 16)}) == BLOCKS
    assert found.ciphertext_hits == 4
    plain = client.decrypt(alice.keyid, found.address, found.ciphertext)
    assert plain.data == CANARY.page


def test_without_encryption_it_is_the_canary(vms: dict[str, Vm], engine: EngineProcess) -> None:
    found = prove_held(platform_of(engine.client), vms["clear"], CANARY)
    assert found.ciphertext == CANARY.page
    assert found.search.dram_hits == BLOCKS
    assert found.ciphertext_hits == BLOCKS
    assert not found.search.passed


def test_guest_without_a_canary_proves_nothing(vms: dict[str, Vm], engine: EngineProcess) -> None:
    with pytest.raises(VmError, match="alice does not hold its canary"):
        prove_held(platform_of(engine.client), vms["alice"], Canary.random())


@pytest.mark.parametrize("algorithm", [Algorithm.AES_XTS_128, Algorithm.AES_XTS_256])
def test_key_reads_what_was_written_with_it_alone(
    algorithm: Algorithm, engine: EngineProcess, tmp_path: Path
) -> None:
    client = engine.client
    platform = platform_of(client)
    key_file = throw_away_key(tmp_path / "key", VmConfig(IMAGE, algorithm=algorithm))
    config = VmConfig(IMAGE, algorithm=algorithm, mode=KeyMode.DIRECT, key_file=key_file)

    def written(keyid: int) -> HeldProof:
        """A canary page in DRAM under some key, whose KeyID is free again."""
        address = client.status().dram_bytes - PAGE_BYTES
        client.write_dram(address, CANARY.page, keyid)
        with platform.dram_path.open("rb") as dram:
            ciphertext = os.pread(dram.fileno(), PAGE_BYTES, address)
        client.clear_key(keyid)
        return dataclasses.replace(PROOF, address=address, ciphertext=ciphertext)

    before = client.status().keys
    own = written(client.program_key(KeyMode.DIRECT, algorithm, key_file=key_file))
    other = written(client.program_key(KeyMode.RANDOM, algorithm))
    assert moving._readable(platform, config, own, CANARY) == BLOCKS
    assert moving._readable(platform, config, other, CANARY) == 0
    elsewhere = dataclasses.replace(own, address=own.address - PAGE_BYTES)
    assert moving._readable(platform, config, elsewhere, CANARY) == 0
    assert client.status().keys == before
