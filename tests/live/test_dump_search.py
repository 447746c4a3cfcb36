# SPDX-License-Identifier: GPL-2.0-or-later
"""A search of a live guest's memory finds its key; one of DRAM does not, unless it is in clear."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from mktme.dump.image import DumpImage
from mktme.dump.patterns import Pattern, Searcher
from mktme.dump.search import SearchReport, search
from mktme.proof.guest_ram import memory_of
from mktme.vm.platform import Vm

from ..unit.dump.key_schedules import linux_context

pytestmark = pytest.mark.usefixtures("quick_boots")

BANNER = r"Linux version \d+\.\d+\.\d+-\S+ \(debian-kernel"


def hold_key(vm: Vm) -> bytes:
    """Have the guest hold what its kernel would for an AES key in use."""
    key = secrets.token_bytes(32)
    context = linux_context(key)
    shell = vm.domain.shell
    for at in range(0, len(context), 128):  # a line of a terminal is not much longer
        digits = "".join(f"\\0{byte:03o}" for byte in context[at : at + 128])
        shell.run(f"printf '%b' '{digits}' >>/run/context", timeout_s=20)
    return key


def searched(path: Path, *, raw: bool) -> SearchReport:
    searcher = Searcher([Pattern.regex(BANNER)], aes_keys=True)
    with DumpImage.open_raw(path) if raw else DumpImage.open(path) as image:
        return search(image, searcher, show_keys=True)


def save_ram(vm: Vm, path: Path) -> None:
    """A held guest's memory as a raw file."""
    with memory_of(vm) as memory, path.open("wb") as file:
        os.truncate(file.fileno(), vm.config.memory_bytes)
        for ram_offset, chunk in memory.chunks():
            if any(chunk):
                os.pwrite(file.fileno(), chunk, ram_offset)


def places(report: SearchReport, key: bytes) -> list[int]:
    return [hit.address for hit in report.hits if hit.key is not None and hit.key.key == key.hex()]


@pytest.mark.mktme(memory="256M")
def test_a_key_is_in_the_guests_memory_and_not_in_dram(mktme_vm: Vm, tmp_path: Path) -> None:
    key = hold_key(mktme_vm)
    with mktme_vm.held() as engine:
        save_ram(mktme_vm, tmp_path / "ram")
        engine.write_sidecar()
        dram = searched(Path(engine.welcome.dram_path), raw=False)
    ram = searched(tmp_path / "ram", raw=True)
    found = places(ram, key)
    assert len(found) >= 2  # the key's schedule for encryption, and for decryption
    assert {found[0] + 240} <= set(found)
    assert any(hit.key is None for hit in ram.hits)  # the banner
    assert dram.hits == ()
    assert dram.searched_bytes > ram.searched_bytes // 4


@pytest.mark.mktme(memory="256M", encrypt=False)
def test_without_encryption_it_is_in_dram(mktme_vm: Vm, tmp_path: Path) -> None:
    """The control; and what the search says of where the guest has it."""
    key = hold_key(mktme_vm)
    with mktme_vm.held() as engine:
        save_ram(mktme_vm, tmp_path / "ram")
        engine.write_sidecar()
        dram = searched(Path(engine.welcome.dram_path), raw=False)
    ram = searched(tmp_path / "ram", raw=True)
    found = places(dram, key)
    assert len(found) >= 2
    assert found == [mktme_vm.base + offset for offset in places(ram, key)]
    assert len(dram.hits) == len(ram.hits)
    for hit in dram.hits:
        assert hit.vm == mktme_vm.name
        assert hit.keyid == mktme_vm.keyid
        assert hit.guest_physical == hit.address - mktme_vm.base  # all RAM is below the PCI hole
