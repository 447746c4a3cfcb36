# SPDX-License-Identifier: GPL-2.0-or-later
"""Which KeyID each page of DRAM is assigned to, and so which key its lines are under.

On hardware the KeyID comes with each reference, in the upper physical address bits that the page
tables hold (Intel 336907); here a VM's pages have one, and it is kept here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mktme.engine.dram import Dram, Region
from mktme.engine.errors import AddressError, KeyIdError
from mktme.engine.integrity import LineMacs
from mktme.engine.keys import KeyTable
from mktme.engine.pages import runs_of_equal
from mktme.engine.sidecar import PageRange
from mktme.engine.tme import ExclusionRange
from mktme.engine.xts import PAGE_BYTES, XtsCipher

_EXCLUDED: Final = -1


class PageKeys:
    """The KeyIDs of the pages of DRAM, which take 1/2048 of its size.

    Args:
        dram: the image.
        keys: the platform's KeyIDs.
        maxphyaddr: bits of a physical address, KeyID bits included.

    Raises:
        AddressError: DRAM is larger than what addresses reach.
    """

    def __init__(self, dram: Dram, keys: KeyTable, maxphyaddr: int) -> None:
        self._dram = dram
        self._keys = keys
        self._maxphyaddr = maxphyaddr
        if dram.size_bytes > 1 << maxphyaddr:
            raise AddressError(
                f"{dram.size_bytes} bytes of DRAM need more than {maxphyaddr} address bits",
                address=dram.size_bytes,
            )
        self._exclusion: ExclusionRange | None = None
        self._page_keyids = np.zeros(dram.size_bytes // PAGE_BYTES, np.uint16)

    @property
    def maxphyaddr(self) -> int:
        """Bits of a physical address, KeyID bits included."""
        return self._maxphyaddr

    @property
    def address_bits(self) -> int:
        """Bits of a physical address that are no KeyID."""
        return self._maxphyaddr - self._keys.keyid_bits

    def reset(self) -> None:
        """CPU reset: every page is KeyID 0's, and none is excluded."""
        self._page_keyids[:] = 0
        self._exclusion = None

    def exclude(self, exclusion: ExclusionRange | None) -> None:
        """Set the addresses that KeyID 0 does not encrypt (IA32_TME_EXCLUDE_MASK and _BASE)."""
        self._exclusion = exclusion

    def split(self, reference: int) -> tuple[int, int]:
        """Take a physical address as software uses it apart, into KeyID and DRAM address.

        Raises:
            AddressError: the reference has more than `maxphyaddr` bits.
        """
        if reference < 0 or reference >> self._maxphyaddr:
            raise AddressError(
                f"{reference:#x} is no address of {self._maxphyaddr} bits", address=reference
            )
        return reference >> self.address_bits, reference & ((1 << self.address_bits) - 1)

    def reference(self, keyid: int, address: int) -> int:
        """The physical address as software uses it: the KeyID above the address bits.

        Raises:
            KeyIdError: no such KeyID.
            AddressError: the address reaches into the KeyID bits.
        """
        self._check_keyid(keyid)
        if address < 0 or address >> self.address_bits:
            raise AddressError(
                f"{address:#x} has more than {self.address_bits} bits", address=address
            )
        return keyid << self.address_bits | address

    def assign(self, base: int, size_bytes: int, keyid: int) -> None:
        """Assign pages to a KeyID. What DRAM holds is not touched: its old KeyID still reads it.

        Args:
            base: page-aligned address.
            size_bytes: whole pages.
            keyid: 0 to ``keyid_count - 1``.

        Raises:
            AddressError: the range is not whole pages of DRAM.
            KeyIdError: no such KeyID.
        """
        if base % PAGE_BYTES or size_bytes % PAGE_BYTES:
            raise AddressError(
                f"{size_bytes} bytes at {base:#x} are not whole 4 KiB pages", address=base
            )
        self._dram.check_range(base, size_bytes)
        self._check_keyid(keyid)
        first = base // PAGE_BYTES
        self._page_keyids[first : first + size_bytes // PAGE_BYTES] = keyid

    def keyid_at(self, address: int) -> int:
        """The KeyID that the page of an address is assigned to.

        Raises:
            AddressError: the address is not in DRAM.
        """
        self._dram.check_range(address, 1)
        return int(self._page_keyids[address // PAGE_BYTES])

    def page_ranges(self, region: Region | None = None) -> tuple[PageRange, ...]:
        """The KeyID of every page of a region, or of DRAM, in runs, ascending."""
        first = 0 if region is None else region.base // PAGE_BYTES
        keyids = self._page_keyids[first : None if region is None else region.end // PAGE_BYTES]
        return tuple(
            PageRange(
                base=(first + start) * PAGE_BYTES,
                size_bytes=(stop - start) * PAGE_BYTES,
                keyid=int(keyids[start]),
            )
            for start, stop in runs_of_equal(keyids)
        )

    def page_counts(self) -> list[int]:
        """How many pages are assigned to each KeyID, by KeyID."""
        counts: list[int] = np.bincount(
            self._page_keyids, minlength=self._keys.keyid_count
        ).tolist()
        return counts

    def is_used(self, keyid: int, region: Region) -> bool:
        """Whether any page of a region is assigned to a KeyID."""
        pages = slice(region.base // PAGE_BYTES, region.end // PAGE_BYTES)
        return bool((self._page_keyids[pages] == keyid).any())

    def _domains(
        self, numbers: NDArray[np.int64], keyids: NDArray[np.integer[Any]]
    ) -> Iterator[tuple[int, int, XtsCipher | None, LineMacs | None]]:
        """Split pages into runs under one key; indices as `runs_of_equal`.

        There is no cipher for plaintext, and nothing for MACs without integrity.
        """
        domains: NDArray[np.integer[Any]] = keyids
        if self._exclusion is not None:
            mask, base = self._exclusion.mask, self._exclusion.base
            excluded = (numbers * PAGE_BYTES) & mask == base & mask
            domains = keyids.astype(np.int64)
            domains[(domains == 0) & excluded] = _EXCLUDED
        for start, stop in runs_of_equal(domains):
            domain = int(domains[start])
            if domain == _EXCLUDED:
                yield start, stop, None, None
            else:
                yield start, stop, self._keys.cipher(domain), self._keys.macs(domain)

    def _check_keyid(self, keyid: int) -> None:
        if not 0 <= keyid < self._keys.keyid_count:
            raise KeyIdError(
                f"no KeyID {keyid}: the platform has 0 to {self._keys.keyid_count - 1}",
                keyid=keyid,
            )
