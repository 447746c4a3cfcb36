# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that is not the guest's boot RAM: an NVDIMM, and a DIMM that is plugged in and out.

What an NVDIMM holds at rest is ciphertext; the key restored from its file reads it again, another
one does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from mktme.proof.confidentiality import Canary, search_dram
from mktme.proof.transparency import compare_memory
from mktme.pytest_plugin import vm_config
from mktme.service.client import EngineClient
from mktme.vm.config import Nvdimm
from mktme.vm.console import GuestCommandError, GuestPanicError
from mktme.vm.platform import Platform, Vm

pytestmark = pytest.mark.usefixtures("quick_boots")

MIB: Final = 1 << 20
MEMORY: Final = 256 * MIB
SIZE: Final = 32 * MIB
BLOCK: Final = 16
DIMM: Final = 128 * MIB
BLOCK_OF_LINUX: Final = "/sys/devices/system/memory/memory32"  # at 4 GiB
TIMEOUT_S: Final = 60.0
PLUG_IN: Final = "modprobe -a nfit nd_pmem crc32c_generic ext4 && test -b /dev/pmem0"
MOUNT: Final = "mkdir -p /tmp/pmem && mount -t ext4 /dev/pmem0 /tmp/pmem"
SUMS: Final = "sha256sum /tmp/pmem/canary /tmp/pmem/noise"


@dataclass(frozen=True)
class Bench:
    """An NVDIMM, and guests that have it one after the other."""

    directory: Path
    datapath: str = "shadow"
    algorithm: str = "aes-xts-128"

    @property
    def image(self) -> Path:
        return self.directory / "pmem.img"

    def key(self, name: str) -> Path:
        path = self.directory / name
        if not path.exists():
            path.touch(0o600)
            path.write_bytes(secrets.token_bytes(32))
        return path

    @contextlib.contextmanager
    def guest(self, key: str | None) -> Iterator[tuple[Platform, Vm]]:
        """One under a key by its name, or under none, that has found its NVDIMM."""
        config = vm_config(
            memory=f"{MEMORY >> 20}M",
            datapath=self.datapath,
            algorithm=self.algorithm,
            window="24M" if self.datapath == "inline" else None,
            key_file=None if key is None else self.key(key),
            encrypt=key is not None,
        )
        config = dataclasses.replace(config, nvdimm=Nvdimm(self.image, SIZE))
        with Platform(MEMORY + SIZE) as platform, platform.launch(config) as vm:
            yield platform, vm

    def at_rest(self, canary: Canary) -> int:
        return count(canary, self.image.read_bytes())


def count(canary: Canary, data: bytes) -> int:
    """How many blocks of a canary there are."""
    line = canary.line
    return sum(data.count(line[at : at + BLOCK]) for at in range(0, len(line), BLOCK))


def nvdimm(vm: Vm, engine: EngineClient) -> bytes:
    """What the guest has in it, of a held guest."""
    step = 4 * MIB
    return b"".join(engine.read(vm.uuid, MEMORY + at, step) for at in range(0, SIZE, step))


def fill(vm: Vm, canary: Canary) -> str:
    """Make a file system with the canary and more; returns the checksums of its files."""
    console = vm.domain.console
    console.run(PLUG_IN, TIMEOUT_S)
    console.run(f"mke2fs -b 4096 /dev/pmem0 && {MOUNT}", TIMEOUT_S)
    canary.plant(console)
    console.run("cp /run/canary /tmp/pmem/", TIMEOUT_S)
    console.run("dd if=/dev/urandom of=/tmp/pmem/noise bs=1M count=3", TIMEOUT_S)
    console.run("sync", TIMEOUT_S)
    return console.run(SUMS, TIMEOUT_S).output


@pytest.mark.parametrize("datapath", ["shadow", "inline"])
def test_nvdimm_outlives_its_platform_with_its_key(tmp_path: Path, datapath: str) -> None:
    bench = Bench(tmp_path, datapath)
    canary = Canary.random()
    with bench.guest("first") as (platform, vm):
        sums = fill(vm, canary)
        with vm.held() as engine:
            found = compare_memory(vm, engine)
            assert found.passed, found
            assert search_dram(vm, canary, platform.dram_path).passed
            assert bench.at_rest(canary) == 0
        vm.domain.power_off(TIMEOUT_S)  # with its file system mounted
    assert bench.at_rest(canary) == 0
    assert bench.image.stat().st_blocks * 512 > 3 * MIB  # what is there, is noise

    with bench.guest("first") as (_platform, vm):
        vm.domain.console.run(PLUG_IN, TIMEOUT_S)
        vm.domain.console.run(MOUNT, TIMEOUT_S)
        assert vm.domain.console.run(SUMS, TIMEOUT_S).output == sums
        with vm.held() as engine:
            assert count(canary, nvdimm(vm, engine)) >= 256  # see below
            found = compare_memory(vm, engine)
            assert found.passed, found

    with bench.guest("second") as (_platform, vm):
        console = vm.domain.console
        console.run(PLUG_IN, TIMEOUT_S)
        with pytest.raises(GuestCommandError, match="mounting /dev/pmem0"):
            console.run(MOUNT, TIMEOUT_S)
        console.run("cat /dev/pmem0 >/dev/null", TIMEOUT_S)
        with vm.held() as engine:
            assert count(canary, nvdimm(vm, engine)) == 0


def test_nvdimm_without_encryption_is_plaintext_at_rest(tmp_path: Path) -> None:
    """The control: what is looked for in the image can be found there."""
    bench = Bench(tmp_path)
    canary = Canary.random()
    with bench.guest(None) as (_platform, vm):
        fill(vm, canary)
        vm.domain.power_off(TIMEOUT_S)
    assert bench.at_rest(canary) >= 256


def test_nvdimm_under_another_key_with_integrity_is_poison(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "inline", "aes-xts-128-integrity")
    with bench.guest("first") as (_platform, vm):
        fill(vm, Canary.random())
        vm.domain.power_off(TIMEOUT_S)
    with bench.guest("second") as (platform, vm):
        with pytest.raises(GuestPanicError, match="Fatal machine check"):
            vm.domain.console.run(PLUG_IN, TIMEOUT_S)
        assert {one.ram_offset >= MEMORY for one in platform.poisoned} == {True}


@pytest.mark.parametrize("datapath", ["shadow", "inline"])
def test_dimm_is_followed_from_the_moment_it_is_plugged_in(datapath: str) -> None:
    canary = Canary.random()
    config = vm_config(
        memory="256M", datapath=datapath, window="24M" if datapath == "inline" else None
    )
    config = dataclasses.replace(config, dimms=(DIMM,))
    with Platform(MEMORY + DIMM) as platform, platform.launch(config) as vm:
        console = vm.domain.console

        def dimm() -> bytes:
            """All that it holds."""
            with vm.held() as engine:
                offsets = range(MEMORY, MEMORY + DIMM, 4 * MIB)
                return b"".join(engine.read(vm.uuid, at, 4 * MIB) for at in offsets)

        def total() -> int:
            return int(console.run("awk '/MemTotal/ { print $2 }' /proc/meminfo", 30).output) << 10

        # So that it can be given back; and Linux takes pages of files from there first.
        console.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks", 30)
        canary.plant(console)
        before = total()
        vm.plug_in(0)
        console.run(f"until test -d {BLOCK_OF_LINUX}; do usleep 50000; done", TIMEOUT_S)
        assert total() == before + DIMM
        console.run("for i in $(seq 64); do cat /run/canary; done >/tmp/some", TIMEOUT_S)
        console.run("for i in $(seq 32); do cat /tmp/some; done >/tmp/many", TIMEOUT_S)
        with vm.held() as engine:
            found = compare_memory(vm, engine)
            assert found.passed, found
            assert search_dram(vm, canary, platform.dram_path).passed
        assert count(canary, dimm()) > 1024
        whole = hashlib.sha256(canary.page * 2048).hexdigest()
        assert whole in console.run("sha256sum /tmp/many", TIMEOUT_S).output
        console.run("rm /tmp/some /tmp/many", 30)
        vm.unplug(0, TIMEOUT_S)
        assert total() == before
        assert not any(dimm())  # the next to have it finds nothing
        vm.plug_in(0)
        console.run(f"until test -d {BLOCK_OF_LINUX}; do usleep 50000; done", TIMEOUT_S)
        assert total() == before + DIMM
