# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast `mktme dump search` is: the figures of docs/adr/0015-hyperscan.md.

::

    python tests/bench/dump_search.py [--mib 512] [--rounds 3] [--memory FILE ...]
    python tests/bench/dump_search.py --sparse

The first searches files of random bytes and of mostly zeros, and whatever memory is named, with
one thread, and prints GB/s of it (of processor time; the file is in the page cache); beside it
what Python's `bytes.find` and `re` do. The second searches 64 GiB of which 2 GiB were written,
and prints the most memory that took.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from mktme.dump.image import CHUNK_BYTES, DumpImage
from mktme.dump.patterns import Pattern, Searcher
from mktme.dump.search import search

MIB: Final = 1 << 20
PAGE: Final = 4096
SEARCHERS: Final = {
    "read only": None,
    "text, 8 bytes": Searcher([Pattern.text("p@ssw0rd")]),
    "bytes 00 00 00 01 80": Searcher([Pattern.hexadecimal("00 00 00 01 80")]),
    "16 blocks of 16 bytes": Searcher(
        [Pattern.hexadecimal(np.random.default_rng(at).bytes(16).hex()) for at in range(16)]
    ),
    r"regex pass(word|wd)=\w+": Searcher([Pattern.regex(r"pass(word|wd)=\w+")]),
    r"regex [a-z0-9._]+@[a-z]+\.com": Searcher([Pattern.regex(r"[a-z0-9._]+@[a-z]+\.com")]),
    r"regex [0-9a-f]{32}": Searcher([Pattern.regex("[0-9a-f]{32}")]),
    "AES keys": Searcher([], aes_keys=True),
    "AES keys, 3 errors": Searcher([], aes_keys=True, max_errors=3),
    "AES keys, 12 errors": Searcher([], aes_keys=True, max_errors=12),
}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description="Time the search of images.")
    parser.add_argument("--mib", type=int, default=512, help="of each file")
    parser.add_argument("--rounds", type=int, default=3, help="each figure is their median")
    parser.add_argument("--memory", type=Path, nargs="*", default=[], help="real memory, as files")
    parser.add_argument("--sparse", action="store_true", help="64 GiB: how much memory it takes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if arguments.sparse:
            sparse(Path(directory) / "sparse")
            return
        files = {}
        for name, make in (("random", random_chunk), ("mostly zeros", mostly_zeros)):
            files[name] = Path(directory) / name
            with files[name].open("wb") as file:
                for seed in range(max(1, arguments.mib * MIB // CHUNK_BYTES)):
                    file.write(make(seed))
        files |= {one.name: one for one in arguments.memory}
        compare(files, arguments.rounds)


def compare(files: dict[str, Path], rounds: int) -> None:
    """Print a table: a row for each search, a column for each file."""
    print(f"| GB/s | {' | '.join(files)} |\n| --- |{' ---: |' * len(files)}")

    def row(name: str, measure: Callable[[Path], None]) -> None:
        cells = [f"{speed(path, measure, rounds):.2f}" for path in files.values()]
        escaped = name.replace("|", r"\|")
        print(f"| {escaped} | {' | '.join(cells)} |", flush=True)

    for name, searcher in SEARCHERS.items():
        row(name, lambda path, searcher=searcher: search_once(path, searcher))  # type: ignore[misc]
    for name, find in PYTHON.items():
        row(f"Python: {name}", lambda path, find=find: find_once(path, find))  # type: ignore[misc]


def search_once(path: Path, searcher: Searcher | None) -> None:
    """Search a file with one thread, or read it."""
    with DumpImage.open_raw(path) as image:
        if searcher is None:
            for chunk in image.chunks():
                assert len(chunk.data)
        else:
            search(image, searcher, jobs=1)


def _count(expression: bytes) -> Callable[[bytes], int]:
    compiled = re.compile(expression)
    return lambda data: sum(1 for _ in compiled.finditer(data))


PYTHON: Final[dict[str, Callable[[bytes], int]]] = {
    "find, 8 bytes": lambda data: data.find(b"p@ssw0rd"),
    "find, 00 00 00 01 80": lambda data: data.find(b"\0\0\0\1\x80"),
    r"re, pass(word|wd)=\w+": _count(rb"pass(word|wd)=\w+"),
    r"re, [a-z0-9._]+@[a-z]+\.com": _count(rb"[a-z0-9._]+@[a-z]+\.com"),
    r"re, [0-9a-f]{32}": _count(rb"[0-9a-f]{32}"),
}


def find_once(path: Path, find: Callable[[bytes], int]) -> None:
    """Search a file with Python's own means, in the same pieces."""
    with DumpImage.open_raw(path) as image:
        for chunk in image.chunks():
            find(chunk.data.tobytes())


def speed(path: Path, measure: Callable[[Path], None], rounds: int) -> float:
    """GB/s of processor time."""
    spent = []
    for _round in range(rounds):
        started = time.process_time()
        measure(path)
        spent.append(time.process_time() - started)
    return path.stat().st_size / statistics.median(spent) / 1e9


def random_chunk(seed: int) -> bytes:
    """What ciphertext looks like."""
    return np.random.default_rng(seed).bytes(CHUNK_BYTES)


def mostly_zeros(seed: int) -> bytes:
    """Nine pages in ten are zeros but for a word, the others small numbers."""
    random = np.random.default_rng(seed)
    words = np.zeros((CHUNK_BYTES // PAGE, PAGE // 4), np.uint32)
    words[:, 17] = random.integers(0, 1 << 32, len(words), np.uint32)
    few = random.choice(len(words), len(words) // 10, replace=False)
    words[few] = random.integers(0, 16, (len(few), PAGE // 4), np.uint32)
    return words.tobytes()


def sparse(path: Path) -> None:
    """Search 64 GiB, 2 of them written in pieces of 1 to 64 pages, by the command itself."""
    random = np.random.default_rng(1)
    written = 0
    with path.open("wb") as file:
        os.truncate(file.fileno(), 64 << 30)
        while written < 2 << 30:
            size = int(random.integers(1, 65)) * PAGE
            at = int(random.integers(0, (64 << 30) // PAGE - 64)) * PAGE
            written += os.pwrite(file.fileno(), random.bytes(size), at)
    command = [sys.executable, "-m", "mktme.cli", "dump", "search", str(path)]
    options = ["--raw", "--text", "p@ssw0rd", "--regex", r"pass(word|wd)=\w+", "--aes-keys"]
    started = time.monotonic()
    code = subprocess.run([*command, *options], check=False).returncode
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"exit {code}: {time.monotonic() - started:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} s"
        f" of processor time, {usage.ru_maxrss / 1024:.0f} MiB at most"
    )


if __name__ == "__main__":
    main()
