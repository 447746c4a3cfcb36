# SPDX-License-Identifier: GPL-2.0-or-later
"""Custody: a known key is nowhere but in the engine.

Whoever finds a key in another process, a file or what crossed a socket need not break a cipher.
So this looks there for all of `mktme.proof.key_patterns`. It does not see a form that is not
among them (a bitsliced key schedule, base64), registers, and memory that the kernel shows to
nobody (memfd_secret(2)); that is counted.

The searcher holds the keys, and copies of what it searched; it must be none of the processes that
are searched.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mktme.engine.errors import MktmeError
from mktme.engine.xts import PAGE_BYTES
from mktme.proof.key_patterns import Buffer, KeyPatterns

_CHUNK_BYTES: Final = 4 << 20


class KeySearchError(MktmeError):
    """A process or file cannot be searched."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Part of a key, found where it should not be. Never the bytes.

    Attributes:
        pattern: which key and what of it, such as "vm one: data key, round key 3, bytes 0-7".
        where: the file, or the process and which of its mappings.
        offset: bytes from the start of the file or data; the address in a process.
    """

    pattern: str
    where: str
    offset: int


@dataclass(frozen=True, slots=True)
class KeySearch:
    """What a search found.

    Attributes:
        bytes_searched: how much was looked at; holes, which read as zeros, are not.
        hits: what was found.
        unreadable: mappings of which something could not be read, and how many bytes of each.
    """

    bytes_searched: int
    hits: tuple[Hit, ...]
    unreadable: tuple[tuple[str, int], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there was something to search and no key in it."""
        return self.bytes_searched > 0 and not self.hits


# --- searches ---------------------------------------------------------------------------------


def search_chunks(
    chunks: Iterable[tuple[int, Buffer]], patterns: KeyPatterns, where: str
) -> KeySearch:
    """Look for keys in a stream.

    Args:
        chunks: offset and bytes, ascending. Chunks that adjoin are searched across their border;
            one is not looked at any more when the next is asked for.
        patterns: what to look for.
        where: what to call it in hits.
    """
    overlap = patterns.longest_bytes - 1
    hits: list[Hit] = []
    searched = end = 0
    before = b""  # the last bytes before `end`
    for offset, chunk in chunks:
        data = memoryview(chunk).cast("B")
        if offset != end:
            before = b""
        # What begins in what came before and ends in this chunk.
        border = before + data[:overlap]
        hits += (
            Hit(name, where, offset - len(before) + at)
            for name, at, behind in (patterns.find(border) if before else ())
            if at < len(before) < behind
        )
        hits += (Hit(name, where, offset + at) for name, at, _ in patterns.find(data))
        searched += len(data)
        end = offset + len(data)
        before = (before + data[-overlap:])[-overlap:]
    return KeySearch(searched, tuple(hits))


def search_bytes(data: Buffer, patterns: KeyPatterns, where: str) -> KeySearch:
    """Look for keys in some data; see `search_chunks`."""
    return search_chunks([(0, data)], patterns, where)


def search_file(path: Path, patterns: KeyPatterns) -> KeySearch:
    """Look for keys in a regular file; its holes are passed over.

    Raises:
        KeySearchError: it cannot be read, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise KeySearchError(f"{path}: not a regular file")
            chunks = _file_chunks(descriptor, 0, status.st_size)
            return search_chunks(chunks, patterns, str(path))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KeySearchError(f"{path}: {error.strerror}") from error


def _file_chunks(descriptor: int, start: int, end: int) -> Iterator[tuple[int, memoryview]]:
    """What a file holds from `start` up to `end`, without its holes (lseek(2), SEEK_DATA)."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(1, end - start))))
    while start < end:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole from here on
                return
            raise
        stop = min(os.lseek(descriptor, start, os.SEEK_HOLE), end)
        while start < stop:
            count = os.preadv(descriptor, [buffer[: stop - start]], start)
            if count == 0:  # it was cut short meanwhile
                return
            yield start, buffer[:count]
            start += count


# --- processes --------------------------------------------------------------------------------

_MAPPING: Final = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<access>...)(?P<sharing>.)"
    r" (?P<offset>[0-9a-f]+) \S+ (?P<inode>\d+) *(?P<name>.*)"
)
# The kernel's own pages, which it lets nobody read through another process.
_KERNELS: Final = ("[vvar]", "[vvar_vclock]", "[vsyscall]")
# Documentation/admin-guide/mm/pagemap.rst: present, and swapped
_PAGE_HELD: Final = np.uint64(3 << 62)
_PAGEMAP_PAGES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class _Mapping:
    """A line of ``/proc/PID/maps``.

    Attributes:
        shared: whether it shows memory or a file itself, not a private copy.
        of_file: whether a private one shows a file where it was not written to.
        offset: in the file.
    """

    start: int
    end: int
    shared: bool
    of_file: bool
    offset: int
    name: str


def search_memory(pid: int, patterns: KeyPatterns) -> KeySearch:
    """Look for keys in all memory of a process, whatever its protection.

    Pages that do not exist are passed over and stay that way, where to read one would make it.
    (But without CAP_CHECKPOINT_RESTORE there is no telling which pages of shared memory exist.)
    A process that runs can move a key past the search: stop it, or have it wait for something.

    Args:
        pid: another process than this one.
        patterns: what to look for.

    Raises:
        ValueError: it is this process, which holds the keys.
        KeySearchError: it may not be looked into, or ended.
    """
    if pid == os.getpid():
        raise ValueError("the searcher itself holds the keys")
    process = Path(f"/proc/{pid}")
    searched = 0
    hits: list[Hit] = []
    unreadable: list[tuple[str, int]] = []
    try:
        command = (process / "comm").read_text().strip()
        mappings = _mappings((process / "maps").read_text())
        memory = os.open(process / "mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for mapping in mappings:
                where = f"{command} ({pid}) {mapping.name}"
                lost: list[int] = []
                found = search_chunks(
                    _mapping_chunks(process, memory, mapping, lost), patterns, where
                )
                searched += found.bytes_searched
                hits += found.hits
                if lost:
                    unreadable.append((where, sum(lost)))
        finally:
            os.close(memory)
    except OSError as error:
        raise KeySearchError(
            f"process {pid}: {error.strerror}",
            hint="only root can look into every process" if error.errno == errno.EACCES else None,
        ) from error
    return KeySearch(searched, tuple(hits), tuple(unreadable))


def _mappings(text: str) -> list[_Mapping]:
    return [
        _Mapping(
            start=int(match["start"], 16),
            end=int(match["end"], 16),
            shared=match["sharing"] == "s",
            # Without any access it shows nothing, and may reach far behind the file's end.
            of_file=match["inode"] != "0" and match["access"] != "---",
            offset=int(match["offset"], 16),
            name=match["name"] or "[anonymous]",
        )
        for match in map(_MAPPING.fullmatch, text.splitlines())
        if match is not None and match["name"] not in _KERNELS
    ]


def _mapping_chunks(
    process: Path, memory: int, mapping: _Mapping, lost: list[int]
) -> Iterator[tuple[int, memoryview]]:
    """What a mapping holds, by address; `lost` gets the size of what could not be read."""
    descriptor = _open_mapped_file(process, mapping) if mapping.shared else None
    if descriptor is not None:
        try:
            size = mapping.end - mapping.start
            for offset, chunk in _file_chunks(descriptor, mapping.offset, mapping.offset + size):
                yield mapping.start + offset - mapping.offset, chunk
        finally:
            os.close(descriptor)
    elif mapping.shared or mapping.of_file:
        yield from _memory_chunks(memory, mapping.start, mapping.end, lost)
    else:
        for start, end in _held_ranges(process, mapping):
            yield from _memory_chunks(memory, start, end, lost)


def _open_mapped_file(process: Path, mapping: _Mapping) -> int | None:
    """The file behind a mapping, if it is one with holes that can be told from data."""
    path = process / "map_files" / f"{mapping.start:x}-{mapping.end:x}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None  # a device: opening it may do anything
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.lseek(descriptor, 0, os.SEEK_HOLE)
    except OSError:  # memfd_secret's cannot
        os.close(descriptor)
        return None
    return descriptor


def _held_ranges(process: Path, mapping: _Mapping) -> Iterator[tuple[int, int]]:
    """Address ranges of a private mapping's pages that exist, in memory or in swap."""
    first, last = mapping.start // PAGE_BYTES, mapping.end // PAGE_BYTES
    with (process / "pagemap").open("rb", buffering=0) as pagemap:
        for page in range(first, last, _PAGEMAP_PAGES):
            count = min(_PAGEMAP_PAGES, last - page)
            entries = np.frombuffer(os.pread(pagemap.fileno(), 8 * count, 8 * page), "<u8")
            held = np.zeros(len(entries) + 2, np.int8)
            held[1:-1] = (entries & _PAGE_HELD) != 0
            edges = ((np.flatnonzero(np.diff(held)) + page) * PAGE_BYTES).tolist()
            yield from zip(edges[::2], edges[1::2], strict=True)


def _memory_chunks(
    memory: int, start: int, end: int, lost: list[int]
) -> Iterator[tuple[int, memoryview]]:
    """Memory of a process by address, through ``/proc/PID/mem``."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, end - start)))
    while start < end:
        try:
            count = os.preadv(memory, [buffer[: end - start]], start)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EFAULT):
                raise
            lost.append(PAGE_BYTES)
            start += PAGE_BYTES
            continue
        if count == 0:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        yield start, buffer[:count]
        start += count
