# SPDX-License-Identifier: GPL-2.0-or-later
"""Page faults: what linked `inline` VMs wait for, they get as soon as the engine's thread is free.

Nothing here takes a VM's lock. A fault is served whole or not at all, and what holds the lock for
long (a flush, pages that change their KeyID) leaves DRAM and window as they should be whenever it
gives way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final
from uuid import UUID

from mktme.datapath.inline import InlineDataPath
from mktme.engine.errors import DramFullError
from mktme.service import wire
from mktme.service.drains import FULL_RETRY_S, Drains
from mktme.service.vms import Vm

# After a fault the next one is often near, and to be woken for it takes as long as to serve it
# (several times as long where this machine is a virtual one).
_LINGER_S: Final = 100e-6
# Then it is the turn of requests, and of other VMs.
_TURN_S: Final = 2e-3


class Faults:
    """Serves the faults of linked VMs.

    Args:
        drains: tells of a DRAM that is full, and cuts what cannot be followed.
        announce: tells the control clients of an event.
    """

    def __init__(self, drains: Drains, announce: Callable[[wire.Event], None]) -> None:
        self._drains = drains
        self._announce = announce
        self._retries: dict[UUID, asyncio.TimerHandle] = {}

    async def follow(self, vm: Vm, path: InlineDataPath) -> None:
        """Serve one VM for as long as it is linked."""
        loop = asyncio.get_running_loop()
        loop.add_reader(path.descriptor, self.serve, vm, path)
        try:
            self.serve(vm, path)  # what happened before it was looked at
            await asyncio.Event().wait()
        finally:
            loop.remove_reader(path.descriptor)
            self._cancel_retry(vm)

    def serve(self, vm: Vm, path: InlineDataPath) -> None:
        """Serve what there is to serve now, and what comes soon after."""
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        turn_ends, lingers_until = now + _TURN_S, now + _LINGER_S
        try:
            while now < lingers_until:
                served = path.serve()
                before, now = now, time.perf_counter()
                if served:
                    vm.drain_s += now - before
                    lingers_until = now + _LINGER_S
                if now > turn_ends:
                    loop.call_soon(self._go_on, vm, path)
                    break
            self._drains.note_room(vm)
        except DramFullError as error:
            self._drains.note_full(vm, error)
            # One for all who wait: each further fault comes here, too.
            self._cancel_retry(vm)
            self._retries[vm.uuid] = loop.call_later(FULL_RETRY_S, self.serve, vm, path)
        except Exception as error:
            self._cancel_retry(vm)
            loop.remove_reader(path.descriptor)
            self._drains.cut(vm, f"{type(error).__name__}: {error}")
        while path.found_poison:
            self._announce(vm.poisoned(path.found_poison.popleft()))

    def _go_on(self, vm: Vm, path: InlineDataPath) -> None:
        if vm.path is path and vm.fault is None:
            self.serve(vm, path)

    def _cancel_retry(self, vm: Vm) -> None:
        retry = self._retries.pop(vm.uuid, None)
        if retry is not None:
            retry.cancel()
