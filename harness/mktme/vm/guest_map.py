# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a guest's memory is: its RAM around the PCI hole, and memory devices behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mktme.vm.hardware import Machine

_GIB: Final = 1 << 30
_FOUR_GIB: Final = 4 << 30
DIMM_STEP_BYTES: Final = 128 << 20
"""Linux takes memory that is plugged in by so much (MIN_MEMORY_BLOCK_SIZE)."""
# From how much RAM on there is some above the PCI hole, and how much is then below (QEMU
# hw/i386/pc_q35.c and pc_piix.c).
_PCI_HOLE: Final = {
    Machine.Q35: (0xB000_0000, 0x8000_0000),
    Machine.PC: (0xE000_0000, 0xC000_0000),
}
# "info mtree -f" prints the flat view of an address space, one range a line.
_MTREE_RAM: Final = re.compile(
    r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:nv-)?ram\): (\S+)(?: @([0-9a-f]{16}))?",
    re.M,
)


def ram_below_4g(memory_bytes: int, machine: Machine = Machine.Q35) -> int:
    """How much of a machine's RAM lies below the PCI hole.

    Checked against QEMU's own map for each VM that is launched: `Domain.check_guest_map`.
    """
    hole_from, beside_hole = _PCI_HOLE[machine]
    return beside_hole if memory_bytes >= hole_from else memory_bytes


def guest_physical(ram_offset: int, memory_bytes: int, machine: Machine = Machine.Q35) -> int:
    """The guest-physical address of an offset in a machine's RAM."""
    low = ram_below_4g(memory_bytes, machine)
    return ram_offset if ram_offset < low else ram_offset - low + _FOUR_GIB


@dataclass(frozen=True, slots=True)
class Module:
    """Memory of a guest beside its RAM: an NVDIMM, or a DIMM that can be plugged in.

    Attributes:
        name: of its memory inside QEMU.
        ram_offset: what comes before it.
        guest_physical: where it is, or would be.
    """

    name: str
    ram_offset: int
    guest_physical: int
    size_bytes: int


def modules_of(
    memory_bytes: int,
    nvdimm_bytes: int,
    dimms: tuple[int, ...],
    machine: Machine = Machine.Q35,
) -> list[Module]:
    """A machine's NVDIMM, if it has any, and its DIMMs, one behind the other.

    QEMU's memory devices begin at a GiB behind all RAM (hw/i386/pc.c, pc_memory_init), with room
    for each to be aligned to one. Linux takes DIMMs in blocks of 128 MiB.
    """
    named = [("nvdimm0", nvdimm_bytes)] if nvdimm_bytes else []
    named += [(f"dimm{index}", size_bytes) for index, size_bytes in enumerate(dimms)]
    address = _FOUR_GIB + memory_bytes - ram_below_4g(memory_bytes, machine)
    modules: list[Module] = []
    offset = memory_bytes
    for name, size_bytes in named:
        alignment = DIMM_STEP_BYTES if modules else _GIB
        address = -(-address // alignment) * alignment
        modules.append(Module(name, offset, address, size_bytes))
        address += size_bytes
        offset += size_bytes
    return modules


def guest_ram_ranges(mtree: str, modules: Iterable[Module] = ()) -> list[tuple[int, int, int]]:
    """Guest RAM in QEMU's ``info mtree -f``: (first address, address after it, RAM offset)."""
    views = mtree.split("FlatView #")
    system = next((view for view in views if 'AS "memory"' in view), "")
    offsets = {"pc.ram": 0} | {one.name: one.ram_offset for one in modules}
    return [
        (int(start, 16), int(last, 16) + 1, offsets[name] + int(offset or "0", 16))
        for start, last, name, offset in _MTREE_RAM.findall(system)
        if name in offsets
    ]
