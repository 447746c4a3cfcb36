# SPDX-License-Identifier: GPL-2.0-or-later
"""What the live tests boot in place of a vmlinuz: what that unpacks itself to."""

from __future__ import annotations

import lzma
import struct
from pathlib import Path

import pytest

from mktme.vm.images import GuestImage, Manifest, Package

from ..live.quick_boots import quick_cache, unpacked

KERNEL = b"\x7fELF" + bytes(range(256)) * 64
SETUP_SECTORS = 3


def vmlinuz(payload: bytes) -> bytes:
    """A vmlinuz as Linux makes them: setup sectors, a program, the payload, more of the program."""
    setup = bytearray((SETUP_SECTORS + 1) * 512)
    setup[0x1F1] = SETUP_SECTORS
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, 700, len(payload))
    return bytes(setup) + b"\x90" * 700 + payload + b"\x90" * 99


def xz(kernel: bytes) -> bytes:
    return lzma.compress(kernel) + len(kernel).to_bytes(4, "little")


def test_kernel_is_what_is_behind_the_program() -> None:
    assert unpacked(vmlinuz(xz(KERNEL))) == KERNEL


def test_kernel_that_is_compressed_otherwise_stays_as_it_is() -> None:
    other = vmlinuz(b"\x28\xb5\x2f\xfd" + KERNEL)
    assert unpacked(other) == other


def test_payload_of_another_size_than_it_says_is_noticed() -> None:
    with pytest.raises(AssertionError):
        unpacked(vmlinuz(xz(KERNEL)[:-4] + bytes(4)))


def test_cache_has_all_that_the_users_has_and_this_kernel_unpacked(tmp_path: Path) -> None:
    images = tmp_path / "user" / "mktme" / "images"
    own = images / "tiny-1"
    own.mkdir(parents=True)
    for path in (own / "initrd", images / "debian", images.parent / "qemu11", images / ".lock"):
        path.write_bytes(path.name.encode())
    (tmp_path / "user" / "fonts").mkdir()
    (own / "vmlinuz").write_bytes(vmlinuz(xz(KERNEL)))
    kernel = Package("linux", "1", "", "./boot/vmlinuz", "")
    manifest = Manifest("tiny", "debian", "", kernel, ())
    image = GuestImage("tiny", own / "vmlinuz", own / "initrd", "", manifest)
    home = tmp_path / "quick"
    home.mkdir()
    quick_cache(home, image)
    found = {str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir()}
    assert found == {
        "mktme/images/tiny-1/initrd",
        "mktme/images/tiny-1/vmlinuz",
        "mktme/images/debian",
        "mktme/qemu11",
    }
    assert (home / "fonts").is_symlink()
    assert (home / "mktme/images/tiny-1/vmlinuz").read_bytes() == KERNEL
    assert (home / "mktme/images/tiny-1/initrd").read_bytes() == b"initrd"
