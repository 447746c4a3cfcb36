# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk that boots by BIOS and by UEFI: an MBR, GRUB for both, and one configuration.

::

    sector 0        boot.img of GRUB, with the partition table in it
    sector 1        core.img of GRUB for BIOS, in the gap before the first partition
    1 MiB           EFI system partition (FAT): /EFI/BOOT/BOOTX64.EFI, GRUB for UEFI
    33 MiB          root file system (ext4): /boot/grub/grub.cfg, kernel and initramfs

Both GRUBs have built in all that they need. They find the root file system by its UUID and read the
configuration there. Source: UEFI specification 2.10, 5.2.1 (legacy MBR) and 3.5.1 (removable
media), and GRUB's grub-core/boot/i386/pc/boot.S and diskboot.S.
"""

from __future__ import annotations

import struct
from pathlib import Path
from uuid import UUID

from mktme.vm.image_cache import ImageError, run_tool

SECTOR_BYTES = 512
ESP_OFFSET_BYTES = 1 << 20
ROOT_OFFSET_BYTES = 33 << 20

_GRUB_DIR = Path("/usr/lib/grub")
_MODULES = ("part_msdos", "ext2", "search_fs_uuid", "normal", "serial", "terminal", "linux")

_PARTITION_TABLE = 446
_BOOT_SIGNATURE = b"\x55\xaa"
_ACTIVE = 0x80
_TYPE_ESP, _TYPE_LINUX = 0xEF, 0x83
# Cylinder, head and sector of what is beyond CHS: firmware that matters reads the LBA instead.
_BEYOND_CHS = b"\xfe\xff\xff"


def grub_config(cmdline: str, root: UUID) -> str:
    """grub.cfg: no menu and no delay; GRUB speaks on the serial line only.

    For `$efi` see `make_bootable`.
    """
    return f"""\
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
linux$efi /vmlinuz root=UUID={root} ro {cmdline}
initrd$efi /initrd.img
boot
"""


def make_bootable(disk: Path, root: UUID, work: Path) -> None:
    """Write everything but the root file system onto a disk.

    Args:
        disk: a raw image that has its full size.
        root: the UUID of the root file system at `ROOT_OFFSET_BYTES`.
        work: a directory for what is built on the way.

    Raises:
        ImageError: GRUB or a tool is missing, or fails.
    """
    early = work / "grub-early.cfg"
    find_root = f"search.fs_uuid {root} root\nset prefix=($root)/boot/grub\n"
    early.write_text(find_root)
    core, efi = work / "core.img", work / "bootx64.efi"
    _grub_image("i386-pc", core, early, "biosdisk")
    # `tpm` measures what GRUB reads and does, if there is a TPM. Up to 2.06, Debian's GRUB starts
    # a kernel by its EFI stub, which passes on the log of that, as `linuxefi`; later ones always.
    modules = ["tpm"]
    if (_GRUB_DIR / "x86_64-efi" / "linuxefi.mod").exists():
        early.write_text(f"{find_root}set efi=efi\nexport efi\n")
        modules.append("linuxefi")
    _grub_image("x86_64-efi", efi, early, *modules)
    boot = _read(_GRUB_DIR / "i386-pc" / "boot.img")
    core_data = core.read_bytes()
    if SECTOR_BYTES + len(core_data) > ESP_OFFSET_BYTES:
        raise ImageError(f"GRUB for BIOS has {len(core_data)} bytes, too many for its gap")
    with disk.open("r+b") as file:
        file.write(boot[:_PARTITION_TABLE] + partition_table(disk.stat().st_size))
        file.write(core_data)
    # In the work directory, as mkfs.vfat would take all of the disk for its own.
    esp = work / "esp"
    esp_kib = (ROOT_OFFSET_BYTES - ESP_OFFSET_BYTES) >> 10
    make_fat(esp, "EFI", esp_kib, {"EFI/BOOT/BOOTX64.EFI": efi.read_bytes()})
    with disk.open("r+b") as file:
        file.seek(ESP_OFFSET_BYTES)
        file.write(esp.read_bytes())


def partition_table(disk_bytes: int) -> bytes:
    """The end of an MBR from byte 446 on: an EFI system partition, and root in all of the rest."""
    partitions = (
        (0, _TYPE_ESP, ESP_OFFSET_BYTES, ROOT_OFFSET_BYTES),
        (_ACTIVE, _TYPE_LINUX, ROOT_OFFSET_BYTES, disk_bytes),
    )
    table = b"".join(
        struct.pack(
            "<B3sB3sII",
            status,
            _BEYOND_CHS,
            kind,
            _BEYOND_CHS,
            start_bytes // SECTOR_BYTES,
            (end_bytes - start_bytes) // SECTOR_BYTES,
        )
        for status, kind, start_bytes, end_bytes in partitions
    )
    return table.ljust(64, b"\0") + _BOOT_SIGNATURE


def is_bootable(head: bytes) -> bool:
    """Whether the first two sectors of a disk have an MBR's or a GPT's signature."""
    return head[510:512] == _BOOT_SIGNATURE or head[512:520] == b"EFI PART"


def make_fat(path: Path, label: str, size_kib: int, files: dict[str, bytes]) -> None:
    """Make a FAT file system in a new file.

    Args:
        path: the file, which must not be there.
        label: the volume's label.
        size_kib: of the file system, in KiB.
        files: path in it to content.

    Raises:
        ImageError: dosfstools or mtools are missing, or fail.
    """
    run_tool("mkfs.vfat", "-C", "-n", label, str(path), str(size_kib))
    for directory in sorted({str(up) for file in files for up in Path(file).parents} - {"."}):
        run_tool("mmd", "-i", str(path), f"::{directory}")
    for file, content in files.items():
        run_tool("mcopy", "-i", str(path), "-", f"::{file}", stdin=content)


def _grub_image(platform: str, output: Path, early: Path, *modules: str) -> None:
    directory = _GRUB_DIR / platform
    _read(directory / "moddep.lst")
    command = ("grub-mkimage", "-O", platform, "-d", str(directory), "-p", "/boot/grub")
    run_tool(*command, "-c", str(early), "-o", str(output), *_MODULES, *modules)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"GRUB cannot be read: {path}: {error.strerror}",
            hint="install grub-pc-bin and grub-efi-amd64-bin (`make setup` does)",
        ) from error
