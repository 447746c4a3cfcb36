# SPDX-License-Identifier: GPL-2.0-or-later
"""Ranges of a guest's pages that are under another KeyID than the guest's own."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from mktme.engine.keys import KeyMode
from mktme.engine.xts import PAGE_BYTES, Algorithm
from mktme.service.client import EngineClient
from mktme.vm.guest_map import ram_below_4g
from mktme.vm.hardware import Machine
from mktme.vm.host import UsageError
from mktme.vm.sizes import parse_size

_HIGH_RAM: Final = 4 << 30  # where q35 puts what does not fit below the PCI hole
_RANGE: Final = re.compile(r"(?P<size>[^@=]+)@(?P<base>[^@=]+)=(?P<use>[^@=]+)")


class PageUse(enum.Enum):
    """What a range of pages is under; the value is the word that users write."""

    PRIVATE = "private"
    """The VM's own KeyID: what every page is under that is not given another."""
    SHARED = "shared"
    """KeyID 0: the platform, and whoever it lets, reads them (336907, I/O interactions)."""
    NO_ENCRYPT = "no-encrypt"
    """A KeyID of mode NO_ENCRYPT: plaintext in DRAM."""
    OTHER_KEY = "other-key"
    """A KeyID with a random key, beside the VM's own."""

    @property
    def has_own_keyid(self) -> bool:
        """Whether a range of pages for it takes a further KeyID."""
        return self in (PageUse.NO_ENCRYPT, PageUse.OTHER_KEY)


_HINT: Final = "write it as SIZE@ADDRESS=USE, such as 16M@64M=shared; uses: " + ", ".join(
    use.value for use in PageUse
)


@dataclass(frozen=True, slots=True)
class GuestPages:
    """A range of a guest's pages.

    Attributes:
        guest_physical: address of the first byte, page-aligned.
        size_bytes: whole pages.
        use: what they are to be under.
    """

    guest_physical: int
    size_bytes: int
    use: PageUse

    def ram_offset(self, memory_bytes: int, machine: Machine = Machine.Q35) -> int:
        """Where the range is in the RAM of a guest of that size.

        Raises:
            UsageError: it is not whole pages, or not all RAM.
        """
        base, size = self.guest_physical, self.size_bytes
        if size <= 0 or base % PAGE_BYTES or size % PAGE_BYTES:
            raise UsageError(
                f"{self}: KeyIDs are for whole pages of {PAGE_BYTES} bytes",
                hint="give multiples of 4K",
            )
        low = ram_below_4g(memory_bytes, machine)
        if base >= 0 and base + size <= low:
            return base
        if base >= _HIGH_RAM and base + size <= _HIGH_RAM + memory_bytes - low:
            return base - _HIGH_RAM + low
        hint = f"RAM is 0 to {_size(low)}"
        if low < memory_bytes:
            hint += f" and {_size(_HIGH_RAM)} to {_size(_HIGH_RAM + memory_bytes - low)}"
        raise UsageError(f"{self}: not all RAM", hint=hint)

    def __str__(self) -> str:
        return f"{_size(self.size_bytes)}@{_size(self.guest_physical)}={self.use.value}"


def parse_pages(text: str) -> GuestPages:
    """A range as people write it: SIZE@ADDRESS=USE, such as 16M@64M=shared.

    Raises:
        UsageError: it is none.
    """
    uses = {use.value: use for use in PageUse}
    match = _RANGE.fullmatch(text.strip())
    if match is None or match["use"] not in uses:
        raise UsageError(f"{text!r} is no range of pages", hint=_HINT)
    try:
        size_bytes, guest_physical = parse_size(match["size"]), parse_size(match["base"])
    except UsageError as error:
        raise UsageError(f"{text!r} is no range of pages: {error}", hint=_HINT) from error
    return GuestPages(guest_physical, size_bytes, uses[match["use"]])


def assign_pages(
    engine: EngineClient, vm: UUID, pages: GuestPages, offset: int, algorithm: Algorithm
) -> int | None:
    """Give a VM's pages to what they are to be under; returns the KeyID, None for the VM's own.

    A further KeyID of the VM's is cleared once no page is under it any more.

    Args:
        engine: the platform's.
        vm: whose.
        pages: what they are to be under.
        offset: their `GuestPages.ram_offset`.
        algorithm: of a further key.

    Raises:
        ServiceError: the engine refuses.
    """
    keyid: int | None
    match pages.use:
        case PageUse.PRIVATE:
            keyid = None
        case PageUse.SHARED:
            keyid = 0
        case PageUse.NO_ENCRYPT:
            keyid = engine.program_key(KeyMode.NO_ENCRYPT, algorithm, vm=vm)
        case PageUse.OTHER_KEY:
            keyid = engine.program_key(KeyMode.RANDOM, algorithm, vm=vm)
    try:
        engine.assign_pages(vm, offset, pages.size_bytes, keyid)
    finally:
        _clear_unused(engine, vm)
    return keyid


def _clear_unused(engine: EngineClient, vm: UUID) -> None:
    """Clear the further KeyIDs of a VM that no page is under."""
    status = engine.status()
    further = {keyid for one in status.vms if one.vm == vm for keyid in one.further_keyids}
    for key in status.keys:
        if key.keyid in further and not key.pages:
            engine.clear_key(key.keyid)


def _size(size_bytes: int) -> str:
    """As `parse_size` takes it, in the largest unit that gives a whole number."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size_bytes and not size_bytes % (1 << shift):
            return f"{size_bytes >> shift}{unit}"
    return str(size_bytes)
