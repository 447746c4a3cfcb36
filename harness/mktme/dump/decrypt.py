# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's memory out of a DRAM image, as its guest sees it, for the tools of others.

The image is read, decrypted and written piece by piece. Lines that were never written are zeros;
pages that are not encrypted pass through; the output gets its name when it is complete, and if the
keys fit.

Does a key fit?
    Under a key with MACs, its lines' MACs tell: of a wrong key one matches in 2^28.

    Without, a wrong key makes noise of what was written: each 16-byte block is a random one of
    2^128. Memory is nothing like that: in most pages that anybody wrote, two blocks side by side
    are equal, for they are zeros. So up to `SAMPLE_PAGES` pages that have written lines are
    decrypted first, spread evenly over what the KeyID has, and the key fits if some line of them
    has two equal blocks side by side.

    How often that is wrong: noise has such a line with probability 3 * 2^-128, all of the sample
    with 2^-108. A good key is refused if all of the sample lacks one: if one page in a
    hundred of a guest's memory has one, that is 0.99^4096, or 2^-59. It is certain for memory that
    holds nothing but random data, for which there is ``force``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mktme.dump.formats import (
    VMCOREINFO_MAX_BYTES,
    Format,
    describes_running_kernel,
    layout,
    parse_vmcoreinfo,
    vmcoreinfo_pages,
)
from mktme.dump.image import DumpError, DumpImage
from mktme.dump.keys import Keys, WrongKeyError
from mktme.engine.dram import MAC_BYTES_OF, mac_path
from mktme.engine.new_file import NewFile
from mktme.engine.pages import runs_of_consecutive, runs_of_equal
from mktme.engine.sidecar import GuestSegment, VmRecord
from mktme.engine.text import spelled
from mktme.engine.xts import LINE_BYTES, LINES_PER_PAGE, PAGE_BYTES

PIECE_BYTES: Final = 1 << 20
"""What is read, decrypted and written at a time."""
SAMPLE_PAGES: Final = 4096
"""Most pages of a KeyID that are looked at to tell whether its key fits: 16 MiB."""
NOTES_MAX: Final = 1024
"""Most pages that are looked at because they begin as a VMCOREINFO note does: a guest has one for
each of its kernels, unless it means harm."""

_PHYSICAL_BYTES: Final = 1 << 52  # no more can be addressed (SDM vol. 3A, 4.1.4: MAXPHYADDR)
_PLAINTEXT: Final = -1
_PIECES_AT_ONCE: Final = 3
# Random lines match their MACs once in 2^28.
_FIT_SHARE: Final = 1 / 256


@dataclass(frozen=True, slots=True)
class SkippedKeyId:
    """Memory that was left out, as zeros, because its key was not given."""

    keyid: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DecryptReport:
    """The document of `mktme dump decrypt`.

    Attributes:
        size_bytes: the guest's memory.
        written_bytes: how much of it is in the output as other than zeros, whole pages.
        skipped: what was left out.
        bad_lines: lines that do not match their MACs, and are in the output as they decrypt.
        kernel: `elf`: release of the kernel whose VMCOREINFO is in it; None: none was found.
        duration_s: seconds.
    """

    schema: Literal["mktme.dump-decrypt"]
    version: Literal[1]
    image: str
    vm: str
    out: str
    format: Format
    size_bytes: int
    written_bytes: int
    skipped: tuple[SkippedKeyId, ...]
    bad_lines: int
    kernel: str | None
    duration_s: float


class _Piece(NamedTuple):
    """Some of a segment.

    Attributes:
        base: address in the image.
        size_bytes: whole pages.
        offset: where it goes in the output.
        guest_physical: where it is for the guest.
    """

    base: int
    size_bytes: int
    offset: int
    guest_physical: int


class _Read(NamedTuple):
    """A piece that was read.

    Attributes:
        data: its bytes.
        buffer: what `data` is the beginning of, `PIECE_BYTES`.
        entries: what the MAC area has for it; None: there is none.
    """

    piece: _Piece
    data: NDArray[np.uint8]
    buffer: NDArray[np.uint8]
    entries: NDArray[np.uint32] | None


class VmMemory:
    """A VM's memory in an image, decrypted; a context manager.

    Args:
        image: where it is.
        vm: whose.
        keys: what decrypts it.

    Raises:
        DumpError: the sidecar does not say where the guest has its memory.
    """

    def __init__(self, image: DumpImage, vm: VmRecord, keys: Keys) -> None:
        if image.sidecar is None:
            raise DumpError(f"{image.path}: nothing says how it is to be read")
        self.vm = vm
        self.segments = _segments(image, vm)
        self._image = image
        self._keys = keys
        self._first_page = vm.base // PAGE_BYTES
        self._domains = self._domains_of(image)
        self._macs = _MacArea(image) if image.sidecar.integrity is not None else None
        described = {keyid: image.key(keyid) for keyid in np.unique(self._domains).tolist()}
        self._with_macs = {
            keyid
            for keyid, key in described.items()
            if key is not None and key.algorithm is not None and key.algorithm.has_integrity
        }
        self.bad_lines = 0
        self.first_bad: int | None = None

    def __enter__(self) -> VmMemory:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._macs is not None:
            self._macs.close()

    def check_unchanged(self) -> None:
        """As `DumpImage.check_unchanged`."""
        self._image.check_unchanged()
        if self._macs is not None:
            self._macs.check_unchanged()

    def check_keys(self, *, skip_missing: bool, force: bool) -> tuple[SkippedKeyId, ...]:
        """Look whether there is a key for all that is encrypted, and whether it fits.

        Args:
            skip_missing: leave memory out whose key there is not.
            force: do not look whether keys fit.

        Returns:
            What is left out.

        Raises:
            WrongKeyError: a key does not fit.
            DumpError: there is none.
        """
        skipped = []
        for keyid in np.unique(self._domains).tolist():
            if keyid == _PLAINTEXT:
                continue
            if keyid not in self._keys:
                size_bytes = self._written_bytes(keyid)
                if size_bytes:
                    skipped.append(SkippedKeyId(keyid, size_bytes))
            elif not force:
                self._check_fits(keyid)
        if skipped and not skip_missing:
            one = skipped[0]
            raise DumpError(
                f"{self.vm.name} has {one.size_bytes >> 10} KiB under KeyID {one.keyid}, for which"
                " there is no key",
                hint=f"--key-file {one.keyid}=FILE, or --skip-missing to have zeros there",
            )
        return tuple(skipped)

    def read(self, guest_physical: int, size_bytes: int) -> bytes:
        """Memory at a guest-physical address, or less of it if the guest has no more there."""
        for one in self.segments:
            offset = guest_physical - one.guest_physical
            if 0 <= offset < one.size_bytes:
                size_bytes = min(size_bytes, one.size_bytes - offset)
                base = self.vm.base + one.ram_offset + offset
                first = base - base % PAGE_BYTES
                end = base + size_bytes
                whole = _Piece(first, end + -end % PAGE_BYTES - first, 0, guest_physical)
                read = self.fetch(whole)
                self._decrypt(read)
                return read.data[base - first :][:size_bytes].tobytes()
        return b""

    def pieces(self, offsets: Sequence[int]) -> Iterator[_Piece]:
        """Where the image holds anything of it.

        Args:
            offsets: where each segment goes in the output.
        """
        ranges = self._image.data_ranges()
        for one, offset in zip(self.segments, offsets, strict=True):
            low = self.vm.base + one.ram_offset
            high = low + one.size_bytes
            for region in ranges:
                start, stop = max(low, region.base), min(high, region.end)
                for base in range(start, stop, PIECE_BYTES):
                    size_bytes = min(PIECE_BYTES, stop - base)
                    moved = base - low
                    yield _Piece(base, size_bytes, offset + moved, one.guest_physical + moved)

    def fetch(self, piece: _Piece, buffer: NDArray[np.uint8] | None = None) -> _Read:
        """Read a piece, into a buffer if there is one for it."""
        if buffer is None:
            buffer = np.empty(PIECE_BYTES, np.uint8)
        data = buffer[: piece.size_bytes]
        self._image.read_into(piece.base, data)
        entries = None
        if self._macs is not None:
            entries = self._macs.read(piece.base, piece.size_bytes)
        return _Read(piece, data, buffer, entries)

    def decrypt(self, read: _Read) -> NDArray[np.uint8]:
        """Decrypt a piece, in place, and count its bad lines."""
        for address, bad in self._decrypt(read):
            self.bad_lines += int(np.count_nonzero(bad))
            if self.first_bad is None:
                self.first_bad = address + int(bad.argmax()) * LINE_BYTES
        return read.data

    # --- inside -------------------------------------------------------------------------------

    def _decrypt(self, read: _Read) -> list[tuple[int, NDArray[np.bool_]]]:
        """Decrypt a piece, in place; gives what has bad lines: address, and which are."""
        base, data = read.piece.base, read.data
        found = []
        first = base // PAGE_BYTES - self._first_page
        domains = self._domains[first : first + len(data) // PAGE_BYTES]
        for start, stop in runs_of_equal(domains):
            keyid = int(domains[start])
            part = data[start * PAGE_BYTES : stop * PAGE_BYTES]
            if keyid == _PLAINTEXT:
                continue
            if keyid not in self._keys:  # `check_keys`: it is to be left out, or zeros
                part[:] = 0
                continue
            entries = None
            if read.entries is not None and keyid in self._with_macs:
                entries = read.entries[start * LINES_PER_PAGE : stop * LINES_PER_PAGE]
            address = base + start * PAGE_BYTES
            bad = self._keys.decrypt(keyid, address, part, entries)
            if bad is not None and bad.any():
                found.append((address, bad))
        return found

    def _domains_of(self, image: DumpImage) -> NDArray[np.int32]:
        """Whose key each page of the VM is under, or `_PLAINTEXT`; int32, shape (pages,)."""
        pages = slice(self._first_page, self._first_page + self.vm.size_bytes // PAGE_BYTES)
        domains = image.keyids()[pages].astype(np.int32)
        for keyid in np.unique(domains).tolist():
            key = image.key(keyid)
            if key is None or key.algorithm is None:
                domains[domains == keyid] = _PLAINTEXT
            elif keyid != key.keyid:  # it is as KeyID 0
                domains[domains == keyid] = key.keyid
        exclusion = None if image.sidecar is None else image.sidecar.exclusion
        if exclusion is not None:
            addresses = np.arange(pages.start, pages.stop, dtype=np.uint64) * PAGE_BYTES
            excluded = addresses & exclusion.mask == exclusion.base & exclusion.mask
            domains[(domains == 0) & excluded] = _PLAINTEXT
        return domains

    def _pages_with_data(self, keyid: int) -> NDArray[np.int64]:
        """Pages of one KeyID that the image has something for, in DRAM."""
        chosen = np.zeros(len(self._domains), np.bool_)
        for region in self._image.data_ranges():
            low = max(0, region.base // PAGE_BYTES - self._first_page)
            high = max(0, region.end // PAGE_BYTES - self._first_page)
            chosen[low:high] = True
        return np.flatnonzero(chosen & (self._domains == keyid)) + self._first_page

    def _written_bytes(self, keyid: int) -> int:
        """How much of one KeyID's memory is other than zeros, whole pages."""
        pages = self._pages_with_data(keyid)
        written = 0
        for start, stop in runs_of_consecutive(pages):
            for at in range(start, stop, PIECE_BYTES // PAGE_BYTES):
                count = min(PIECE_BYTES // PAGE_BYTES, stop - at)
                data = self._image.read(int(pages[at]) * PAGE_BYTES, count * PAGE_BYTES)
                written += int(np.count_nonzero(_as_pages(data).any(axis=1)))
        return written * PAGE_BYTES

    def _check_fits(self, keyid: int) -> None:
        """See the module's docstring."""
        pages = self._pages_with_data(keyid)
        if len(pages) > SAMPLE_PAGES:
            pages = pages[np.linspace(0, len(pages) - 1, SAMPLE_PAGES).astype(np.int64)]
        lines = good = 0
        for page in pages.tolist():
            piece = _Piece(page * PAGE_BYTES, PAGE_BYTES, 0, 0)
            read = self.fetch(piece)
            written = read.data.view(np.uint64).reshape(LINES_PER_PAGE, -1).any(axis=1)
            if not written.any():
                continue
            lines += int(np.count_nonzero(written))
            has_macs = keyid in self._with_macs and read.entries is not None
            bad = self._keys.decrypt(
                keyid, piece.base, read.data, read.entries if has_macs else None
            )
            if bad is not None:
                good += int(np.count_nonzero(written & ~bad))
                continue
            blocks = read.data.view(np.uint64).reshape(LINES_PER_PAGE, 4, 2)[written]
            if (blocks[:, 1:] == blocks[:, :-1]).all(axis=2).any():
                return
        if lines and good <= lines * _FIT_SHARE:
            what = (
                "of its lines' MACs hardly any matches"
                if keyid in self._with_macs
                else f"what it makes of {lines:,} lines looks like noise to the last"
            )
            raise WrongKeyError(
                f"the key does not fit KeyID {keyid} of {self._image.path}: {what}",
                hint="give the key that it was written with; --force goes on all the same",
            )


class _MacArea:
    """The MACs beside an image and beside the NVDIMMs in it."""

    def __init__(self, image: DumpImage) -> None:
        self._size_bytes = image.size_bytes
        with ExitStack() as stack:
            self._whole = stack.enter_context(DumpImage.open_raw(mac_path(image.path)))
            self._modules = [
                (region, stack.enter_context(DumpImage.open_raw(mac_path(path))))
                for region, path in image.module_files()
                if mac_path(path).exists()
            ]
            self._stack = stack.pop_all()
        if self._whole.size_bytes * MAC_BYTES_OF != image.size_bytes:
            self.close()
            raise DumpError(
                f"{self._whole.path}: {self._whole.size_bytes} bytes are not the MACs of"
                f" {image.size_bytes} bytes of DRAM"
            )

    def read(self, base: int, size_bytes: int) -> NDArray[np.uint32]:
        """Entries of whole pages."""
        entries = self._whole.read(base // MAC_BYTES_OF, size_bytes // MAC_BYTES_OF)
        for region, macs in self._modules:
            low, high = max(base, region.base), min(base + size_bytes, region.end)
            if low < high:
                part = slice((low - base) // MAC_BYTES_OF, (high - base) // MAC_BYTES_OF)
                offset = (low - region.base) // MAC_BYTES_OF
                entries[part] = macs.read(offset, (high - low) // MAC_BYTES_OF)
        return entries.view(np.uint32)

    def check_unchanged(self) -> None:
        for one in (self._whole, *(macs for _, macs in self._modules)):
            one.check_unchanged()

    def close(self) -> None:
        self._stack.close()


def decrypt(
    memory: VmMemory,
    out: Path,
    kind: Format,
    *,
    image: Path,
    skip_missing: bool = False,
    force: bool = False,
) -> DecryptReport:
    """Write a VM's memory to a file.

    Args:
        memory: whose.
        out: the file, which must not exist yet.
        kind: its format.
        image: what the report calls the image.
        skip_missing: have zeros for memory whose key is not there.
        force: go on if a key does not fit, or lines do not match their MACs.

    Raises:
        WrongKeyError: a key does not fit.
        DumpError: a key is not there; lines do not match their MACs; the image cannot be read, or
            changed meanwhile.
        OutputError: the file is there already, or cannot be written. Nothing is left of it.
    """
    started = time.monotonic()
    places = layout(kind, memory.segments)
    notes = _Notes(memory)
    written_bytes = 0
    with NewFile(out, places.size_bytes) as new:
        skipped = memory.check_keys(skip_missing=skip_missing, force=force)
        # Closed before the file is: there may be writes to it under way.
        with closing(_stream(memory, new, places.offsets)) as stream:
            for read, pages in stream:
                written_bytes += pages * PAGE_BYTES
                if kind is Format.ELF:
                    notes.look_in(read)
        if memory.bad_lines and not force:
            raise DumpError(
                f"{memory.bad_lines:,} lines of {memory.vm.name} do not match their MACs, the first"
                f" at {memory.first_bad:#x} of DRAM: somebody changed it",
                hint="--force has them as they decrypt",
            )
        places = layout(kind, memory.segments, b"" if notes.found is None else notes.found[0])
        for offset, header in places.headers:
            new.write(offset, header)
        memory.check_unchanged()
        new.publish()
    return DecryptReport(
        schema="mktme.dump-decrypt",
        version=1,
        image=spelled(image),
        vm=memory.vm.name,
        out=str(out),
        format=kind,
        size_bytes=sum(one.size_bytes for one in memory.segments),
        written_bytes=written_bytes,
        skipped=skipped,
        bad_lines=memory.bad_lines,
        kernel=None if notes.found is None else notes.found[1],
        duration_s=time.monotonic() - started,
    )


class _Notes:
    """VMCOREINFO notes in a guest's memory, which can hold as many as the guest likes.

    Attributes:
        found: the last of the kernel that is there, after a kexec; else the last; with its release.
    """

    def __init__(self, memory: VmMemory) -> None:
        self._memory = memory
        self._left = NOTES_MAX
        self._of_running = False
        self.found: tuple[bytes, str] | None = None

    def look_in(self, read: _Read) -> None:
        """Look for notes that begin in a piece, which is decrypted."""
        for page in vmcoreinfo_pages(_as_pages(read.data))[: self._left]:
            self._left -= 1
            at = read.piece.guest_physical + page * PAGE_BYTES
            note = parse_vmcoreinfo(self._memory.read(at, VMCOREINFO_MAX_BYTES))
            if note is None:
                continue
            of_running = describes_running_kernel(note[0], self._memory.read)
            if of_running or not self._of_running:
                self.found, self._of_running = note, of_running


def _stream(
    memory: VmMemory, new: NewFile, offsets: Sequence[int]
) -> Generator[tuple[_Read, int], None, None]:
    """Read, decrypt, write; gives each piece, decrypted, and how many of its pages hold anything.

    A thread writes what is decrypted, and reads what comes next in its place: to both, the kernel
    takes about as long as AES to decrypt it, most of that for new pages of a file. Kernel and AES
    leave Python's global lock to the other. Memory is used again, for the kernel takes longer to
    give a process new memory than to fill it.
    """
    pieces = memory.pieces(offsets)
    with ThreadPoolExecutor(1) as other:
        turns: deque[Future[_Read | None]] = deque()
        try:
            for piece in islice(pieces, _PIECES_AT_ONCE):
                turns.append(other.submit(memory.fetch, piece))
            while turns:
                read = turns.popleft().result()
                if read is None:
                    continue
                data = memory.decrypt(read)
                written = np.flatnonzero(_as_pages(data).any(axis=1))
                yield read, len(written)
                turns.append(other.submit(_turn, memory, new, read, written, next(pieces, None)))
        finally:
            other.shutdown(cancel_futures=True)


def _turn(
    memory: VmMemory, new: NewFile, read: _Read, written: NDArray[np.int64], piece: _Piece | None
) -> _Read | None:
    """Write a piece's pages that hold anything, the others are holes; and read the next piece."""
    for start, stop in runs_of_consecutive(written):
        low, high = int(written[start]) * PAGE_BYTES, (int(written[stop - 1]) + 1) * PAGE_BYTES
        new.write(read.piece.offset + low, read.data[low:high].data)
    return None if piece is None else memory.fetch(piece, read.buffer)


def _as_pages(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return data.view(np.uint64).reshape(-1, PAGE_BYTES // 8)


def _segments(image: DumpImage, vm: VmRecord) -> tuple[GuestSegment, ...]:
    """A VM's segments by guest-physical address.

    Raises:
        DumpError: there are none, or they are no whole pages, or overlap, or are not its memory.
    """
    if not vm.segments:
        raise DumpError(
            f"{image.path}: its sidecar does not say where {vm.name} has its memory: its QEMU was"
            " not there",
            hint="capture it while it runs",
        )
    segments = tuple(sorted(vm.segments, key=lambda one: one.guest_physical))
    end = 0
    for one in segments:
        numbers = (one.guest_physical, one.ram_offset, one.size_bytes)
        if (
            any(number % PAGE_BYTES for number in numbers)
            or not one.size_bytes
            or one.guest_physical < end
            or one.ram_offset + one.size_bytes > vm.size_bytes
            or one.guest_physical + one.size_bytes > _PHYSICAL_BYTES
        ):
            raise DumpError(
                f"{image.path}: its sidecar is inconsistent: {vm.name} has no memory of"
                f" {one.size_bytes} bytes at {one.guest_physical:#x}"
            )
        end = one.guest_physical + one.size_bytes
    return segments
