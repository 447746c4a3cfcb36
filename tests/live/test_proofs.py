# SPDX-License-Identifier: GPL-2.0-or-later
"""The proofs on live guests, each next to a guest on which it must fail."""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from mktme.engine.sidecar import read_sidecar
from mktme.proof.confidentiality import Canary, search_dram
from mktme.proof.guest_ram import ram_of
from mktme.proof.isolation import canary_subject, isolation_matrix
from mktme.proof.transparency import compare_memory, run_workload
from mktme.pytest_plugin import vm_config
from mktme.vm import images
from mktme.vm.console import VmError
from mktme.vm.guest_map import guest_ram_ranges
from mktme.vm.platform import Platform, Vm

MIB = 1 << 20


@pytest.mark.mktme(track="stores+pages", memory="256M")
def test_both_trackers_are_transparent(mktme_vm: Vm) -> None:
    run_workload(mktme_vm.domain.console)
    with mktme_vm.held() as engine:
        found = compare_memory(mktme_vm, engine)
    assert found.passed, found
    assert found.lines_compared == 256 * MIB // 64
    assert found.lines_nonzero > 100 * MIB // 64  # the kernel and the workload's files at least


@pytest.mark.mktme(track="stores+pages", memory="256M")
def test_dram_follows_a_guest_that_went_on(mktme_vm: Vm) -> None:
    for _ in range(2):
        mktme_vm.domain.console.run("head -c 20000000 /dev/urandom > /tmp/noise", timeout_s=60)
        with mktme_vm.held() as engine:
            assert compare_memory(mktme_vm, engine).passed


@pytest.mark.mktme(track="stores+pages", memory="256M")
def test_a_guest_that_ran_on_after_the_flush_differs(mktme_vm: Vm) -> None:
    """Control of the comparison itself: without the barrier there is something to find."""
    console = mktme_vm.domain.console
    with mktme_vm.held() as engine:
        assert compare_memory(mktme_vm, engine).passed
    console.send("while :; do head -c 8000000 /dev/urandom > /tmp/noise; done")
    engine = mktme_vm.require_engine()
    found = [compare_memory(mktme_vm, engine) for _ in range(5)]
    console.send("\x03")
    console.run("rm /tmp/noise", timeout_s=60)
    assert any(not one.passed for one in found)


@pytest.mark.mktme(track="stores+pages", memory="256M")
def test_both_trackers_count_their_own(mktme_vm: Vm) -> None:
    traffic = mktme_vm.status().traffic
    assert traffic is not None
    assert traffic.lines_stored > traffic.lines_other > 0
    assert traffic.tlb_misses is not None
    assert traffic.tlb_misses > 0


@pytest.mark.mktme(track="stores+pages", memory="256M")
def test_the_kernel_is_the_packages(mktme_vm: Vm) -> None:
    image = mktme_vm.config.image
    assert isinstance(image, images.GuestImage)
    manifest = images.verify(image)
    release = mktme_vm.domain.console.run("uname -r", timeout_s=20).output.strip()
    assert manifest.kernel.name == f"linux-image-{release}"


@pytest.mark.mktme(track="pages", memory="256M")
def test_pages_alone_are_transparent(mktme_vm: Vm) -> None:
    run_workload(mktme_vm.domain.console)
    with mktme_vm.held() as engine:
        found = compare_memory(mktme_vm, engine)
    assert found.passed, found


@pytest.mark.mktme(track="stores", memory="256M")
def test_stores_alone_leave_lines_behind(mktme_vm: Vm) -> None:
    with mktme_vm.held() as engine:
        found = compare_memory(mktme_vm, engine)
    assert found.lines_mismatched > 10_000  # firmware's DMA of the kernel and initramfs alone
    assert found.lines_mismatched == found.line_marked + found.page_marked + found.unmarked
    assert found.page_marked > 0
    assert found.unmarked > 0


@pytest.mark.mktme(algorithm="aes-xts-256", memory="256M")
def test_aes_xts_256_is_transparent(mktme_vm: Vm) -> None:
    with mktme_vm.held() as engine:
        assert compare_memory(mktme_vm, engine).passed


@pytest.mark.mktme(memory="4G")
def test_ram_on_both_sides_of_the_pci_hole(mktme_vm: Vm) -> None:
    """A q35 guest of 4 GiB has half of it above 4 GiB guest-physical."""
    segments = mktme_vm.status().segments
    assert [(one.guest_physical, one.ram_offset) for one in segments] == [
        (0, 0),
        (4 << 30, 2 << 30),
    ]
    ranges = guest_ram_ranges(mktme_vm.domain.monitor("info mtree -f"))
    assert (4 << 30, 6 << 30, 2 << 30) in ranges
    canary = Canary.random()
    canary.plant(mktme_vm.domain.console)
    run_workload(mktme_vm.domain.console)
    with mktme_vm.held() as engine:
        found = compare_memory(mktme_vm, engine)
        assert found.passed, found
        assert found.lines_compared == (4 << 30) // 64
        search = search_dram(mktme_vm, canary, Path(engine.welcome.dram_path))
        assert search.passed, search
        assert search.ram_offset >= 2 << 30  # the canary is in the high half, mapped rightly
    # Stores there were marked there, which takes the right map.
    status = mktme_vm.status()
    marks = engine.line_marks(status.vm, search.ram_offset // 4096, 1)
    assert marks[0] == 0xFFFF_FFFF_FFFF_FFFF


@pytest.mark.mktme(memory="256M", check_tlb=True)
def test_a_wrong_guest_map_is_noticed(mktme_vm: Vm) -> None:
    """Control of the map check: QEMU's own view is not what a wrong plugin says."""
    segments = mktme_vm.status().segments
    mktme_vm.domain.check_guest_map(segments)
    shifted = tuple(msgspec.structs.replace(one, ram_offset=4096) for one in segments)
    with pytest.raises(VmError, match="RAM offset"):
        mktme_vm.domain.check_guest_map(shifted)


@pytest.mark.mktme(memory="256M", check_tlb=True)
def test_the_micro_tlb_is_never_wrong(mktme_vm: Vm) -> None:
    """Each cached translation of a whole boot and workload is the one that QEMU gives."""
    run_workload(mktme_vm.domain.console)
    traffic = mktme_vm.status().traffic
    assert traffic is not None
    assert traffic.tlb_errors == 0
    assert traffic.tlb_checked is not None
    assert traffic.tlb_checked > 10_000_000


@pytest.mark.mktme(vcpus=2, memory="256M")
def test_two_vcpus_fall_back_to_pages(mktme_vm: Vm, mktme_platform: Platform) -> None:
    run_workload(mktme_vm.domain.console)
    with mktme_vm.held() as engine:
        assert compare_memory(mktme_vm, engine).passed
    if mktme_platform.host.qemu_version < (11,):
        assert mktme_vm.config.track is not None
        assert not mktme_vm.config.track.stores


@pytest.mark.nightly
def test_plain_qemu_computes_the_same(mktme_platform: Platform) -> None:
    with mktme_platform.launch(vm_config(memory="256M", track=None)) as plain:
        expected = run_workload(plain.domain.console)
    with mktme_platform.launch(vm_config(memory="256M")) as encrypted:
        assert run_workload(encrypted.domain.console) == expected


@pytest.mark.mktme(memory="256M", encrypt=False)
def test_without_encryption_the_canary_is_in_dram(mktme_vm: Vm) -> None:
    canary = Canary.random()
    canary.plant(mktme_vm.domain.console)
    with mktme_vm.held() as engine:
        assert compare_memory(mktme_vm, engine).passed
        search = search_dram(mktme_vm, canary, Path(engine.welcome.dram_path))
    assert search.dram_hits >= 4096 // 16
    assert not search.passed


@pytest.mark.usefixtures("quick_boots")
def test_three_vms_are_isolated(tmp_path: Path) -> None:
    """The 3 x 3 table; with the same key for all, the same table shows it."""
    config = vm_config(memory="256M")
    key_file = tmp_path / "key"
    key_file.write_bytes(secrets.token_bytes(32))
    key_file.chmod(0o600)
    same = vm_config(memory="256M", key_file=key_file)
    canary = Canary.random()
    with (
        Platform(dram_bytes=5 * 256 * MIB) as platform,
        platform.launch(config, "one") as one,
        platform.launch(same, "two") as two,
        platform.launch(same, "three") as three,
    ):
        vms = (one, two, three)
        for vm in vms:
            canary.plant(vm.domain.console)
        with one.held(), two.held(), three.held():
            subjects = [canary_subject(vm, canary) for vm in vms]
            matrix = isolation_matrix(platform.engine, subjects)
            # Guests two and three have the same key, so their cells are the control.
            assert matrix.readable == (
                (True, False, False),
                (False, True, True),
                (False, True, True),
            )
            assert not matrix.passed
            assert isolation_matrix(platform.engine, subjects[:2]).passed
            assert search_dram(one, canary, platform.dram_path).passed


@pytest.mark.usefixtures("quick_boots")
@pytest.mark.parametrize("algorithm", ["aes-xts-128", "aes-xts-256"])
def test_the_image_is_readable_offline_with_the_key(tmp_path: Path, algorithm: str) -> None:
    """Any AES-XTS library decrypts the image from its sidecar alone; here OpenSSL's own XTS."""
    key = secrets.token_bytes(64 if algorithm == "aes-xts-256" else 32)
    key_file = tmp_path / "key.hex"
    key_file.write_text(key.hex())
    key_file.chmod(0o600)
    dram = tmp_path / "dram.img"
    canary = Canary.random()
    config = vm_config(memory="256M", algorithm=algorithm, key_file=key_file)
    with Platform(dram_bytes=256 * MIB, dram=dram) as platform, platform.launch(config) as vm:
        canary.plant(vm.domain.console)
        with vm.held() as engine:
            sidecar = read_sidecar(engine.write_sidecar())
            ram_offset = search_dram(vm, canary, dram).ram_offset
            with ram_of(vm) as ram:
                expected = ram.read(ram_offset, 4096)
    (described,) = sidecar.vms
    address = described.base + ram_offset
    ciphertext = dram.read_bytes()[address : address + 4096]
    plaintext = b""
    for line in range(0, 4096, sidecar.data_unit_bytes):
        tweak = (address + line).to_bytes(16, "little")
        decryptor = Cipher(algorithms.AES(key), modes.XTS(tweak)).decryptor()
        plaintext += decryptor.update(ciphertext[line : line + sidecar.data_unit_bytes])
    assert plaintext == expected == canary.page
    assert key.hex() not in dram.with_name("dram.img.json").read_text()
