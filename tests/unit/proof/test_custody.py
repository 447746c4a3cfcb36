# SPDX-License-Identifier: GPL-2.0-or-later
"""Searches for keys in streams, files and processes: planted ones are found, no others are."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.proof.custody import (
    Hit,
    KeySearchError,
    search_bytes,
    search_chunks,
    search_file,
    search_memory,
)
from mktme.proof.key_patterns import KeyPatterns

from ..fake_qemu import PAGE

MIB = 1 << 20
_random = random.Random(3)
KEY = _random.randbytes(32)
PATTERNS = KeyPatterns({"known": KEY})
PIECES = [
    f"known: {part} key, bytes {span}" for part in ("data", "tweak") for span in ("0-7", "8-15")
]
HAS_AES = " aes " in Path("/proc/cpuinfo").read_text()


def hits_of_key(where: str, offset: int) -> set[Hit]:
    return {Hit(name, where, offset + 8 * index) for index, name in enumerate(PIECES)}


# --- streams ----------------------------------------------------------------------------------


@given(
    before=st.binary(max_size=100),
    behind=st.binary(max_size=100),
    cuts=st.lists(st.integers(0, 232), max_size=20),
    start=st.integers(0, 1 << 40),
)
def test_key_is_found_once_wherever_the_stream_is_cut(
    before: bytes, behind: bytes, cuts: list[int], start: int
) -> None:
    stream = before + KEY + behind
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [(start + low, stream[low:high]) for low, high in pairwise(borders)]
    found = search_chunks(chunks, PATTERNS, "stream")
    assert found.bytes_searched == len(stream)
    assert len(found.hits) == len(PIECES)
    assert set(found.hits) == hits_of_key("stream", start + len(before))
    assert not found.passed


@pytest.mark.parametrize("cut", range(1, 8))
def test_chunks_with_a_gap_between_them_do_not_adjoin(cut: int) -> None:
    piece = KEY[:8]
    assert search_chunks([(0, piece[:cut]), (cut, piece[cut:])], PATTERNS, "s").hits
    assert not search_chunks([(0, piece[:cut]), (cut + 1, piece[cut:])], PATTERNS, "s").hits


def test_longest_form_is_found_across_a_border() -> None:
    text = f"{KEY!r}".encode()
    whole = set(search_bytes(text, PATTERNS, "text").hits)
    assert len(whole) == 4
    for cut in range(1, len(text)):
        found = search_chunks([(0, text[:cut]), (cut, text[cut:])], PATTERNS, "text")
        assert set(found.hits) == whole


def test_nothing_searched_is_no_pass() -> None:
    assert not search_bytes(b"", PATTERNS, "nothing").passed
    assert search_bytes(b"some", PATTERNS, "some").passed


def test_hits_do_not_show_the_key() -> None:
    found = search_bytes(KEY + KEY.hex().encode(), PATTERNS, "data")
    assert len(found.hits) == 8
    assert search_bytes(repr(found).encode(), PATTERNS, "repr").passed


# --- files ------------------------------------------------------------------------------------


def test_file_is_searched_and_its_holes_are_not(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    offset = 3 * MIB - 5  # both in what was written at once, and across pages
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(offset)
        file.write(KEY)
    found = search_file(path, PATTERNS)
    assert set(found.hits) == hits_of_key(str(path), offset)
    assert 0 < found.bytes_searched < MIB


def test_file_larger_than_a_chunk_is_searched_across_them(tmp_path: Path) -> None:
    path = tmp_path / "large"
    offsets = [chunk * 4 * MIB - 11 for chunk in (1, 2)]
    data = bytearray(random.Random(4).randbytes(9 * MIB))
    path.write_bytes(data)
    assert search_file(path, PATTERNS).passed
    for offset in offsets:
        data[offset : offset + len(KEY)] = KEY
    path.write_bytes(data)
    found = search_file(path, PATTERNS)
    assert found.bytes_searched == len(data)
    assert set(found.hits) == set().union(*(hits_of_key(str(path), one) for one in offsets))


def test_only_regular_files_are_searched(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(KEY)
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("none", "No such file"), ("link", "symbolic"), ("fifo", "regular")):
        with pytest.raises(KeySearchError, match=message):
            search_file(tmp_path / name, PATTERNS)


# --- processes --------------------------------------------------------------------------------

# What every child begins and ends with. It reads the key from a pipe into memory of its own.
CHILD_BEGIN = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
key = bytearray(32)
os.readv(0, [key])
def wipe():
    key[:] = bytes(32)
def address_of(buffer):
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
address = 0
"""
CHILD_END = """
print(address, flush=True)
sys.stdin.read()
"""


@contextmanager
def child(code: str, key: bytes = KEY) -> Iterator[tuple[int, int]]:
    """A process that got the key and ran `code`; yields its id, and the address it set."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD_BEGIN + code + CHILD_END],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write(key)
        process.stdin.flush()
        yield process.pid, int(process.stdout.readline())
        process.stdin.close()
    assert process.returncode == 0


PLACES = {
    "the heap": "address = address_of(key)",
    "a private mapping": """
area = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[(33 << 20) - 3 : (33 << 20) + 29] = key
address = address_of(area) + (33 << 20) - 3
wipe()
""",
    "memory without access": """
area = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[5000:5032] = key
address = address_of(area) + 5000
wipe()
assert libc.mprotect(ctypes.c_void_p(address - 5000), ctypes.c_size_t(1 << 20), 0) == 0
""",
    "a shared anonymous mapping": """
area = mmap.mmap(-1, 64 << 20)
area[(33 << 20) - 3 : (33 << 20) + 29] = key
address = address_of(area) + (33 << 20) - 3
wipe()
""",
    "a memfd, mapped from an offset on": """
descriptor = os.memfd_create("ram")
os.ftruncate(descriptor, 64 << 20)
os.pwrite(descriptor, key, (33 << 20) - 3)
area = mmap.mmap(descriptor, 32 << 20, offset=32 << 20)
address = address_of(area) + (1 << 20) - 3
wipe()
""",
    "a private copy of a file's page": """
descriptor = os.memfd_create("file")
os.ftruncate(descriptor, 1 << 20)
area = mmap.mmap(descriptor, 1 << 20, mmap.MAP_PRIVATE)
area[5000:5032] = key
address = address_of(area) + 5000
wipe()
""",
}


@pytest.mark.parametrize("code", PLACES.values(), ids=PLACES.keys())
def test_key_in_memory_is_found(code: str) -> None:
    with child(code) as (pid, address):
        found = search_memory(pid, PATTERNS)
    assert {address + 8 * index for index in range(4)} == {hit.offset for hit in found.hits}
    assert {hit.pattern for hit in found.hits} == set(PIECES)
    assert all(hit.where.startswith("python") for hit in found.hits)
    assert f"({pid})" in found.hits[0].where
    # It is found in what was planted, and in nothing else that was.
    with child(code, random.Random(5).randbytes(32)) as (pid, _address):
        assert search_memory(pid, PATTERNS).passed


def test_wiped_key_is_not_found() -> None:
    with child("wipe()") as (pid, _address):
        found = search_memory(pid, PATTERNS)
    assert found.passed
    assert found.bytes_searched > MIB
    assert found.unreadable == ()


AES_CODE = {
    "OpenSSL": """
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
half = bytearray(key[:16])
cipher = Cipher(algorithms.AES(half), modes.ECB())
kept = cipher.{what}or()
kept.update(bytes(16))
half[:] = bytes(16)
wipe()
""",
    "portable C": """
from Crypto.Cipher import AES
half = bytearray(key[:16])
kept = AES.new(half, AES.MODE_ECB, use_aesni=False)
kept.{what}(bytes(16))
half[:] = bytes(16)
wipe()
""",
}


@pytest.mark.parametrize("what", ["encrypt", "decrypt"])
@pytest.mark.parametrize("library", ["OpenSSL", "portable C"])
def test_round_keys_of_a_cipher_in_use_are_found(library: str, what: str) -> None:
    """The key itself is wiped; a real AES implementation keeps what it made of it."""
    if library == "OpenSSL" and not HAS_AES:
        pytest.skip("OpenSSL keeps another key schedule on a processor without AES instructions")
    with child(AES_CODE[library].format(what=what)) as (pid, _address):
        found = search_memory(pid, PATTERNS)
    name = "decryption round key" if what == "decrypt" else "round key"
    swapped = ", bytes of 4-byte words reversed" if library == "portable C" else ""
    expected = {
        f"known: data key, {name} {number}{swapped}, bytes {span}"
        for number in range(1, 10)
        for span in ("0-7", "8-15")
    }
    assert expected <= {hit.pattern for hit in found.hits}


def anonymous_bytes(pid: int) -> int:
    """What a process has of memory that is no file's (proc(5), VmRSS's parts)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_search_makes_no_pages() -> None:
    code = """
descriptor = os.memfd_create("ram")
os.ftruncate(descriptor, 64 << 20)
area = mmap.mmap(descriptor, 64 << 20)
area[5 << 20] = 1
private = mmap.mmap(-1, 1 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
private[5 << 20] = 1
address = descriptor
"""
    if os.geteuid() != 0:
        pytest.skip("to tell the holes of another process's shared memory takes root")
    with child(code) as (pid, descriptor):
        memfd = Path(f"/proc/{pid}/fd/{descriptor}")
        before = anonymous_bytes(pid)
        found = search_memory(pid, PATTERNS)
        assert memfd.stat().st_blocks == PAGE // 512
        assert anonymous_bytes(pid) < before + MIB
    assert found.bytes_searched < 64 * MIB


def test_secret_memory_is_reported_as_unreadable() -> None:
    libc = ctypes.CDLL(None)
    descriptor = libc.syscall(447, 0)  # memfd_secret(2)
    if descriptor < 0:
        pytest.skip("this kernel has no memfd_secret")
    os.close(descriptor)
    code = f"""
descriptor = libc.syscall(447, 0)
os.ftruncate(descriptor, {2 * PAGE})
area = mmap.mmap(descriptor, {2 * PAGE})
area[:32] = key
wipe()
"""
    with child(code) as (pid, _address):
        found = search_memory(pid, PATTERNS)
    assert found.passed
    ((where, lost),) = found.unreadable
    assert "secretmem" in where
    assert lost == 2 * PAGE


def test_the_searcher_is_not_searched() -> None:
    with pytest.raises(ValueError, match="searcher"):
        search_memory(os.getpid(), PATTERNS)


def test_process_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(KeySearchError, match="No such file"):
        search_memory(process.pid, PATTERNS)


@pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user takes root to start")
def test_process_that_may_not_be_looked_into() -> None:
    code = """
import os, sys
from mktme.proof.custody import KeySearchError, search_memory
from mktme.proof.key_patterns import KeyPatterns
os.setuid(65534)
try:
    search_memory(os.getppid(), KeyPatterns({"known": os.urandom(32)}))
except KeySearchError as error:
    sys.exit(f"{error}; {error.hint}")
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert "Permission denied; only root" in done.stderr
