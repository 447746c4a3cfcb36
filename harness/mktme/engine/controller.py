# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory controller: plaintext on one side, ciphertext in DRAM on the other.

Every page of DRAM is assigned a KeyID. On hardware the KeyID comes with each reference, in the
upper physical address bits that the page tables hold (Intel 336907); here a VM's RAM has one and
the controller keeps it. A read may name another KeyID: that is what a reference through the wrong
mapping gives.

Arrays of words hold memory's bytes as they are: the host, like its guests, is little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mktme.engine.dram import Dram, PageRange
from mktme.engine.errors import AddressError, KeyIdError
from mktme.engine.keys import KeyTable
from mktme.engine.xts import LINE_BYTES, LINES_PER_PAGE, PAGE_BYTES, check_words

BATCH_PAGES: Final = 128
"""Most pages that one `MemoryController.update_pages` takes: 512 KiB."""

_WORDS_PER_LINE: Final = LINE_BYTES // 8
WORDS_PER_PAGE: Final = PAGE_BYTES // 8


class MemoryController:
    """Reads and writes DRAM through the key table.

    Its scratch arrays take about 2 MiB, and the pages' KeyIDs 1/2048 of the size of DRAM. Like
    the ciphers, it is for one thread.

    Args:
        dram: the image; nothing else writes to it.
        keys: the platform's KeyIDs.
        maxphyaddr: bits of a physical address, KeyID bits included.

    Raises:
        AddressError: DRAM is larger than the address bits that the KeyID leaves.
    """

    def __init__(self, dram: Dram, keys: KeyTable, maxphyaddr: int = 46) -> None:
        self._dram = dram
        self._keys = keys
        self._maxphyaddr = maxphyaddr
        self._address_bits = maxphyaddr - keys.keyid_bits
        if dram.size_bytes > 1 << self._address_bits:
            raise AddressError(
                f"{dram.size_bytes} bytes of DRAM need more than the {self._address_bits} "
                f"address bits that {keys.keyid_bits} KeyID bits of {maxphyaddr} leave",
                address=dram.size_bytes,
            )
        self._page_keyids = np.zeros(dram.size_bytes // PAGE_BYTES, np.uint16)

        shape = (BATCH_PAGES, WORDS_PER_PAGE)
        self._ciphertext = np.empty(shape, np.uint64)
        self._stored = np.empty(shape, np.uint64)
        self._stored_lines = np.empty((BATCH_PAGES * LINES_PER_PAGE, _WORDS_PER_LINE), np.uint64)
        self._flags = np.empty(shape, np.bool_)
        self._addresses = np.empty((BATCH_PAGES, LINES_PER_PAGE), np.uint64)
        self._line_offsets = np.arange(0, PAGE_BYTES, LINE_BYTES, dtype=np.uint64)

    @property
    def maxphyaddr(self) -> int:
        """Bits of a physical address, KeyID bits included."""
        return self._maxphyaddr

    # --- KeyIDs and addresses -----------------------------------------------------------------

    def split(self, reference: int) -> tuple[int, int]:
        """Take a physical address as software uses it apart, into KeyID and DRAM address.

        Raises:
            AddressError: the reference has more than `maxphyaddr` bits.
        """
        if reference < 0 or reference >> self._maxphyaddr:
            raise AddressError(
                f"{reference:#x} is no address of {self._maxphyaddr} bits", address=reference
            )
        return reference >> self._address_bits, reference & ((1 << self._address_bits) - 1)

    def reference(self, keyid: int, address: int) -> int:
        """The physical address as software uses it: the KeyID above the address bits.

        Raises:
            KeyIdError: no such KeyID.
            AddressError: the address reaches into the KeyID bits.
        """
        self._check_keyid(keyid)
        if address < 0 or address >> self._address_bits:
            raise AddressError(
                f"{address:#x} has more than {self._address_bits} bits", address=address
            )
        return keyid << self._address_bits | address

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

    def page_ranges(self) -> tuple[PageRange, ...]:
        """The KeyID of every page of DRAM, in runs, ascending."""
        return tuple(
            PageRange(
                base=start * PAGE_BYTES,
                size_bytes=(stop - start) * PAGE_BYTES,
                keyid=int(self._page_keyids[start]),
            )
            for start, stop in _runs_of_equal(self._page_keyids)
        )

    # --- data ---------------------------------------------------------------------------------

    def update_pages(
        self,
        pages: NDArray[np.integer[Any]],
        plaintext: NDArray[np.uint64],
        line_masks: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.uint64]:
        """Bring pages, or some of their lines, into DRAM; write only what differs from it.

        ``plaintext`` is left as it is, and each of its words is read once at most: it may be a
        view of RAM that a guest is writing.

        Args:
            pages: page numbers in DRAM, ascending, shape (n,), n <= `BATCH_PAGES`.
            plaintext: the pages' contents as little-endian words, shape (n, 512), C-contiguous.
            line_masks: bit i of element k says whether line i of page k is to be brought into
                DRAM, shape (n,). None: every line.

        Returns:
            uint64, shape (n,): bit i is set if the ciphertext of line i changed. XTS is
            deterministic, so its plaintext did too, or the line was never written before (which
            counts even if it is zeros), or its KeyID or its key is another one.

        Raises:
            TypeError, ValueError: an array is not as above.
            AddressError: a page is not in DRAM.
            DramFullError: there was no space for all. The pages before ``address`` are in DRAM:
                call again, with the same pages and their plaintext as it is by then.
            DramError: DRAM cannot be read or written.
        """
        numbers = self._check_pages(pages)
        check_words("plaintext", plaintext, (len(numbers), WORDS_PER_PAGE))
        if line_masks is not None:
            check_words("line_masks", line_masks, (len(numbers),))

        stored = self._stored[: len(numbers)]
        for start, stop in _runs_of_consecutive(numbers):
            self._dram.read_into(int(numbers[start]) * PAGE_BYTES, stored[start:stop].data)
        if line_masks is None:
            ciphertext, changed = self._encrypt_pages(numbers, plaintext, stored)
        else:
            ciphertext, changed = self._encrypt_lines(numbers, plaintext, stored, line_masks)

        written = np.flatnonzero(changed)
        for first, last in _runs_of_consecutive(numbers[written]):
            start, stop = int(written[first]), int(written[last - 1]) + 1
            self._dram.write(int(numbers[start]) * PAGE_BYTES, ciphertext[start:stop].data)
        return changed

    def read_pages(
        self,
        first_page: int,
        count: int,
        keyid: int | None = None,
        out: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.uint64]:
        """Read pages from DRAM.

        Args:
            first_page: page number in DRAM.
            count: how many pages.
            keyid: what to decrypt with; None for the KeyID that each page is assigned.
            out: shape (count, 512), uint64, C-contiguous; a new array when None.

        Returns:
            ``out``: the plaintext as little-endian words; zeros in lines never written.

        Raises:
            TypeError, ValueError: ``out`` is not as above.
            AddressError: not all of the pages are in DRAM.
            KeyIdError: no such KeyID.
            DramError: DRAM cannot be read.
        """
        self._dram.check_range(first_page * PAGE_BYTES, count * PAGE_BYTES)
        if keyid is not None:
            self._check_keyid(keyid)
        if out is None:
            out = np.empty((count, WORDS_PER_PAGE), np.uint64)
        else:
            check_words("out", out, (count, WORDS_PER_PAGE))
        for start in range(0, count, BATCH_PAGES):
            batch = out[start : start + BATCH_PAGES]
            self._dram.read_into((first_page + start) * PAGE_BYTES, batch.data)
            numbers = np.arange(first_page + start, first_page + start + len(batch))
            self._decrypt_pages(numbers, batch, keyid)
        return out

    def read(self, address: int, size_bytes: int, keyid: int | None = None) -> bytearray:
        """Read lines from DRAM.

        Args:
            address: of the first line, a multiple of 64.
            size_bytes: a multiple of 64.
            keyid: what to decrypt with; None for the KeyID that each page is assigned.

        Raises:
            AddressError: the range is not whole lines of DRAM.
            KeyIdError: no such KeyID.
            DramError: DRAM cannot be read.
        """
        if address % LINE_BYTES or size_bytes % LINE_BYTES:
            raise AddressError(
                f"{size_bytes} bytes at {address:#x} are not whole 64-byte lines", address=address
            )
        self._dram.check_range(address, size_bytes)
        first, offset = divmod(address, PAGE_BYTES)
        count = -(-(offset + size_bytes) // PAGE_BYTES)
        plaintext = self.read_pages(first, count, keyid).view(np.uint8).reshape(-1)
        return bytearray(plaintext[offset : offset + size_bytes].data)

    # --- inside -------------------------------------------------------------------------------

    def _encrypt_pages(
        self,
        numbers: NDArray[np.int64],
        plaintext: NDArray[np.uint64],
        stored: NDArray[np.uint64],
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Encrypt all lines; return the pages' ciphertext, and which lines differ from stored."""
        count = len(numbers)
        ciphertext = self._ciphertext[:count]
        self._encrypt(
            numbers,
            range(0, (count + 1) * LINES_PER_PAGE, LINES_PER_PAGE),
            _lines(plaintext),
            self._line_addresses(numbers),
            _lines(ciphertext),
        )
        flags = self._flags[:count]
        np.not_equal(ciphertext, stored, out=flags)
        return ciphertext, _line_masks(_any_of_line(flags))

    def _encrypt_lines(
        self,
        numbers: NDArray[np.int64],
        plaintext: NDArray[np.uint64],
        stored: NDArray[np.uint64],
        line_masks: NDArray[np.uint64],
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """As `_encrypt_pages`, but only the lines in the masks, into ``stored`` itself."""
        chosen = np.flatnonzero(np.unpackbits(line_masks.view(np.uint8), bitorder="little"))
        bounds = [0, *np.cumsum(np.bitwise_count(line_masks), dtype=np.int64).tolist()]
        ciphertext = _lines(self._ciphertext)[: len(chosen)]
        before = self._stored_lines[: len(chosen)]
        # mode="clip": with the default, numpy copies into a temporary first.
        np.take(_lines(plaintext), chosen, axis=0, out=ciphertext, mode="clip")
        addresses = self._line_addresses(numbers)[chosen]
        self._encrypt(numbers, bounds, ciphertext, addresses, ciphertext)
        np.take(_lines(stored), chosen, axis=0, out=before, mode="clip")
        flags = self._flags.reshape(-1, _WORDS_PER_LINE)[: len(chosen)]
        np.not_equal(ciphertext, before, out=flags)
        _lines(stored)[chosen] = ciphertext
        changed = np.zeros((len(numbers), LINES_PER_PAGE), np.bool_)
        changed.reshape(-1)[chosen] = _any_of_line(flags).reshape(-1)
        return stored, _line_masks(changed)

    def _encrypt(
        self,
        numbers: NDArray[np.int64],
        bounds: range | list[int],
        lines: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        out: NDArray[np.uint64],
    ) -> None:
        """Encrypt lines of some pages; those of page k are lines bounds[k] to bounds[k + 1]."""
        keyids = self._page_keyids[numbers]
        for start, stop in _runs_of_equal(keyids):
            part = slice(bounds[start], bounds[stop])
            cipher = self._keys.cipher(int(keyids[start]))
            if cipher is None:
                out[part] = lines[part]
            else:
                cipher.encrypt_lines(lines[part], addresses[part], out=out[part])

    def _decrypt_pages(
        self, numbers: NDArray[np.int64], pages: NDArray[np.uint64], keyid: int | None
    ) -> None:
        """Decrypt in place."""
        flags = self._flags[: len(numbers)]
        np.not_equal(pages, 0, out=flags)
        never_written = ~_any_of_line(flags).reshape(-1)
        if never_written.all():
            return
        lines = _lines(pages)
        addresses = self._line_addresses(numbers)
        keyids = self._page_keyids[numbers] if keyid is None else np.full(len(numbers), keyid)
        for start, stop in _runs_of_equal(keyids):
            part = slice(start * LINES_PER_PAGE, stop * LINES_PER_PAGE)
            cipher = self._keys.cipher(int(keyids[start]))
            if cipher is not None:
                cipher.decrypt_lines(lines[part], addresses[part], out=lines[part])
        lines[never_written] = 0

    def _line_addresses(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Addresses of all lines of pages, shape (n * 64,), valid until the next call."""
        addresses = self._addresses[: len(numbers)]
        bases = numbers.astype(np.uint64) * np.uint64(PAGE_BYTES)
        np.add(bases[:, np.newaxis], self._line_offsets, out=addresses)
        return addresses.reshape(-1)

    def _check_keyid(self, keyid: int) -> None:
        if not 0 <= keyid < self._keys.keyid_count:
            raise KeyIdError(
                f"no KeyID {keyid}: the platform has 0 to {self._keys.keyid_count - 1}",
                keyid=keyid,
            )

    def _check_pages(self, pages: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        if not isinstance(pages, np.ndarray) or pages.dtype.kind not in "iu":
            raise TypeError("pages must be an array of integers")
        if pages.ndim != 1 or len(pages) > BATCH_PAGES:
            raise ValueError(f"pages must have shape (n,), n <= {BATCH_PAGES}, not {pages.shape}")
        numbers = pages.astype(np.int64)
        if (numbers[1:] <= numbers[:-1]).any():
            raise ValueError("pages must be ascending")
        if len(numbers):
            self._dram.check_range(int(numbers[0]) * PAGE_BYTES, PAGE_BYTES)
            self._dram.check_range(int(numbers[-1]) * PAGE_BYTES, PAGE_BYTES)
        return numbers


def _runs_of_equal(values: NDArray[np.integer[Any]]) -> Iterator[tuple[int, int]]:
    """Split values into runs of equal ones: (index of the first, index behind the last)."""
    return _runs(len(values), values[1:] != values[:-1])


def _runs_of_consecutive(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Split ascending numbers into runs without a gap, as `_runs_of_equal` does."""
    return _runs(len(numbers), numbers[1:] != numbers[:-1] + 1)


def _runs(count: int, breaks: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    ends = [count] if count else []
    return pairwise([0, *(breaks.nonzero()[0] + 1).tolist(), *ends])


def _lines(pages: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """View pages (n, 512) as lines (n * 64, 8)."""
    return pages.reshape(-1, _WORDS_PER_LINE)


def _any_of_line(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether any of 8 words' flags is set: (n, 8 * k) to (n, k).

    The 8 bytes of a line's flags are looked at as one word: ``any(axis=-1)`` is ten times slower
    over so short an axis.
    """
    any_of_line: NDArray[np.bool_] = flags.view(np.uint64) != 0
    return any_of_line


def _line_masks(lines: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Pack flags (n, 64) into masks (n,); line i is bit i."""
    return np.packbits(lines, axis=1, bitorder="little").view(np.uint64).reshape(-1)
