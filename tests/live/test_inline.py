# SPDX-License-Identifier: GPL-2.0-or-later
"""The inline data path under live guests: DRAM is their memory, tampering with it reaches them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mktme.engine.integrity import Violation
from mktme.proof.bench import ENGINE_MEMORY_BASE_BYTES, ENGINE_MEMORY_SHARE
from mktme.proof.confidentiality import Canary, find_canary, search_dram
from mktme.proof.dimms import Dimms
from mktme.proof.eviction import held_out_of_window
from mktme.proof.residency import sampled
from mktme.proof.transparency import compare_memory, run_workload
from mktme.pytest_plugin import vm_config
from mktme.vm.config import BOOT_TIMEOUT_S
from mktme.vm.console import GuestPanicError
from mktme.vm.platform import Platform

MIB = 1 << 20
MEMORY = 192 * MIB
WINDOW = 24 * MIB  # what the guest and its workload touch is several times that


@pytest.mark.parametrize("track", [None, pytest.param("stores", marks=pytest.mark.nightly)])
def test_a_guest_computes_in_an_eighth_of_its_memory(track: str | None) -> None:
    config = vm_config(memory="192M", datapath="inline", window="24M", track=track)
    canary = Canary.random()
    with Platform(MEMORY) as platform, platform.launch(config, boot=False) as vm:
        with sampled(vm, WINDOW) as bound:
            vm.domain.boot(BOOT_TIMEOUT_S)
            run_workload(vm.domain.console)  # it checks its own sums
            canary.plant(vm.domain.console)
            with vm.held() as engine:
                found = compare_memory(vm, engine)
                assert found.passed, found
                assert 0 < found.lines_compared <= WINDOW // 64
                assert search_dram(vm, canary, platform.dram_path).passed
        assert bound.passed, bound
        assert bound.samples > 1000
        assert bound.peak_bytes > WINDOW // 2
        paging = vm.status().paging
        assert paging is not None
        assert paging.pages_evicted > 4 * WINDOW // 4096
        assert (paging.lines_stored > 0) == (track is not None)


@pytest.mark.nightly
def test_memory_on_both_sides_of_the_pci_hole_takes_the_engine_little() -> None:
    """Of 4 GiB half is above 4 GiB guest-physical; the engine needs 1/32 of it and a constant."""
    config = vm_config(memory="4G", datapath="inline", window="64M")
    canary = Canary.random()
    with Platform(4 << 30) as platform, platform.launch(config) as vm:
        canary.plant(vm.domain.console)
        run_workload(vm.domain.console)
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed
            # The kernel's allocator begins at the top.
            assert find_canary(vm, canary) >= 2 << 30
            search = search_dram(vm, canary, platform.dram_path)
            assert search.passed, search
            memory = engine.status().memory
            assert memory.peak <= ENGINE_MEMORY_BASE_BYTES + (4 << 30) // ENGINE_MEMORY_SHARE


def test_a_guest_without_a_window_breaks_the_bound() -> None:
    """The control of the bound: a shadow guest has all that it touched in memory."""
    with (
        Platform(MEMORY) as platform,
        platform.launch(vm_config(memory="192M"), boot=False) as vm,
        sampled(vm, WINDOW) as bound,
    ):
        vm.domain.boot(BOOT_TIMEOUT_S)
    assert bound.peak_bytes > WINDOW
    assert not bound.passed


@pytest.mark.usefixtures("quick_boots")
def test_a_flipped_bit_is_one_random_block_for_the_guest(emulator: Path | None) -> None:
    config = vm_config(memory="192M", datapath="inline", window="16M")
    canary = Canary.random()
    with Platform(MEMORY, emulator=emulator) as platform, platform.launch(config) as vm:
        console = vm.domain.console
        canary.plant(console)
        before = console.run("od -An -v -tx1 -w16 /run/canary", timeout_s=30).output.splitlines()
        with held_out_of_window(vm, canary) as offset:
            Dimms(platform.dram_path).flip(vm.base + offset + 5 * 64)
        after = console.run("od -An -v -tx1 -w16 /run/canary", timeout_s=30).output.splitlines()
        assert [index for index in range(256) if before[index] != after[index]] == [20]


@pytest.mark.usefixtures("quick_boots")
def test_a_flipped_bit_is_a_machine_check_with_integrity(emulator: Path | None) -> None:
    """An unmodified kernel takes it for what it is, and says so on its console."""
    config = vm_config(
        memory="192M", datapath="inline", window="16M", algorithm="aes-xts-128-integrity"
    )
    canary = Canary.random()
    with Platform(MEMORY, emulator=emulator) as platform, platform.launch(config) as vm:
        canary.plant(vm.domain.console)
        with held_out_of_window(vm, canary) as offset:
            assert platform.engine.read(vm.uuid, offset, 4096) == canary.page
            Dimms(platform.dram_path).flip(vm.base + offset + 5 * 64)
        with pytest.raises(GuestPanicError) as caught:
            vm.domain.console.run("sha256sum /run/canary", timeout_s=15)
        assert "Kernel panic - not syncing: Fatal machine check" in str(caught.value)
        found = platform.poisoned[0]
        assert (found.address, found.keyid, found.lines, found.kind) == (
            vm.base + offset + 5 * 64,
            vm.keyid,
            1 << 5,
            Violation.MISMATCH,
        )
