# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest `tiny` with its kernel unpacked: most of a boot under TCG is the kernel unpacking itself.

A kernel package's vmlinuz is a small program with the kernel behind it, compressed. QEMU boots what
is behind it as well, by its PVH entry point: the same kernel, byte for byte, without that program
and what that does beside (KASLR). So it is for tests in which guests boot for something else. What
firmware and a packaged kernel do at boot is for the tests of proofs and of features, and for others
that do without this.
"""

from __future__ import annotations

import lzma
import struct
from pathlib import Path
from typing import Final

from mktme.vm.images import GuestImage

# Linux, Documentation/arch/x86/boot.rst: setup_sects; payload_offset and payload_length, from the
# end of the setup sectors.
_SETUP_SECTORS: Final = 0x1F1
_PAYLOAD: Final = struct.Struct("<II")
_PAYLOAD_AT: Final = 0x248
_SECTOR_BYTES: Final = 512
_TRAILER_BYTES: Final = 4  # the unpacked size, behind the compressed data
_XZ_MAGIC: Final = b"\xfd7zXZ\0"


def unpacked(vmlinuz: bytes) -> bytes:
    """The kernel, an ELF file, out of a vmlinuz; all of it, unless that is compressed by xz."""
    offset, length = _PAYLOAD.unpack_from(vmlinuz, _PAYLOAD_AT)
    start = (vmlinuz[_SETUP_SECTORS] + 1) * _SECTOR_BYTES + offset
    payload = vmlinuz[start : start + length]
    if not payload.startswith(_XZ_MAGIC):
        return vmlinuz
    kernel = lzma.decompress(payload[:-_TRAILER_BYTES])
    assert len(kernel) == int.from_bytes(payload[-_TRAILER_BYTES:], "little")
    return kernel


def quick_cache(home: Path, image: GuestImage) -> None:
    """Fill a cache home (XDG) with all that this user's has, and `image` with its kernel unpacked.

    Args:
        home: an empty directory.
        image: of the user's cache.
    """
    own = image.kernel.parent
    above = own.parents[:3]  # images, mktme, and the home
    for directory in reversed(above):
        twin = home / directory.relative_to(above[-1])
        twin.mkdir(exist_ok=True)
        for path in directory.iterdir():
            if path not in (own, *above) and not path.name.startswith("."):
                (twin / path.name).symlink_to(path)
    twin = home / own.relative_to(above[-1])
    twin.mkdir()
    for path in own.iterdir():
        if path != image.kernel:
            (twin / path.name).symlink_to(path)
    (twin / image.kernel.name).write_bytes(unpacked(image.kernel.read_bytes()))
