# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that a guest finds: chipset, firmware and devices."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final


class Machine(enum.Enum):
    """QEMU's two PC machines; the value is libvirt's name.

    Attributes:
        Q35: Intel Q35, PCI Express.
        PC: Intel i440FX, PCI.
    """

    Q35 = "q35"
    PC = "pc"


class Firmware(enum.Enum):
    """What boots a disk.

    Attributes:
        BIOS: SeaBIOS.
        UEFI: OVMF, of Debian's package, without secure boot.
    """

    BIOS = "bios"
    UEFI = "uefi"


@dataclass(frozen=True, slots=True)
class Hardware:
    """A guest's hardware, beside its memory and vCPUs.

    Attributes:
        machine: the chipset.
        firmware: what boots it, if that is from its disk.
        devices: libvirt's XML for further devices, an element of ``<devices>`` each.
        arguments: further options of QEMU's, for what libvirt has no XML for.
        vtpm: whether it has a TPM 2.0, which UEFI measures the boot with.
    """

    machine: Machine = Machine.Q35
    firmware: Firmware = Firmware.BIOS
    devices: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    vtpm: bool = False


USUAL_HARDWARE: Final = Hardware()
