# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies of a real engine's DRAM while VMs run, and whoever runs them: here, the test."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import pytest

from mktme.datapath.shadow import Track
from mktme.dump.image import DumpImage
from mktme.dump.info import check_digest
from mktme.engine.dram import Dram, Region, mac_path
from mktme.engine.errors import MktmeError
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.new_file import NewFile
from mktme.engine.package import PowerEvent
from mktme.engine.sidecar import CaptureRecord, sidecar_path
from mktme.engine.snapshot import COPY_PAGES, ContentsDigest
from mktme.engine.sparse_file import SparseFile
from mktme.engine.xts import Algorithm
from mktme.service import captures, wire
from mktme.service.captures import CaptureError, Captures
from mktme.service.client import (
    EngineClient,
    EngineGoneError,
    EngineProcess,
    EngineRefusedError,
    captured,
)
from mktme.service.drains import Drains
from mktme.service.requests import Requests
from mktme.service.server import CONTROL_SOCKET
from mktme.service.vms import Vm

from ..conftest import DRAM_BYTES, Guests, MakeQemu, wait_event
from ..fake_qemu import PAGE, FakeQemu
from .conftest import CUSTODY

DATA = os.urandom(5 * PAGE)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


def ended(client: EngineClient, capture: int) -> CaptureRecord:
    """Wait for a capture's end."""
    event = wait_event(
        client,
        lambda event: (
            isinstance(event, wire.CaptureDone | wire.CaptureFailed) and event.capture == capture
        ),
    )
    assert isinstance(event, wire.CaptureDone | wire.CaptureFailed)
    return captured(event)


def to_be_held(client: EngineClient, capture: int) -> tuple[uuid.UUID, ...]:
    """Wait until VMs are to be held; which."""
    event = wait_event(client, lambda event: isinstance(event, wire.HoldVms))
    assert isinstance(event, wire.HoldVms)
    assert event.capture == capture
    return event.vms


def plaintext(client: EngineClient, path: Path, vm: uuid.UUID) -> bytes:
    """A VM's memory as a copy has it, decrypted by the engine."""
    with DumpImage.open(path) as image:
        record = image.vm(str(vm))
        cipher = image.read(record.base, record.size_bytes).tobytes()
    step = wire.DECRYPT_MAX_BYTES
    return b"".join(
        client.decrypt(record.keyid, record.base + at, cipher[at : at + step]).data
        for at in range(0, len(cipher), step)
    )


def contents(path: Path) -> str:
    digest = ContentsDigest()
    digest.update(0, np.fromfile(path, np.uint8))
    return digest.hexdigest()


def test_copy_is_of_the_moment_when_the_guest_stood_still(guests: Guests, tmp_path: Path) -> None:
    client, path = guests.client, tmp_path / "copy"
    qemu, added = guests.link()
    qemu.dma(PAGE, DATA)  # not in DRAM yet: it takes a flush
    capture = client.start_capture(path)
    assert qemu.vm in to_be_held(client, capture)
    qemu.dma(20 * PAGE, DATA[:PAGE])
    before = qemu.contents()
    client.vms_held(capture)
    assert not path.exists()  # as long as nobody has said for how long they stood still
    qemu.dma(PAGE, bytes(len(DATA)))
    client.flush(qemu.vm)
    client.vms_released(capture, 0.125)
    record = ended(client, capture)
    assert (record.vms, record.pause_s) == (None, 0.125)
    assert record.total_s > 0
    assert record.sha256 == contents(path)
    assert plaintext(client, path, qemu.vm) == before != qemu.contents()
    with DumpImage.open(path) as image:
        assert image.sidecar is not None
        assert image.sidecar.capture == record
        assert (image.size_bytes, image.vm(str(qemu.vm)).base) == (DRAM_BYTES, added.base)
    assert sorted(tmp_path.iterdir()) == [path, sidecar_path(path)]
    assert path.stat().st_blocks * 512 <= record.data_bytes + PAGE


def test_one_vm_alone(guests: Guests, tmp_path: Path) -> None:
    client, path = guests.client, tmp_path / "copy"
    (alice, _), (bob, at) = guests.link(), guests.link()
    for qemu in (alice, bob):
        qemu.dma(PAGE, DATA)
        client.flush(qemu.vm)
    capture = client.start_capture(path, [bob.vm])
    assert to_be_held(client, capture) == (bob.vm,)
    client.vms_held(capture)
    client.vms_released(capture, None)
    record = ended(client, capture)
    assert (record.vms, record.pause_s) == ((bob.vm,), None)
    with DumpImage.open(path) as image:
        assert image.sidecar is not None
        assert [one.uuid for one in image.sidecar.vms] == [bob.vm]
        assert image.data_ranges() == [Region(at.base + PAGE, len(DATA))]
    assert plaintext(client, path, bob.vm) == bob.contents()


def test_vm_that_does_not_run_need_not_be_held(
    engine: EngineProcess, guests: Guests, make_qemu: MakeQemu, tmp_path: Path
) -> None:
    qemu, client = make_qemu(), engine.client
    guests.announce(qemu)
    record = ended(client, client.start_capture(tmp_path / "copy", [qemu.vm]))
    assert record.pause_s is None


def test_macs_are_copied(guests: Guests, tmp_path: Path) -> None:
    client, path = guests.client, tmp_path / "copy"
    qemu, added = guests.link(algorithm=Algorithm.AES_XTS_128_INTEGRITY)
    qemu.dma(PAGE, DATA)
    capture = client.start_capture(path, [qemu.vm])
    to_be_held(client, capture)
    client.vms_held(capture)
    client.vms_released(capture, None)
    record = ended(client, capture)
    assert record.mac_sha256 == contents(mac_path(path))
    with DumpImage.open(path) as image:
        assert image.sidecar is not None
        assert image.sidecar.integrity is not None
        assert image.sidecar.integrity.file == "copy.mac"
    at = added.base + PAGE
    line = bytearray(path.read_bytes()[at : at + 64])
    entry = mac_path(path).read_bytes()[at // 16 : at // 16 + 4]
    good = client.decrypt(added.keyid, at, bytes(line), entry)
    assert (good.data, good.bad) == (DATA[:64], b"\0")
    line[3] ^= 1
    assert client.decrypt(added.keyid, at, bytes(line), entry).bad == b"\1"


def test_guests_that_cannot_be_held(guests: Guests, tmp_path: Path) -> None:
    client = guests.client
    guests.link()
    capture = client.start_capture(tmp_path / "copy")
    to_be_held(client, capture)
    client.vms_held(capture, "alice hangs")
    with pytest.raises(EngineRefusedError, match="alice hangs") as caught:
        ended(client, capture)
    assert caught.value.error == "CaptureError"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EngineRefusedError, match=f"no capture {capture} is under way"):
        client.vms_released(capture, None)


def test_two_at_once(guests: Guests, tmp_path: Path) -> None:
    client = guests.client
    guests.link()
    capture = client.start_capture(tmp_path / "one")
    to_be_held(client, capture)
    with pytest.raises(EngineRefusedError, match=r"being captured to .*/one already") as caught:
        client.start_capture(tmp_path / "two")
    assert caught.value.hint == "wait for its end"
    client.vms_held(capture)
    client.vms_released(capture, None)
    ended(client, capture)
    assert not (tmp_path / "two").exists()


def test_one_that_is_not_wanted_any_more(guests: Guests, tmp_path: Path) -> None:
    client = guests.client
    qemu, _ = guests.link()
    for answer in (False, True):
        capture = client.start_capture(tmp_path / "copy")
        to_be_held(client, capture)
        if answer:
            client.vms_held(capture)
        client.cancel_capture(capture)
        with pytest.raises(EngineRefusedError, match="cancelled"):
            ended(client, capture)
        assert list(tmp_path.iterdir()) == []
    qemu.dma(0, DATA)
    client.flush(qemu.vm)
    assert guests.read(qemu) == qemu.contents()


def test_one_whose_owner_is_gone(
    shared_engine: EngineProcess, make_qemu: MakeQemu, tmp_path: Path
) -> None:
    """It was killed, for instance: its connection ends. Those of others go on."""
    with ExitStack() as stack:
        guests = Guests(shared_engine, make_qemu, stack)
        qemu, _ = guests.link()
        starter, control = guests.client, Path(guests.link_socket).with_name(CONTROL_SOCKET)
        for gone in (True, False):
            other = stack.enter_context(EngineClient.connect(control, wire.Role.OWNER))
            third = stack.enter_context(EngineClient.connect(control, wire.Role.OWNER))
            capture = other.start_capture(tmp_path / "copy")
            assert to_be_held(starter, capture) == (qemu.vm,)
            if gone:
                other.close()
                with pytest.raises(EngineRefusedError, match="cancelled"):
                    ended(starter, capture)
                assert list(tmp_path.iterdir()) == []
            else:
                third.close()
                starter.vms_held(capture)
                starter.vms_released(capture, None)
                ended(other, capture)


def test_one_that_is_cancelled_before_it_begins(tmp_path: Path) -> None:
    events: list[wire.Event] = []

    async def run(dram: Dram) -> None:
        drains = Drains(events.append)
        requests = Requests(dram, PlatformConfig(), CUSTODY, drains, events.append)
        for number in (1, 2):
            assert requests.captures.start(str(tmp_path / "copy"), (), None) == number
            running = requests.captures._running
            assert running is not None
            assert running.task is not None
            requests.captures.cancel(number)
            await asyncio.wait([running.task])
            assert running.taken.done()

    with Dram.create(tmp_path / "dram", PAGE) as dram:
        asyncio.run(run(dram))
    assert events == [
        wire.CaptureFailed(capture=number, error="CaptureError", message="cancelled")
        for number in (1, 2)
    ]


def test_what_uses_descriptors_ends_before_they_are_closed() -> None:
    """However often who waits for it is cancelled."""
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(20)

    async def run() -> None:
        task = asyncio.ensure_future(captures._to_its_end(work))
        await asyncio.to_thread(begun.wait, 20)
        for _ in range(3):
            task.cancel()
            await asyncio.wait([task], timeout=0)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_vms_that_come_and_go_meanwhile(guests: Guests, tmp_path: Path) -> None:
    client = guests.client
    qemu, _ = guests.link()
    capture = client.start_capture(tmp_path / "copy")
    to_be_held(client, capture)
    guests.link()
    client.vms_held(capture)
    with pytest.raises(EngineRefusedError, match="came or went while the others were held"):
        ended(client, capture)
    capture = client.start_capture(tmp_path / "copy", [qemu.vm])
    to_be_held(client, capture)
    client.remove_vm(qemu.vm)
    client.vms_held(capture)
    with pytest.raises(EngineRefusedError, match="is not linked"):
        ended(client, capture)
    with pytest.raises(EngineRefusedError, match=f"no VM {qemu.vm} on this platform"):
        client.start_capture(tmp_path / "copy", [qemu.vm])
    assert list(tmp_path.iterdir()) == []


def test_target_that_exists(engine: EngineProcess, tmp_path: Path) -> None:
    client = engine.client
    path = tmp_path / "copy"
    for taken in (path, sidecar_path(path), mac_path(path)):
        taken.write_text("theirs")
        with pytest.raises(EngineRefusedError, match=f"{taken.name}: exists") as caught:
            ended(client, client.start_capture(path))
        assert caught.value.error == "OutputExistsError"
        assert [one.read_text() for one in tmp_path.iterdir()] == ["theirs"]
        taken.unlink()
    with pytest.raises(EngineRefusedError, match="no file can be made there"):
        ended(client, client.start_capture(tmp_path / "none" / "copy"))
    with pytest.raises(EngineRefusedError, match="absolute path"):
        client._call(wire.StartCapture(path="copy"), wire.CaptureStarted)


@pytest.mark.parametrize("when", ["held", "copying"])
def test_engine_killed_meanwhile_leaves_nothing(
    when: str, tmp_path_factory: pytest.TempPathFactory, make_qemu: MakeQemu, tmp_path: Path
) -> None:
    run_dir = tmp_path_factory.mktemp("engine")
    with EngineProcess(run_dir, run_dir / "dram.img", DRAM_BYTES) as engine:
        qemu, client = make_qemu(), engine.client
        client.add_vm(
            qemu.vm,
            name="alice",
            memory_bytes=qemu.ram_bytes,
            track=Track.STORES_AND_PAGES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
        )
        qemu.link(Path(client.welcome.link_socket))
        capture = client.start_capture(tmp_path / "copy")
        to_be_held(client, capture)
        if when == "copying":
            client.vms_held(capture)
        engine.process.kill()
        with pytest.raises(EngineGoneError):
            client.wait_for_capture(capture)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for twice the VM's memory, and not for four times that."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
@pytest.mark.parametrize("written", [False, True], ids=["copied", "saved before a write"])
def test_full_disk_is_not_the_guests_business(
    guests: Guests, small_file_system: Path, written: bool
) -> None:
    client = guests.client
    qemu, _ = guests.link()
    qemu.dma(0, os.urandom(qemu.ram_bytes))
    capture = client.start_capture(small_file_system / "copy", [qemu.vm])
    to_be_held(client, capture)
    (small_file_system / "others").write_bytes(bytes(384 << 10))
    client.vms_held(capture)
    if written:
        qemu.dma(0, os.urandom(qemu.ram_bytes))
        client.flush(qemu.vm)
    with pytest.raises(EngineRefusedError, match="No space left on device") as caught:
        ended(client, capture)
    assert "make space" in (caught.value.hint or "")
    assert os.listdir(small_file_system) == ["others"]
    client.flush(qemu.vm)
    assert guests.read(qemu) == qemu.contents()


@needs_root
def test_guests_are_not_held_for_what_does_not_fit(guests: Guests, small_file_system: Path) -> None:
    """And what is written just before counts."""
    client = guests.client
    qemu, _ = guests.link(256)
    qemu.dma(0, os.urandom(qemu.ram_bytes))
    capture = client.start_capture(small_file_system / "copy", [qemu.vm])
    event = client.events.get(timeout=60)
    while not isinstance(event, wire.CaptureFailed):
        assert not isinstance(event, wire.HoldVms)
        event = client.events.get(timeout=60)
    assert (event.capture, event.error) == (capture, "OutputError")
    assert "takes about 2 MiB, and 0 MiB are free" in event.message
    assert "make space" in (event.hint or "")
    assert list(small_file_system.iterdir()) == []


@pytest.fixture
def small_blocks(tmp_path: Path) -> Iterator[Path]:
    """A file system with four blocks to a page."""
    disk, place = tmp_path / "disk", tmp_path / "ext4"
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-b", "1024", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
def test_digest_where_blocks_are_smaller_than_pages(small_blocks: Path) -> None:
    """Of each page of the MACs, some blocks alone; and whole pages, and a tail that is none."""
    path, size = small_blocks / "file", 8 * PAGE + 256
    holds = [(1024, 1024), (3072, 1024), (PAGE + 2048, 1024), (3 * PAGE, 3 * PAGE), (8 * PAGE, 256)]
    with NewFile(path, size) as new:
        for offset, length in holds:
            new.write(offset, os.urandom(length))
        digest = asyncio.run(captures._digest(new))
        runs = list(SparseFile(new.fd, path, 1).data(0, size))
        new.publish()
    assert any(stop % PAGE for _, stop in runs[:-1])
    assert any(start % PAGE for start, _ in runs)
    assert digest == contents(path)
    with DumpImage.open_raw(path) as image:
        check_digest(image, digest)


def test_lines_to_decrypt_that_are_none(guests: Guests) -> None:
    _, added = guests.link()
    for address, data, entries in ((1, 64, None), (0, 63, None), (0, 0, None), (0, 64, 3)):
        with pytest.raises(EngineRefusedError) as caught:
            guests.client.decrypt(
                added.keyid, address, bytes(data), None if entries is None else bytes(entries)
            )
        assert caught.value.error == "AddressError"
    with pytest.raises(EngineRefusedError) as caught:
        guests.client.decrypt(1 << 20, 0, bytes(64))
    assert caught.value.error == "KeyIdError"
    with pytest.raises(EngineRefusedError, match="not a valid request"):
        guests.client.decrypt(added.keyid, 0, bytes(wire.DECRYPT_MAX_BYTES + 64))


def test_copy_is_of_the_moment_while_dram_is_written(tmp_path: Path) -> None:
    """All of it is written anew when next to nothing of it is copied."""
    size = 16 * COPY_PAGES * PAGE
    data = os.urandom(size)
    events: list[wire.Event] = []

    async def run(dram: Dram) -> None:
        drains = Drains(events.append)
        requests = Requests(dram, PlatformConfig(), CUSTODY, drains, events.append)
        requests.captures.start(str(tmp_path / "copy"), (), None)
        running = requests.captures._running
        assert running is not None
        assert running.task is not None
        await running.taken
        dram.write(0, bytes(size))
        await running.task

    with Dram.create(tmp_path / "dram", size) as dram:
        dram.write(0, data)
        asyncio.run(run(dram))
    (done,) = events
    assert isinstance(done, wire.CaptureDone)
    assert (tmp_path / "copy").read_bytes() == data
    assert done.record.data_bytes == size
    assert size // 2 < done.record.saved_bytes < size


def test_vm_that_comes_while_dram_is_copied(tmp_path: Path) -> None:
    """What its memory held is saved bit by bit, and the engine has time for others meanwhile."""
    size = 64 * COPY_PAGES * PAGE
    data = os.urandom(size)
    erased: list[int] = []

    async def run(dram: Dram) -> None:
        events: list[wire.Event] = []
        drains = Drains(events.append)
        requests = Requests(dram, PlatformConfig(), CUSTODY, drains, events.append)
        captures = requests.captures
        captures.start(str(tmp_path / "copy"), (), None)
        running = captures._running
        assert running is not None
        await running.taken
        assert running.snapshot is not None
        before_write = dram.before_write
        assert before_write is not None

        def before(address: int, size_bytes: int) -> None:
            assert running.snapshot is not None
            saved = running.snapshot.saved_bytes
            before_write(address, size_bytes)
            erased.append(running.snapshot.saved_bytes - saved)

        dram.before_write = before
        request = wire.AddVm(
            vm=uuid.UUID(int=1),
            name="alice",
            memory_bytes=size,
            track=Track.STORES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
        )
        added = await requests.handle(request, None)
        assert isinstance(added, wire.VmAdded)
        assert running.snapshot.saved_bytes > COPY_PAGES * PAGE
        dram.before_write = before_write
        assert running.task is not None
        await running.task
        (done,) = events
        assert isinstance(done, wire.CaptureDone)

    with Dram.create(tmp_path / "dram", size) as dram:
        dram.write(0, data)
        asyncio.run(run(dram))
    assert erased == [0]  # nothing was left to be saved at once
    assert (tmp_path / "copy").read_bytes() == data


def test_what_a_capture_is_told_of_before_it_changes_hands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VM's memory, its NVDIMM, and a DIMM that is unplugged: each may be GiB."""
    told: list[Region] = []

    async def save(_captures: Captures, *regions: Region) -> None:
        told.extend(regions)

    monkeypatch.setattr(Captures, "save", save)
    vm, mib = uuid.UUID(int=1), 1 << 20

    async def run(dram: Dram) -> None:
        requests = Requests(dram, PlatformConfig(), CUSTODY, Drains(lambda _: None), lambda _: None)

        async def ask(request: wire.Command) -> list[Region]:
            told.clear()
            await requests.handle(request, None)
            return list(told)

        add = wire.AddVm(
            vm=vm,
            name="alice",
            memory_bytes=4 * mib,
            track=Track.STORES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
            nvdimm=wire.NvdimmFile(path=str(tmp_path / "nv"), size_bytes=2 * mib, shared=False),
            dimm_bytes=mib,
        )
        assert await ask(add) == [Region(0, 7 * mib)]
        with pytest.raises(MktmeError, match="not linked"):
            await ask(wire.DiscardMemory(vm=vm, ram_offset=6 * mib, size_bytes=mib))
        assert told == [Region(6 * mib, mib)]
        nvdimm = [Region(4 * mib, 2 * mib)]
        assert await ask(wire.RemoveVm(vm=vm)) == nvdimm
        await ask(add)
        assert await ask(wire.PowerPlatform(event=PowerEvent.POWER_CYCLE)) == nvdimm

    with Dram.create(tmp_path / "dram", 16 * mib) as dram:
        asyncio.run(run(dram))


def test_nobody_holds_the_guests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(captures, "HOLD_TIMEOUT_S", 0.05)
    events: list[wire.Event] = []

    class Linked:
        uuid = uuid.UUID(int=1)
        link = object()

    class NoDrains(Drains):
        async def flush(self, vm: Vm) -> None:
            pass

    async def run(dram: Dram) -> None:
        vms = {Linked.uuid: cast("Vm", Linked())}
        one = Captures(
            dram,
            lambda _: pytest.fail("taken"),
            vms,
            NoDrains(events.append),
            asyncio.Lock(),
            events.append,
        )
        number = one.start(str(tmp_path / "copy"), (), None)
        with pytest.raises(CaptureError, match="already"):
            one.start(str(tmp_path / "copy"), (), None)
        running = one._running
        assert running is not None
        assert running.task is not None
        await asyncio.wait([running.task])
        with pytest.raises(CaptureError, match=f"no capture {number}"):
            one.cancel(number)

    with Dram.create(tmp_path / "dram", 1 << 20) as dram:
        asyncio.run(run(dram))
    held, failed = events
    assert held == wire.HoldVms(capture=1, vms=(Linked.uuid,))
    assert isinstance(failed, wire.CaptureFailed)
    assert failed.message == "nobody held the VMs within 0.05 s"
    assert not (tmp_path / "copy").exists()


def test_record_survives_its_file(guests: Guests, tmp_path: Path) -> None:
    """What others read of it needs no Python."""
    client = guests.client
    path = tmp_path / "copy"
    record = ended(client, client.start_capture(path, [announced(guests)]))
    plain = msgspec.json.decode(sidecar_path(path).read_bytes())["capture"]
    assert plain["captured_at"].endswith("+00:00")
    assert plain["sha256"] == record.sha256
    assert "SHA-256 of the 4096-byte pages" in plain["digest"]


def announced(guests: Guests) -> uuid.UUID:
    qemu: FakeQemu = guests._make_qemu()
    guests.announce(qemu)
    return qemu.vm
