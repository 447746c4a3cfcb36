# SPDX-License-Identifier: GPL-2.0-or-later
"""What it takes to move a guest, with mktme and without: ``python -m tests.bench.migration``.

As root: it starts two libvirtd. The guest has a quarter of its memory filled, and computes
meanwhile. ``--json FILE`` keeps the reports.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from mktme.pytest_plugin import vm_config
from mktme.vm.domain import Domain
from mktme.vm.migration import Migration, MigrationReport
from mktme.vm.platform import Platform, Vm

from ..live.libvirtd import private_libvirtd

MIB: Final = 1 << 20
KINDS: Final = ("plain", "shadow", "inline")


def main() -> None:
    """Move each kind of guest and print what it took, medians by total time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, default=256, help="of the guest, MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with two_platforms(arguments.memory * MIB) as (here, there):
        rounds = [
            [moved(kind, here, there, arguments.memory) for kind in KINDS]
            for _round in range(arguments.rounds)
        ]
    print(f"{'':8}{'total':>9}{'transfer':>10}{'downtime':>10}{'sent':>9}{'passes':>8}")
    medians = []
    for of_kind in zip(*rounds, strict=True):
        one = sorted(of_kind, key=lambda report: report.total_s)[len(of_kind) // 2]
        medians.append(one)
        print(
            f"{one.source:8}{one.total_s:7.2f} s{one.transfer_s:8.2f} s"
            f"{one.downtime_s * 1000:7.0f} ms{one.sent_bytes // MIB:5} MiB{one.iterations:8}"
        )
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.encode(medians))


def moved(kind: str, here: Platform, there: Platform, memory_mib: int) -> MigrationReport:
    """Boot a guest, have it compute, and move it."""
    with launched(kind, here, memory_mib) as vm:
        console = vm.domain.console
        console.run(f"head -c {memory_mib * MIB // 4} /dev/urandom >/tmp/fill", timeout_s=120)
        console.run("(while :; do sha256sum /tmp/fill; done >/dev/null) & echo", timeout_s=20)
        with Migration(vm, here, there) as migration:
            migration.vm.domain.console.run("sha256sum /tmp/fill", timeout_s=120)
            return migration.report


@contextmanager
def launched(kind: str, platform: Platform, memory_mib: int) -> Iterator[Vm]:
    """A guest that has booted, on one of the data paths or on none."""
    memory = f"{memory_mib}M"
    if kind != "plain":
        with platform.launch(vm_config(memory=memory, datapath=kind)) as vm:
            yield vm
        return
    make = functools.partial(Domain, autodestroy=False)
    config = vm_config(memory=memory, track=None)
    with platform.carry(uuid.uuid4(), config, kind, boot=True, make=make) as vm:
        yield vm


@contextmanager
def two_platforms(dram_bytes: int) -> Iterator[tuple[Platform, Platform]]:
    """Two hosts on this machine."""
    directory = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    try:
        with (
            private_libvirtd(directory / "a") as a,
            private_libvirtd(directory / "b") as b,
            Platform(dram_bytes, connect=a.uri) as here,
            Platform(dram_bytes, connect=b.uri) as there,
        ):
            yield here, there
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
