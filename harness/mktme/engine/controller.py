# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory controller: plaintext on one side, ciphertext in DRAM on the other.

Every page of DRAM is assigned a KeyID (`mktme.engine.page_keys`). A read or a write may name
another one: that is what a reference through the wrong mapping does.

Arrays of words hold memory's bytes as they are: the host, like its guests, is little-endian.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from mktme.engine.dram import Dram, Region
from mktme.engine.errors import AddressError, IntegrityError
from mktme.engine.integrity import Violation
from mktme.engine.keys import KeyTable
from mktme.engine.mac_area import MacUpdate, read_entries
from mktme.engine.page_keys import PageKeys
from mktme.engine.pages import (
    WORDS_PER_LINE,
    any_of_line,
    as_lines,
    check_page_numbers,
    pack_masks,
    runs_of_consecutive,
    unpack_masks,
)
from mktme.engine.xts import LINE_BYTES, LINES_PER_PAGE, PAGE_BYTES, check_words

BATCH_PAGES: Final = 128
"""Most pages that one `MemoryController.update_pages` takes: 512 KiB."""

WORDS_PER_PAGE: Final = PAGE_BYTES // 8
_ALL_LINES: Final = np.uint64(2**64 - 1)
_POISON: Final = np.uint64(2**64 - 1)


class MemoryController(PageKeys):
    """Reads and writes DRAM through the key table.

    Its scratch arrays take about 2 MiB. Like the ciphers, it is for one thread.

    Args:
        dram: the image; nothing else writes to it.
        keys: the platform's KeyIDs.
        maxphyaddr: bits of a physical address, KeyID bits included.

    Raises:
        AddressError: DRAM is larger than what addresses reach.
    """

    def __init__(self, dram: Dram, keys: KeyTable, maxphyaddr: int = 46) -> None:
        super().__init__(dram, keys, maxphyaddr)
        shape = (BATCH_PAGES, WORDS_PER_PAGE)
        self._ciphertext = np.empty(shape, np.uint64)
        self._stored = np.empty(shape, np.uint64)
        self._stored_lines = np.empty((BATCH_PAGES * LINES_PER_PAGE, WORDS_PER_LINE), np.uint64)
        self._flags = np.empty(shape, np.bool_)
        self._addresses = np.empty((BATCH_PAGES, LINES_PER_PAGE), np.uint64)
        self._line_offsets = np.arange(0, PAGE_BYTES, LINE_BYTES, dtype=np.uint64)

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
            DramFullError: there was no space for all. The pages before ``address`` are in DRAM,
                but some may still lack MACs, which KeyIDs with integrity do not accept: call
                again, with the same pages and their plaintext as it is by then.
            DramError: DRAM cannot be read or written.
        """
        numbers = check_page_numbers(pages, BATCH_PAGES)
        for number in numbers[[0, -1]] if len(numbers) else ():
            self._dram.check_range(int(number) * PAGE_BYTES, PAGE_BYTES)
        check_words("plaintext", plaintext, (len(numbers), WORDS_PER_PAGE))
        if line_masks is not None:
            check_words("line_masks", line_masks, (len(numbers),))

        stored = self._stored[: len(numbers)]
        for start, stop in runs_of_consecutive(numbers):
            self._dram.read_into(int(numbers[start]) * PAGE_BYTES, stored[start:stop].data)
        keyids = self._page_keyids[numbers]
        if line_masks is None:
            ciphertext, changed = self._encrypt_pages(numbers, plaintext, stored)
        else:
            ciphertext, changed = self._encrypt_lines(
                numbers, plaintext, stored, line_masks, keyids
            )
        if line_masks is None:
            line_masks = np.full(len(numbers), _ALL_LINES)
        self._write_pages(numbers, ciphertext, changed, line_masks, keyids)
        return changed

    def rekey_pages(self, first_page: int, count: int, keyid: int) -> None:
        """Assign pages to another KeyID, and encrypt what DRAM holds of them for it.

        Hardware leaves this to software, which has to write back what caches hold under the old
        KeyID first, then copy (336907, 7.4 AddPage and 7.5 EvictPage): so must the caller bring
        pending writes into DRAM before. Lines never written stay so; in plaintext, where they look
        like zeros that were written, that is pages of nothing but zeros.

        Args:
            first_page: page number in DRAM.
            count: how many pages, at most `BATCH_PAGES`.
            keyid: 0 to ``keyid_count - 1``.

        Raises:
            ValueError: too many pages.
            AddressError: not all of the pages are in DRAM.
            KeyIdError: no such KeyID.
            IntegrityError: a line does not match its MAC under its present KeyID. Nothing was
                changed: a MAC of what it decrypts to would make it good.
            DramError: DRAM cannot be read or written. Some pages may be the new KeyID's with a
                part of their old ciphertext: write them anew.
        """
        if count > BATCH_PAGES:
            raise ValueError(f"at most {BATCH_PAGES} pages at once, not {count}")
        self._dram.check_range(first_page * PAGE_BYTES, count * PAGE_BYTES)
        self._check_keyid(keyid)
        numbers = np.arange(first_page, first_page + count)
        pages, ciphertext = self._stored[:count], self._ciphertext[:count]
        self._dram.read_into(first_page * PAGE_BYTES, pages.data)
        never_written, bad = self._decrypt_pages(numbers, pages, None)
        if bad is not None:
            self._raise_for(numbers, bad, None)
        unwritten = never_written.reshape(count, LINES_PER_PAGE)
        for start, stop, cipher, _ in self._domains(numbers, self._page_keyids[numbers]):
            if cipher is None:
                unwritten[start:stop] &= unwritten[start:stop].all(axis=1, keepdims=True)
        self._page_keyids[first_page : first_page + count] = keyid
        self._encrypt(
            numbers,
            range(0, (count + 1) * LINES_PER_PAGE, LINES_PER_PAGE),
            as_lines(pages),
            self._line_addresses(numbers),
            as_lines(ciphertext),
            self._page_keyids[numbers],
        )
        as_lines(ciphertext)[never_written] = 0
        written = pack_masks(~unwritten)
        self._write_pages(numbers, ciphertext, written, written, self._page_keyids[numbers])

    def discard(self, first_page: int, count: int) -> None:
        """Make pages' lines never-written ones: they read as zeros.

        Raises:
            AddressError: not all of the pages are in DRAM.
            DramError: they cannot be erased.
        """
        self._dram.check_range(first_page * PAGE_BYTES, count * PAGE_BYTES)
        self._dram.erase(Region(first_page * PAGE_BYTES, count * PAGE_BYTES))

    def read_pages(
        self,
        first_page: int,
        count: int,
        keyid: int | None = None,
        out: NDArray[np.uint64] | None = None,
        poisoned: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.uint64]:
        """Read pages from DRAM.

        Under a KeyID with integrity, a line that does not match its MAC is poisoned.

        Args:
            first_page: page number in DRAM.
            count: how many pages.
            keyid: what to decrypt with; None for the KeyID that each page is assigned.
            out: shape (count, 512), uint64, C-contiguous; a new array when None.
            poisoned: gets masks of the poisoned lines (bit i: line i), shape (count,), uint64,
                C-contiguous. None: there must be none.

        Returns:
            ``out``: the plaintext as little-endian words; zeros in lines never written, all bits
            set in poisoned ones.

        Raises:
            TypeError, ValueError: ``out`` or ``poisoned`` is not as above.
            AddressError: not all of the pages are in DRAM.
            KeyIdError: no such KeyID.
            IntegrityError: a line is poisoned, and ``poisoned`` is None.
            DramError: DRAM cannot be read.
        """
        self._dram.check_range(first_page * PAGE_BYTES, count * PAGE_BYTES)
        if keyid is not None:
            self._check_keyid(keyid)
        if out is None:
            out = np.empty((count, WORDS_PER_PAGE), np.uint64)
        else:
            check_words("out", out, (count, WORDS_PER_PAGE))
        if poisoned is not None:
            check_words("poisoned", poisoned, (count,))
        if poisoned is not None:
            poisoned[:] = 0
        for start in range(0, count, BATCH_PAGES):
            batch = out[start : start + BATCH_PAGES]
            self._dram.read_into((first_page + start) * PAGE_BYTES, batch.data)
            numbers = np.arange(first_page + start, first_page + start + len(batch))
            _, bad = self._decrypt_pages(numbers, batch, keyid)
            if bad is None:
                continue
            if poisoned is None:
                self._raise_for(numbers, bad, keyid)
            masks = pack_masks(bad.reshape(-1, LINES_PER_PAGE))
            poisoned[start : start + BATCH_PAGES] = masks
        return out

    def read_page(self, page: int, out: NDArray[np.uint64]) -> int:
        """Read the page that a fault waits for: as `read_pages`, with no call that is not needed.

        Args:
            page: its number in DRAM.
            out: shape (1, 512), uint64, C-contiguous.

        Returns:
            The mask of its poisoned lines.

        Raises:
            TypeError, ValueError, AddressError, DramError: as `read_pages`.
        """
        address = page * PAGE_BYTES
        self._dram.check_range(address, PAGE_BYTES)
        keyid = int(self._page_keyids[page])
        cipher = self._keys.cipher(keyid)
        if cipher is not None and self._exclusion is None and self._keys.macs(keyid) is None:
            check_words("out", out, (1, WORDS_PER_PAGE))
            self._dram.read_into(address, out.data)
            # A line that was written starts with eight zeros once in 2^64 times; and then it is
            # only read by the longer way.
            if np.count_nonzero(out[0, ::WORDS_PER_LINE]) == LINES_PER_PAGE:
                lines = out.reshape(LINES_PER_PAGE, WORDS_PER_LINE)
                np.add(self._line_offsets, np.uint64(address), out=self._addresses[0])
                cipher.decrypt_lines(lines, self._addresses[0], out=lines)
                return 0
        poisoned = np.empty(1, np.uint64)
        self.read_pages(page, 1, out=out, poisoned=poisoned)
        return int(poisoned[0])

    def violation_at(self, address: int) -> Violation:
        """What is wrong with a poisoned line.

        Raises:
            AddressError: the address is not in DRAM.
            DramError: the MAC area cannot be read.
        """
        page, offset = divmod(address, PAGE_BYTES)
        self._dram.check_range(address, 1)
        entry = read_entries(self._dram, np.array([page]))[0, offset // LINE_BYTES]
        return Violation.MISMATCH if entry else Violation.NO_MAC

    def read(self, address: int, size_bytes: int, keyid: int | None = None) -> bytearray:
        """Read lines from DRAM.

        Args:
            address: of the first line, a multiple of 64.
            size_bytes: a multiple of 64.
            keyid: what to decrypt with; None for the KeyID that each page is assigned.

        Raises:
            AddressError: the range is not whole lines of DRAM.
            KeyIdError: no such KeyID.
            IntegrityError: one of the lines does not match its MAC.
            DramError: DRAM cannot be read.
        """
        if address % LINE_BYTES or size_bytes % LINE_BYTES:
            raise AddressError(
                f"{size_bytes} bytes at {address:#x} are not whole 64-byte lines", address=address
            )
        self._dram.check_range(address, size_bytes)
        first, offset = divmod(address, PAGE_BYTES)
        count = -(-(offset + size_bytes) // PAGE_BYTES)
        poisoned = np.empty(count, np.uint64)
        plaintext = self.read_pages(first, count, keyid, poisoned=poisoned)
        bad = unpack_masks(poisoned)
        # What else is on the pages was not asked for.
        bad.reshape(-1)[: offset // LINE_BYTES] = False
        bad.reshape(-1)[(offset + size_bytes) // LINE_BYTES :] = False
        if bad.any():
            self._raise_for(np.arange(first, first + count), bad.reshape(-1), keyid)
        return bytearray(plaintext.view(np.uint8).reshape(-1)[offset : offset + size_bytes].data)

    def write(self, address: int, plaintext: bytes | bytearray | memoryview, keyid: int) -> None:
        """Write lines as a reference with a KeyID does, whatever KeyID their pages are assigned.

        As in hardware, nothing looks at whose the memory is: the lines are this KeyID's from now
        on, with its MACs, or without any if it has no integrity. Their pages' assignment stays,
        so under the KeyID that the pages are assigned the lines are noise, or poisoned.

        Args:
            address: of the first line, a multiple of 64.
            plaintext: whole lines, at most `BATCH_PAGES` pages of them; C-contiguous.
            keyid: 0 to ``keyid_count - 1``.

        Raises:
            AddressError: the range is not whole lines of DRAM, or too large.
            KeyIdError: no such KeyID.
            DramError: DRAM cannot be read or written; the lines may lack MACs: write them anew.
        """
        data = memoryview(plaintext).cast("B")
        if not data or address % LINE_BYTES or len(data) % LINE_BYTES:
            raise AddressError(
                f"{len(data)} bytes at {address:#x} are not whole 64-byte lines", address=address
            )
        self._dram.check_range(address, len(data))
        self._check_keyid(keyid)
        first, offset = divmod(address, PAGE_BYTES)
        count = -(-(offset + len(data)) // PAGE_BYTES)
        if count > BATCH_PAGES:
            raise AddressError(f"{len(data)} bytes are too many for one write", address=address)
        numbers, keyids = np.arange(first, first + count), np.full(count, keyid, np.uint16)
        pages = np.zeros((count, WORDS_PER_PAGE), np.uint64)
        pages.view(np.uint8).reshape(-1)[offset : offset + len(data)] = np.frombuffer(
            data, np.uint8
        )
        written = np.zeros((count, LINES_PER_PAGE), np.bool_)
        written.reshape(-1)[offset // LINE_BYTES : (offset + len(data)) // LINE_BYTES] = True
        masks = pack_masks(written)
        stored = self._stored[:count]
        self._dram.read_into(first * PAGE_BYTES, stored.data)
        ciphertext, _ = self._encrypt_lines(numbers, pages, stored, masks, keyids)
        # Each of the lines counts as changed: one with the same ciphertext gets this KeyID's MAC.
        self._write_pages(numbers, ciphertext, masks, masks, keyids)

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
            as_lines(plaintext),
            self._line_addresses(numbers),
            as_lines(ciphertext),
            self._page_keyids[numbers],
        )
        flags = self._flags[:count]
        np.not_equal(ciphertext, stored, out=flags)
        return ciphertext, pack_masks(any_of_line(flags))

    def _encrypt_lines(
        self,
        numbers: NDArray[np.int64],
        plaintext: NDArray[np.uint64],
        stored: NDArray[np.uint64],
        line_masks: NDArray[np.uint64],
        keyids: NDArray[np.uint16],
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """As `_encrypt_pages`, but only the lines in the masks, into ``stored`` itself."""
        chosen = np.flatnonzero(np.unpackbits(line_masks.view(np.uint8), bitorder="little"))
        bounds = [0, *np.cumsum(np.bitwise_count(line_masks), dtype=np.int64).tolist()]
        ciphertext = as_lines(self._ciphertext)[: len(chosen)]
        before = self._stored_lines[: len(chosen)]
        # mode="clip": with the default, numpy copies into a temporary first.
        np.take(as_lines(plaintext), chosen, axis=0, out=ciphertext, mode="clip")
        addresses = self._line_addresses(numbers)[chosen]
        self._encrypt(numbers, bounds, ciphertext, addresses, ciphertext, keyids)
        np.take(as_lines(stored), chosen, axis=0, out=before, mode="clip")
        flags = self._flags.reshape(-1, WORDS_PER_LINE)[: len(chosen)]
        np.not_equal(ciphertext, before, out=flags)
        as_lines(stored)[chosen] = ciphertext
        changed = np.zeros((len(numbers), LINES_PER_PAGE), np.bool_)
        changed.reshape(-1)[chosen] = any_of_line(flags).reshape(-1)
        return stored, pack_masks(changed)

    def _encrypt(
        self,
        numbers: NDArray[np.int64],
        bounds: range | list[int],
        lines: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        out: NDArray[np.uint64],
        keyids: NDArray[np.uint16],
    ) -> None:
        """Encrypt lines of some pages; those of page k are lines bounds[k] to bounds[k + 1]."""
        for start, stop, cipher, _ in self._domains(numbers, keyids):
            part = slice(bounds[start], bounds[stop])
            if cipher is None:
                out[part] = lines[part]
            else:
                cipher.encrypt_lines(lines[part], addresses[part], out=out[part])

    def _write_pages(
        self,
        numbers: NDArray[np.int64],
        ciphertext: NDArray[np.uint64],
        changed: NDArray[np.uint64],
        chosen: NDArray[np.uint64],
        keyids: NDArray[np.uint16],
    ) -> None:
        """Write pages whose masks of changed lines are not 0, and chosen lines' MACs."""
        domains = [(start, stop, macs) for start, stop, _, macs in self._domains(numbers, keyids)]
        dirty, update = changed != 0, None
        if self._dram.has_macs or any(macs is not None for _, _, macs in domains):
            addresses = self._line_addresses(numbers)
            update = MacUpdate(
                self._dram, numbers, as_lines(ciphertext), addresses, changed, chosen, domains
            )
            dirty |= update.pages
        written = np.flatnonzero(dirty)
        for first, last in runs_of_consecutive(numbers[written]):
            start, stop = int(written[first]), int(written[last - 1]) + 1
            if update is not None:
                update.clear(start, stop)
            if changed[start:stop].any():
                self._dram.write(int(numbers[start]) * PAGE_BYTES, ciphertext[start:stop].data)
            if update is not None:
                update.commit(start, stop)

    def _decrypt_pages(
        self, numbers: NDArray[np.int64], pages: NDArray[np.uint64], keyid: int | None
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
        """Decrypt in place; return which lines were never written, and which are poisoned.

        Each has shape (n * 64,); there is None in place of no poisoned lines. A page fault waits
        for this, and what costs is the number of numpy calls: none is here that is not needed.
        """
        flags = self._flags[: len(numbers)]
        np.not_equal(pages, 0, out=flags)
        never_written: NDArray[np.bool_] = ~any_of_line(flags).reshape(-1)
        all_written = not never_written.any()
        bad: NDArray[np.bool_] | None = None
        lines = as_lines(pages)
        addresses = self._line_addresses(numbers)
        keyids = self._page_keyids[numbers] if keyid is None else np.full(len(numbers), keyid)
        for start, stop, cipher, macs in self._domains(numbers, keyids):
            part = slice(start * LINES_PER_PAGE, stop * LINES_PER_PAGE)
            if macs is not None:
                entries = read_entries(self._dram, numbers[start:stop]).reshape(-1)
                found = macs.find_bad(lines[part], addresses[part], never_written[part], entries)
                if found.any():
                    bad = np.zeros(len(never_written), np.bool_) if bad is None else bad
                    bad[part] = found
            if cipher is not None and (all_written or not never_written[part].all()):
                cipher.decrypt_lines(lines[part], addresses[part], out=lines[part])
        if not all_written:
            lines[never_written] = 0
        if bad is not None:
            lines[bad] = _POISON
        return never_written, bad

    def _line_addresses(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Addresses of all lines of pages, shape (n * 64,), valid until the next call."""
        addresses = self._addresses[: len(numbers)]
        if len(numbers) == 1:  # the page of a fault, as in `runs_of_equal`
            base = np.uint64(int(numbers[0]) * PAGE_BYTES)
            np.add(self._line_offsets, base, out=addresses[0])
        else:
            bases = numbers.astype(np.uint64) * np.uint64(PAGE_BYTES)
            np.add(bases[:, np.newaxis], self._line_offsets, out=addresses)
        return addresses.reshape(-1)

    def _raise_for(
        self, numbers: NDArray[np.int64], bad: NDArray[np.bool_], keyid: int | None
    ) -> NoReturn:
        """Raise IntegrityError for the first poisoned line of pages."""
        page, line = divmod(int(bad.argmax()), LINES_PER_PAGE)
        address = int(numbers[page]) * PAGE_BYTES + line * LINE_BYTES
        if keyid is None:
            keyid = self.keyid_at(address)
        raise IntegrityError(address=address, keyid=keyid)
