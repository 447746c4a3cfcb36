# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of an `inline` guest that is in DRAM alone, so that what happens to DRAM reaches it.

Which pages leave its window is the engine's choice, and the guest is not asked. So the guest fills
other memory until the page in question is gone from RAM, seen from outside the engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from mktme.engine.xts import PAGE_BYTES
from mktme.proof.confidentiality import Canary, find_canary
from mktme.proof.guest_ram import ram_of
from mktme.service.client import EngineClient
from mktme.vm.console import VmError
from mktme.vm.host import UsageError
from mktme.vm.platform import Vm

MAX_WINDOW_SHARE: Final = 4
"""A window is at most this part of memory for the guest to fill more than it."""

_ATTEMPTS: Final = 10
_FILL_TIMEOUT_S: Final = 120.0
_FILL_BLOCK_BYTES: Final = 64 << 10


def check_window(window_bytes: int, memory_bytes: int) -> None:
    """Check that a page can be pushed out of a window.

    Raises:
        UsageError: the guest has too little memory beside it.
    """
    most = memory_bytes // MAX_WINDOW_SHARE
    if window_bytes > most:
        raise UsageError(
            f"a window of {window_bytes >> 20} MiB is too large to push a page out of it",
            hint=f"--window {most >> 20}M or less, or more --memory",
        )


@contextlib.contextmanager
def held_out_of_window(vm: Vm, canary: Canary, ram_offset: int | None = None) -> Iterator[int]:
    """Hold a guest whose canary page is in DRAM and nowhere else.

    Args:
        vm: an `inline` guest that runs; it is held within the `with`.
        canary: what the page holds.
        ram_offset: where it is, if that is known and must not have changed; None to look for it.

    Yields:
        RAM offset of the page.

    Raises:
        UsageError: the guest's window is too large for that.
        VmError: it has no window, it does not hold its canary there, or the page does not leave
            the window.
    """
    config = vm.config
    if config.window_bytes is None:
        raise VmError(f"{vm.name} has no window that a page could leave")
    check_window(config.window_bytes, config.memory_bytes)
    is_known = ram_offset is not None
    if ram_offset is None:
        # If it was written just now it is in the window, which is looked through much faster.
        with ram_of(vm) as ram:
            ram_offset = next(ram.find_pages(canary.page), None)
    blocks = -(-config.window_bytes * 5 // 4 // _FILL_BLOCK_BYTES)
    for _ in range(_ATTEMPTS):
        with vm.domain.explained():
            vm.domain.console.run(
                f"dd if=/dev/zero of=/tmp/fill bs={_FILL_BLOCK_BYTES} count={blocks} 2>/dev/null",
                _FILL_TIMEOUT_S,
            )
        with vm.held() as engine, ram_of(vm) as ram:
            if ram_offset is None or not _is_there(vm, engine, canary, ram_offset):
                if is_known:
                    raise VmError(
                        f"{vm.name}: its canary page is not at {ram_offset:#x} any more",
                        hint="Linux may move pages; run it again",
                    )
                ram_offset = find_canary(vm, canary)
            if not ram.populated(ram_offset, PAGE_BYTES).any():
                yield ram_offset
                return
    raise VmError(
        f"{vm.name}: its canary page is in the window still, after {_ATTEMPTS} times"
        f" {blocks * _FILL_BLOCK_BYTES >> 20} MiB of other memory"
    )


def _is_there(vm: Vm, engine: EngineClient, canary: Canary, ram_offset: int) -> bool:
    return engine.read(vm.uuid, ram_offset, PAGE_BYTES) == canary.page
