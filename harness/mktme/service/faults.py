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

from mktme.datapath.inline import InlineDataPath
from mktme.engine.errors import DramFullError
from mktme.service import wire
from mktme.service.drains import FULL_RETRY_S, Drains
from mktme.service.vms import Vm


class Faults:
    """Serves the faults of linked VMs.

    Args:
        drains: tells of a DRAM that is full, and cuts what cannot be followed.
        announce: tells the control clients of an event.
    """

    def __init__(self, drains: Drains, announce: Callable[[wire.Event], None]) -> None:
        self._drains = drains
        self._announce = announce

    async def follow(self, vm: Vm, path: InlineDataPath) -> None:
        """Serve one VM for as long as it is linked."""
        loop = asyncio.get_running_loop()
        loop.add_reader(path.descriptor, self.serve, vm, path)
        try:
            self.serve(vm, path)  # what happened before it was looked at
            await asyncio.Event().wait()
        finally:
            loop.remove_reader(path.descriptor)

    def serve(self, vm: Vm, path: InlineDataPath) -> None:
        """Serve what there is to serve now."""
        started = time.perf_counter()
        try:
            while path.serve():
                pass
            self._drains.note_room(vm)
        except DramFullError as error:
            self._drains.note_full(vm, error)
            asyncio.get_running_loop().call_later(FULL_RETRY_S, self._retry, vm, path)
        except Exception as error:
            asyncio.get_running_loop().remove_reader(path.descriptor)
            self._drains.cut(vm, f"{type(error).__name__}: {error}")
        vm.drain_s += time.perf_counter() - started
        while path.found_poison:
            self._announce(vm.poisoned(path.found_poison.popleft()))

    def _retry(self, vm: Vm, path: InlineDataPath) -> None:
        if vm.path is path and vm.full:
            self.serve(vm, path)
