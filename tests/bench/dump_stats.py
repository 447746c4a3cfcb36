# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast an image is looked at: `mktme dump stats`, `map` and `diff`, bytes a second a core.

::

    python tests/bench/dump_stats.py [--mib 1024] [--rounds 3] [--threads 1 2]

The image is ciphertext (random bytes are as good) or text, and in the page cache. What counts is
CPU time: bytes by seconds that all threads spent, so that another load does not show. Beside it are
that of the first round, in which Numba may have to compile something, and the wall clock's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from mktme.dump.cluster import Source, Workers
from mktme.dump.diff import dump_diff
from mktme.dump.pictures import Request, make_picture
from mktme.dump.stats import dump_stats

STATS_TARGET_GB_PER_S: Final = 0.5
_CHUNK_BYTES: Final = 16 << 20


def make_image(path: Path, size_bytes: int, *, text: bool) -> None:
    """Fill a file with random bytes, or with ones of a small alphabet."""
    rng = np.random.default_rng(1)
    letters = np.frombuffer(b"etaoin shrdlu\n\0\0\0", np.uint8)
    with path.open("wb") as file:
        for _ in range(0, size_bytes, _CHUNK_BYTES):
            if text:
                file.write(letters[rng.integers(0, len(letters), _CHUNK_BYTES)].tobytes())
            else:
                file.write(rng.bytes(_CHUNK_BYTES))


def measure(name: str, size_bytes: int, rounds: int, work: Callable[[], object]) -> float:
    """Print the medians, and return GB a second of CPU time."""
    wall, cpu = [], []
    for _ in range(rounds):
        started, spent = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - spent)
    per_core = size_bytes / statistics.median(cpu) / 1e9
    elapsed = size_bytes / statistics.median(wall) / 1e9
    first = size_bytes / cpu[0] / 1e9
    print(
        f"{name:28} {per_core:6.2f} GB/s a core {first:6.2f} the first time"
        f" {elapsed:6.2f} GB/s elapsed",
        flush=True,
    )
    return per_core


def main() -> int:
    """Parse the command line and measure; 1 if stats of ciphertext is below its target."""
    parser = argparse.ArgumentParser(description="Time the analysis of DRAM images.")
    parser.add_argument("--mib", type=int, default=1024, help="size of the image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    arguments = parser.parse_args()
    size_bytes = arguments.mib << 20
    with tempfile.TemporaryDirectory() as directory:
        cipher, text = Path(directory, "cipher"), Path(directory, "text")
        make_image(cipher, size_bytes, text=False)
        make_image(text, size_bytes, text=True)
        a, b = Source(cipher, raw=True), Source(text, raw=True)
        found = 0.0
        for threads in sorted(set(arguments.threads)):
            workers = Workers(threads=threads)
            works: dict[str, Callable[[], object]] = {
                "stats of ciphertext": partial(dump_stats, a, workers),
                "stats of text": partial(dump_stats, b, workers),
                "map": partial(make_picture, Request(a), workers),
                "diff": partial(dump_diff, a, b, None, workers),
            }
            for name, work in works.items():
                rate = measure(f"{name}, {threads} thr.", size_bytes, arguments.rounds, work)
                if name == "stats of ciphertext":
                    found = max(found, rate)
    return 0 if found >= STATS_TARGET_GB_PER_S else 1


if __name__ == "__main__":
    sys.exit(main())
