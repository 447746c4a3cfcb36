# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast `mktme dump decrypt` is, beside the engine's AES-XTS; it is to be half as fast or more.

::

    python tests/bench/dump_decrypt.py [--mib 512] [--rounds 5] [--directory /dev/shm]
    python tests/bench/dump_decrypt.py --sparse [--directory /var/tmp]

The first decrypts an image that is written all over to each format and prints GB/s of time that
passed, of the processor time of the busier of its two threads, and of the engine's in memory;
medians. On an idle machine of two cores the first two are about the same; under another load only
the second says anything. The second command decrypts 64 GiB of which 2 GiB were
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
ENGINE_BATCHES: Final = 512


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
        print("| format | GB/s | share | busier thread | share | engine's AES-XTS |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for kind in Format:
            compare(image, kind, arguments.rounds)


def compare(image: Path, kind: Format, rounds: int) -> None:
    """Print a row."""
    passed, busier, engine = [], [], []
    for _ in range(rounds):
        elapsed_s, busier_s = run(image, kind)
        passed.append(elapsed_s)
        busier.append(busier_s)
        engine.append(engine_s())
    reference = BATCH * ENGINE_BATCHES / statistics.median(engine) / 1e9
    rates = [image.stat().st_size / statistics.median(times) / 1e9 for times in (passed, busier)]
    shares = [
        f"{rate:.2f} | {rate / reference:.0%}{'' if rate >= SHARE * reference else ', NOT met'}"
        for rate in rates
    ]
    print(f"| {kind.value} | {' | '.join(shares)} | {reference:.2f} |", flush=True)


def run(image: Path, kind: Format) -> tuple[float, float]:
    """Decrypt all of it: look whether the key fits, read, decrypt, write.

    Returns:
        seconds that passed, and of processor time of the busier thread.
    """
    out = image.with_name("out")
    with (
        DumpImage.open(image) as opened,
        FileKeys({0: LineKey.make(Algorithm.AES_XTS_128, KEY)}) as keys,
        VmMemory(opened, opened.vm("alice"), keys) as memory,
    ):
        all_before, before = time.process_time(), time.thread_time()
        report = decrypt(memory, out, kind, image=image)
        main_s = time.thread_time() - before
        other_s = time.process_time() - all_before - main_s
    out.unlink()
    return report.duration_s, max(main_s, other_s)


def engine_s() -> float:
    """Seconds of processor time in which the engine's AES-XTS decrypts its batches, in memory."""
    cipher = XtsCipher(Algorithm.AES_XTS_128, KEY)
    lines = np.arange(BATCH // 8, dtype=np.uint64).reshape(-1, 8)
    addresses = np.arange(0, BATCH, 64, dtype=np.uint64)
    cipher.decrypt_lines(lines, addresses, out=lines)
    started = time.thread_time()
    for _ in range(ENGINE_BATCHES):
        cipher.decrypt_lines(lines, addresses, out=lines)
    return time.thread_time() - started


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
