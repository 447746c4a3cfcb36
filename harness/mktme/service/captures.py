# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies of DRAM while VMs run: who holds them still, and when (docs/adr/0013).

The engine can bring what a VM wrote into DRAM, but not stop the VM: it knows no libvirt. So it asks
for that (`wire.HoldVms`), and the one who runs the VMs says when they stand still (`wire.VmsHeld`).
The answer to that comes after the moment that the copy is of: then they may go on
(`wire.VmsReleased`), while the engine copies.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
import numpy as np

from mktme.engine.dram import Dram, Region, mac_path
from mktme.engine.errors import MktmeError
from mktme.engine.new_file import NewFile, publish
from mktme.engine.sidecar import (
    CaptureRecord,
    IntegrityRecord,
    Sidecar,
    encode_sidecar,
    sidecar_path,
)
from mktme.engine.snapshot import ContentsDigest, Snapshot
from mktme.engine.sparse_file import SparseFile
from mktme.engine.xts import PAGE_BYTES
from mktme.service import wire
from mktme.service.drains import Drains
from mktme.service.vms import Vm

log = logging.getLogger(__name__)

HOLD_TIMEOUT_S: Final = 60.0
"""Until VMs stand still, and until they go on: QEMU finishes what disk I/O is under way first."""
_DIGEST_BYTES: Final = 1 << 20
_T = TypeVar("_T")


class CaptureError(MktmeError):
    """DRAM cannot be captured now, or not for this."""


@dataclass(slots=True, eq=False)
class _Capture:
    """One that is under way."""

    number: int
    path: Path
    vms: tuple[Vm, ...] | None
    owner: object
    started_s: float = field(default_factory=time.monotonic)
    held: asyncio.Future[None] = field(default_factory=lambda: _future())
    taken: asyncio.Future[None] = field(default_factory=lambda: _future())
    released: asyncio.Future[float | None] = field(default_factory=lambda: _future())
    task: asyncio.Task[wire.CaptureDone] | None = None
    snapshot: Snapshot | None = None


class Captures:
    """The captures of a platform, one at a time.

    Args:
        dram: what is copied.
        describe: makes a sidecar of VMs and DRAM as they are now.
        vms: the platform's VMs, by UUID.
        drains: how a VM's writes get into DRAM.
        still: held while KeyIDs, pages or VMs change.
        announce: tells the control clients of an event.
    """

    def __init__(
        self,
        dram: Dram,
        describe: Callable[[Collection[Vm]], Sidecar],
        vms: dict[UUID, Vm],
        drains: Drains,
        still: asyncio.Lock,
        announce: Callable[[wire.Event], None],
    ) -> None:
        self._dram = dram
        self._describe = describe
        self._vms = vms
        self._drains = drains
        self._still = still
        self._announce = announce
        self._last = 0
        self._running: _Capture | None = None

    def start(self, path: str, uuids: tuple[UUID, ...], owner: object) -> int:
        """Begin one; events tell how it goes on.

        Args:
            path: absolute path of the copy.
            uuids: whose memory; none: all of DRAM.
            owner: whose it is: `leave`.

        Raises:
            CaptureError: there is one under way, or it cannot be as asked.
        """
        if self._running is not None:
            raise CaptureError(
                f"DRAM is being captured to {self._running.path} already",
                hint="wait for its end",
            )
        if not Path(path).is_absolute():
            raise CaptureError("a capture goes to an absolute path")
        missing = [one for one in uuids if one not in self._vms]
        if missing:
            raise CaptureError(f"no VM {missing[0]} on this platform")
        self._last += 1
        chosen = tuple(self._vms[one] for one in dict.fromkeys(uuids)) if uuids else None
        capture = _Capture(self._last, Path(path), chosen, owner)
        self._running = capture
        capture.task = asyncio.get_running_loop().create_task(self._capture(capture))
        # Not within it: one that is cancelled before its first step never gets there.
        capture.task.add_done_callback(lambda task: self._ended(capture, task))
        return capture.number

    async def vms_held(self, number: int, problem: str | None) -> None:
        """The VMs stand still, or there is a problem; returns when they may go on."""
        capture = self._known(number)
        if not capture.held.done():
            if problem is None:
                capture.held.set_result(None)
            else:
                capture.held.set_exception(CaptureError(problem))
        await capture.taken

    def vms_released(self, number: int, pause_ns: int | None) -> None:
        """The VMs go on."""
        capture = self._known(number)
        if not capture.released.done():
            capture.released.set_result(None if pause_ns is None else pause_ns / 1e9)

    def cancel(self, number: int) -> None:
        """End one that nobody waits for any more; nothing is left of it."""
        task = self._known(number).task
        if task is not None:
            task.cancel()

    def leave(self, owner: object) -> None:
        """Nobody waits any more for what an owner began: as `cancel`."""
        if self._running is not None and self._running.owner is owner:
            self.cancel(self._running.number)

    async def save(self, *regions: Region) -> None:
        """Before DRAM's regions are erased, or kept elsewhere: copy what a capture needs of them.

        That may be GiB, and who waits for the engine does not wait for all of it here. If there is
        none under way, this returns without a pause.
        """
        if self._running is None or self._running.snapshot is None:
            return
        snapshot = self._running.snapshot
        for region in regions:
            for _ in snapshot.save(region):
                await asyncio.sleep(0)

    def _known(self, number: int) -> _Capture:
        if self._running is None or self._running.number != number:
            raise CaptureError(f"no capture {number} is under way")
        return self._running

    def _ended(self, capture: _Capture, task: asyncio.Task[wire.CaptureDone]) -> None:
        self._running = None
        if not capture.taken.done():
            capture.taken.set_result(None)  # whoever holds VMs for it lets them go on
        self._announce(_outcome(capture.number, task))

    async def _capture(self, capture: _Capture) -> wire.CaptureDone:
        regions = (
            (Region(0, self._dram.size_bytes),)
            if capture.vms is None
            else tuple(vm.region for vm in capture.vms)
        )
        with (
            Snapshot(self._dram, capture.path, regions) as snapshot,
            NewFile(sidecar_path(capture.path)) as description,
        ):
            capture.snapshot = snapshot
            await _to_its_end(snapshot.prepare)
            sidecar, captured_at = await self._take(capture, snapshot)
            for _ in snapshot.copy():
                await asyncio.sleep(0)
            pause_s = (
                await _answer(capture.released, "let the VMs go on")
                if capture.held.done()
                else None
            )
            has_macs = sidecar.integrity is not None or self._dram.has_macs
            record = CaptureRecord(
                captured_at=captured_at,
                method=snapshot.method.value,
                vms=None if capture.vms is None else tuple(vm.uuid for vm in capture.vms),
                pause_s=pause_s,
                sha256=await _digest(snapshot.image),
                mac_sha256=await _digest(snapshot.macs) if has_macs else None,
                data_bytes=snapshot.data_bytes,
                saved_bytes=snapshot.saved_bytes,
                total_s=time.monotonic() - capture.started_s,
            )
            sidecar = msgspec.structs.replace(sidecar, capture=record)
            description.write(0, encode_sidecar(sidecar))
            # The image last: where it is, all of it is.
            macs = [snapshot.macs] if has_macs else []
            publish([*macs, description, snapshot.image])
        return wire.CaptureDone(capture=capture.number, path=str(capture.path), record=record)

    async def _take(self, capture: _Capture, snapshot: Snapshot) -> tuple[Sidecar, str]:
        """Have the VMs held, flush them, and begin the snapshot: DRAM as it is in the sidecar."""
        concerned = tuple(self._vms.values()) if capture.vms is None else capture.vms
        linked = [vm for vm in concerned if vm.link is not None]
        if linked:
            # What is in DRAM before they are held need not be brought there meanwhile.
            for vm in linked:
                await self._drains.flush(vm)
            snapshot.check_space()
            self._announce(
                wire.HoldVms(capture=capture.number, vms=tuple(vm.uuid for vm in linked))
            )
            await _answer(capture.held, "held the VMs")
        async with self._still:
            for vm in linked:
                await self._drains.flush(vm)
            concerned = tuple(self._vms.values()) if capture.vms is None else capture.vms
            strangers = [vm for vm in concerned if vm.link is not None and vm not in linked]
            if strangers or any(vm.uuid not in self._vms for vm in concerned):
                raise CaptureError("VMs came or went while the others were held: try again")
            sidecar = self._describe(concerned)
            snapshot.begin()
        capture.taken.set_result(None)
        if sidecar.integrity is not None:
            macs = IntegrityRecord(file=mac_path(capture.path).name)
            sidecar = msgspec.structs.replace(sidecar, integrity=macs)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        # What has an image of its own is in the copy.
        return msgspec.structs.replace(sidecar, modules=()), now


async def _answer(future: asyncio.Future[_T], what: str) -> _T:
    """Wait for whoever runs the VMs; `what` is what it is to say that it did."""
    try:
        async with asyncio.timeout(HOLD_TIMEOUT_S):
            return await asyncio.shield(future)
    except TimeoutError:
        raise CaptureError(
            f"nobody {what} within {HOLD_TIMEOUT_S:g} s",
            hint="who started the platform does, unless it hangs",
        ) from None


def _outcome(
    number: int, task: asyncio.Task[wire.CaptureDone]
) -> wire.CaptureDone | wire.CaptureFailed:
    """What is announced of a capture that ended."""
    if task.cancelled():
        return wire.CaptureFailed(capture=number, error=CaptureError.__name__, message="cancelled")
    error = task.exception()
    if error is None:
        return task.result()
    name = type(error).__name__
    if isinstance(error, MktmeError):
        return wire.CaptureFailed(capture=number, error=name, message=str(error), hint=error.hint)
    log.error("capture failed: %s", name)  # a fault of ours, as in `EngineServer._answer`
    return wire.CaptureFailed(capture=number, error="InternalError", message=name)


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


async def _to_its_end(work: Callable[[], None]) -> None:
    """Run in a thread what uses descriptors; who is cancelled meanwhile closes them after that."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])  # which does not cancel it
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    running.result()


async def _digest(new: NewFile) -> str:
    """What `CaptureRecord.digest` says, of a file that nobody writes any more."""
    digest = ContentsDigest()
    file = SparseFile(new.fd, new.path, 1)
    done = 0
    for start, stop in file.data(0, file.size_bytes):
        # The file system's blocks may be smaller than pages, and several runs in one of those.
        start = max(done, start - start % PAGE_BYTES)
        stop = done = min(file.size_bytes, stop + -stop % PAGE_BYTES)
        for offset in range(start, stop, _DIGEST_BYTES):
            data = np.empty(min(_DIGEST_BYTES, stop - offset), np.uint8)
            file.read_into(offset, data.data)
            await asyncio.to_thread(digest.update, offset, data)
    return digest.hexdigest()
