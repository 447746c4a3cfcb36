# SPDX-License-Identifier: GPL-2.0-or-later
"""A harness process for `test_custody`: two guests with known keys, which it never holds itself.

``python -m tests.live.custody_guest KEY_FILE_128 KEY_FILE_256``. It answers each line of its
standard input with a line of JSON, after one that it says by itself, and ends with its input.
While it waits for the next one its guests are held.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import msgspec

from mktme.engine.secret import KeyMemory
from mktme.engine.xts import PAGE_BYTES
from mktme.proof.confidentiality import Canary, find_canary
from mktme.pytest_plugin import vm_config
from mktme.service.client import EngineClient
from mktme.vm.config import BOOT_TIMEOUT_S
from mktme.vm.platform import Platform, Vm
from mktme.vm.reaper import process_dir

MEMORY_BYTES = 192 << 20
WORKLOAD = "head -c 8000000 /dev/urandom >/tmp/noise && gzip </tmp/noise | sha256sum"


class Started(msgspec.Struct, frozen=True):
    """First word: an engine runs, and knows of no VM yet.

    Attributes:
        directory: below it is every file that this process makes.
    """

    engine_pid: int
    directory: str


class Guest(msgspec.Struct, frozen=True):
    """A guest.

    Attributes:
        canary_address: where in DRAM its canary page is.
        readable: whether that could be read through each guest's KeyID.
    """

    uuid: UUID
    qemu_pid: int
    canary_address: int
    readable: tuple[bool, ...]


class Worked(msgspec.Struct, frozen=True):
    """Answer to "work": the guests ran a workload and were read through each other's KeyID.

    Attributes:
        canary: a line of their canary pages.
        key_memory: what kind of memory the engine says that it has keys in.
    """

    guests: tuple[Guest, ...]
    canary: bytes
    key_memory: KeyMemory
    dram: str
    sidecar: str


class Planted(msgspec.Struct, frozen=True):
    """Answer to 128 hexadecimal digits: what they say is in the first guest's memory and in ours.

    Attributes:
        read_back: it also came through the engine and its socket.
    """

    read_back: bool


def answer(message: Started | Worked | Planted) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.flush()


def work(platform: Platform, vms: Sequence[Vm]) -> Worked:
    canary = Canary.random()
    for vm in vms:
        canary.plant(vm.domain.console)
        vm.domain.console.run(WORKLOAD, timeout_s=60)
    one, two = vms
    with one.held(), two.held() as engine:
        guests = tuple(describe(engine, vm, vms, canary) for vm in vms)
        key_memory = engine.status().custody.key_memory
        sidecar = engine.write_sidecar()
    return Worked(guests, canary.line, key_memory, str(platform.dram_path), str(sidecar))


def describe(engine: EngineClient, vm: Vm, vms: Sequence[Vm], canary: Canary) -> Guest:
    pid = vm.status().qemu_pid
    assert pid is not None
    offset = find_canary(vm, canary)
    return Guest(
        uuid=vm.uuid,
        qemu_pid=pid,
        canary_address=vm.base + offset,
        readable=tuple(
            engine.read(vm.uuid, offset, PAGE_BYTES, keyid=other.keyid) == canary.page
            for other in vms
        ),
    )


def plant(vm: Vm, key: bytearray) -> Planted:
    canary = Canary(bytes(key))
    canary.plant(vm.domain.console)
    with vm.held() as engine:
        page = engine.read(vm.uuid, find_canary(vm, canary), PAGE_BYTES)
    return Planted(page == canary.page)


def main() -> None:
    small, large = (Path(argument) for argument in sys.argv[1:])
    memory = f"{MEMORY_BYTES >> 20}M"
    with Platform(dram_bytes=2 * MEMORY_BYTES) as platform:
        answer(Started(platform.engine_pid, str(process_dir())))
        if not sys.stdin.readline():
            return
        with (
            platform.launch(vm_config(memory=memory, key_file=small), "small", boot=False) as one,
            platform.launch(
                vm_config(memory=memory, key_file=large, algorithm="aes-xts-256"),
                "large",
                boot=False,
            ) as two,
        ):
            for vm in (one, two):
                vm.domain.resume()
            for vm in (one, two):
                vm.domain.console.wait_ready(BOOT_TIMEOUT_S)
            said: Worked | Planted = work(platform, (one, two))
            kept = []
            while True:
                # An engine at work has round keys in memory, for the moment that OpenSSL needs.
                with one.held(), two.held():
                    answer(said)
                    line = sys.stdin.readline()
                if not line:
                    return
                kept.append(bytearray.fromhex(line))
                said = plant(one, kept[-1])


if __name__ == "__main__":
    main()
