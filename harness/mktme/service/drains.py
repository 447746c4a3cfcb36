# SPDX-License-Identifier: GPL-2.0-or-later
"""Drains: what linked VMs write goes to DRAM, from time to time and when it is asked for.

All of them share the engine's one thread: each gives way to other work after every batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

from mktme.datapath.link import LinkError
from mktme.engine.errors import DramFullError, MktmeError
from mktme.service import wire
from mktme.service.vms import AnyDataPath, Vm

log = logging.getLogger(__name__)

FULL_RETRY_S: Final = 0.5
# A QEMU whose link ends does so at once; one that does not is hostile.
_QEMU_END_TIMEOUT_S: Final = 2.0


class Drains:
    """Follows linked VMs.

    Args:
        announce: tells the control clients of an event.
    """

    def __init__(self, announce: Callable[[wire.Event], None]) -> None:
        self._announce = announce

    async def follow(self, vm: Vm) -> None:
        """Drain one VM for as long as it is linked."""
        wait_s = 0.0
        while True:
            await asyncio.sleep(wait_s)
            async with vm.lock:
                try:
                    started_s = vm.drain_s
                    wrote = await self.run(vm, lambda path: path.drain())
                    wait_s = vm.pacer.next(vm.drain_s - started_s, wrote > 0)
                except DramFullError as error:
                    wait_s = FULL_RETRY_S
                    self.note_full(vm, error)
                except ProcessLookupError:
                    # QEMU ends: its memory goes before its sockets (kernel/exit.c, do_exit), whose
                    # end is what ends the link. There is nothing more to follow.
                    return
                except Exception as error:
                    self.cut(vm, f"{type(error).__name__}: {error}")
                    return

    async def flush(self, vm: Vm) -> None:
        """Bring all that a VM wrote into DRAM.

        Raises:
            LinkError: it is not linked, or not any more.
            DramFullError: what it wrote does not fit; it stays pending.
        """
        async with vm.lock:
            try:
                await self.run(vm, lambda path: path.flush())
            except DramFullError as error:
                self.note_full(vm, error)
                raise

    async def persist(self, vm: Vm) -> None:
        """End a VM's link, and bring its NVDIMM, if it has one, into DRAM as it is by then.

        What is in the package's caches when power goes is written to an NVDIMM, as platforms with
        eADR have it. A VM that could not be followed (`cut`) has lost what DRAM lacks, which its
        NVDIMM's description then says.
        """
        nvdimm = vm.nvdimm
        if nvdimm is None:
            return
        async with vm.lock:
            link, connection = vm.link, vm.connection
            if link is None or connection is None or vm.path is None:
                return
            connection.shutdown(socket.SHUT_RDWR)
            # Only when nobody writes any more can what is read be of one moment.
            await asyncio.to_thread(_await_end, link.qemu_pid)
            try:
                if vm.fault is None or vm.full:
                    await self.run(vm, lambda path: path.persist(*vm.nvdimm_pages))
                    nvdimm.set_clean(True)
            except (MktmeError, OSError) as error:
                log.error("VM %s: its NVDIMM lacks what it wrote last: %s", vm.name, error)
            vm.path = None

    async def run(self, vm: Vm, start: Callable[[AnyDataPath], Iterator[int]]) -> int:
        """Run one drain or flush, `vm.lock` held; returns how many lines changed."""
        if vm.path is None:
            raise LinkError(f"VM {vm.name} is not linked: there is nothing to follow")
        batches = start(vm.path)
        changed = 0
        while True:
            started = time.perf_counter()
            lines = next(batches, None)
            vm.drain_s += time.perf_counter() - started
            if lines is None:
                break
            changed += lines
            await asyncio.sleep(0)
        self.note_room(vm)
        return changed

    def note_room(self, vm: Vm) -> None:
        """What a VM wrote fits into DRAM; tell if it did not before."""
        if vm.full:
            vm.full, vm.fault = False, None
            self._announce(wire.DramCaughtUp(vm=vm.uuid))

    def note_full(self, vm: Vm, error: DramFullError) -> None:
        """What a VM wrote does not fit into DRAM; tell once."""
        if not vm.full:
            vm.full, vm.fault = True, str(error)
            self._announce(wire.DramFull(vm=vm.uuid, message=str(error)))

    def cut(self, vm: Vm, why: str) -> None:
        """Fail closed: a VM that cannot be followed loses its link, and its plugin stops it."""
        log.error("VM %s cannot be followed: %s", vm.name, why)
        vm.fault = why
        self._announce(wire.VmFault(vm=vm.uuid, message=why))
        if vm.connection is not None:
            vm.connection.shutdown(socket.SHUT_RDWR)


def _await_end(pid: int) -> None:
    """Wait for the end of a process, but not for long."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(_QEMU_END_TIMEOUT_S * 1000)
    finally:
        os.close(descriptor)


def unlink(vm: Vm) -> None:
    """End a VM's link, if it has one."""
    if vm.follower is not None:
        vm.follower.cancel()
    if vm.connection is not None:
        with contextlib.suppress(OSError):
            vm.connection.shutdown(socket.SHUT_RDWR)
    release_link(vm)


def release_link(vm: Vm) -> None:
    """Forget a link that ended, and give back its descriptors."""
    vm.path = None
    if vm.link is not None:
        vm.link.close()
    vm.link = vm.registers = vm.connection = vm.follower = None
