# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast `mktme dump decrypt` is, beside the engine's AES-XTS; it is to be half as fast or more.

::

    python tests/bench/dump_decrypt.py [--mib 512] [--rounds 5] [--directory /dev/shm]
    python tests/bench/dump_decrypt.py --sparse [--directory /var/tmp]

The first decrypts an image that is written all over to each format and prints GB/s of time that
passed, of processor time, and the engine's in memory; medians. A thread of its own reads and
writes, so it takes an idle machine of two cores. The second decrypts 64 GiB of which 2 GiB were
written, and prints the most memory that took.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from mktme.dump.decrypt import VmMemory, decrypt
from mktme.dump.formats import Format
from mktme.dump.image import DumpImage
from mktme.dump.keys import FileKeys
from mktme.engine.dram import Dram
from mktme.engine.keys import KeyDescription, KeyMode
from mktme.engine.line_key import LineKey
from mktme.engine.sidecar import (
    GuestSegment,
    PageRange,
    PlatformRecord,
    Sidecar,
    VmRecord,
    sidecar_path,
    write_sidecar,
)
from mktme.engine.xts import Algorithm, XtsCipher

MIB: Final = 1 << 20
GIB: Final = 1 << 30
BATCH: Final = MIB
KEY: Final = bytes(range(32))
SHARE: Final = 0.5


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description="Time the decryption of images.")
    parser.add_argument("--mib", type=int, default=512, help="of the image")
    parser.add_argument("--rounds", type=int, default=5, help="each figure is their median")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="for the files")
    parser.add_argument("--sparse", action="store_true", help="64 GiB: how much memory it takes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        image = Path(directory, "dram")
        if arguments.sparse:
            make(image, 64 * GIB, every=32)
            run(image, Format.ELF)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"64 GiB, 2 GiB written: {peak / 1024:.0f} MiB of memory at most")
            return
        make(image, arguments.mib * MIB)
        print("| format | GB/s | of processor time | engine's AES-XTS | share |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for kind in Format:
            compare(image, kind, arguments.rounds)


def compare(image: Path, kind: Format, rounds: int) -> None:
    """Print a row."""
    passed, spent, engine = [], [], []
    for _ in range(rounds):
        started = time.process_time()
        passed.append(run(image, kind))
        spent.append(time.process_time() - started)
        engine.append(engine_s())
    size = image.stat().st_size
    rates = [size / statistics.median(times) / 1e9 for times in (passed, spent)]
    ours, reference = rates[0], BATCH * 512 / statistics.median(engine) / 1e9
    met = "met" if ours >= SHARE * reference else "NOT met"
    print(
        f"| {kind.value} | {rates[0]:.2f} | {rates[1]:.2f} | {reference:.2f} |"
        f" {ours / reference:.0%}, {met} |",
        flush=True,
    )


def run(image: Path, kind: Format) -> float:
    """Decrypt all of it: look whether the key fits, read, decrypt, write. Seconds."""
    out = image.with_name("out")
    with (
        DumpImage.open(image) as opened,
        FileKeys({0: LineKey.make(Algorithm.AES_XTS_128, KEY)}) as keys,
        VmMemory(opened, opened.vm("alice"), keys) as memory,
    ):
        report = decrypt(memory, out, kind, image=image)
    out.unlink()
    return report.duration_s


def engine_s() -> float:
    """Seconds in which the engine's AES-XTS decrypts 512 batches, in memory."""
    cipher = XtsCipher(Algorithm.AES_XTS_128, KEY)
    lines = np.arange(BATCH // 8, dtype=np.uint64).reshape(-1, 8)
    addresses = np.arange(0, BATCH, 64, dtype=np.uint64)
    cipher.decrypt_lines(lines, addresses, out=lines)
    started = time.perf_counter()
    for _ in range(512):
        cipher.decrypt_lines(lines, addresses, out=lines)
    return time.perf_counter() - started


def make(path: Path, size_bytes: int, every: int = 1) -> None:
    """An image of one VM's memory, of which one batch of so many was written."""
    cipher = XtsCipher(Algorithm.AES_XTS_128, KEY)
    plain = np.arange(BATCH // 8, dtype=np.uint64).reshape(-1, 8) // 4
    with Dram.create(path, size_bytes) as dram:
        for base in range(0, size_bytes, BATCH * every):
            addresses = np.arange(base, base + BATCH, 64, dtype=np.uint64)
            dram.write(base, cipher.encrypt_lines(plain, addresses).data)
    sidecar = Sidecar(
        platform=PlatformRecord(maxphyaddr=46, keyid_bits=6, dram_bytes=size_bytes),
        keys=(KeyDescription(keyid=0, mode=KeyMode.DIRECT, algorithm=Algorithm.AES_XTS_128),),
        vms=(
            VmRecord(
                uuid=UUID(int=1),
                name="alice",
                base=0,
                size_bytes=size_bytes,
                keyid=0,
                segments=(GuestSegment(guest_physical=0, ram_offset=0, size_bytes=size_bytes),),
            ),
        ),
        pages=(PageRange(base=0, size_bytes=size_bytes, keyid=0),),
    )
    write_sidecar(sidecar_path(path), sidecar)


if __name__ == "__main__":
    main()
