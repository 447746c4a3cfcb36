# SPDX-License-Identifier: GPL-2.0-or-later
"""All that is proven of one held guest at once, where its platform is.

On another host, this is what its engine is asked for (`mktme.remote`): neither guest RAM nor DRAM
has to leave it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from mktme.engine.xts import PAGE_BYTES
from mktme.proof.confidentiality import Canary, CanarySearch, search_dram, search_dram_for
from mktme.proof.transparency import MemoryComparison, Progress, compare_memory
from mktme.vm.platform import Platform, Vm


@dataclass(frozen=True, slots=True)
class HeldProof:
    """What was found of a held guest and the canary page in its memory.

    Attributes:
        comparison: DRAM, decrypted, against its RAM.
        search: for the canary in DRAM.
        address: where in DRAM its canary page is.
        ciphertext: what DRAM has there, 4096 bytes.
        ciphertext_hits: how often a 16-byte block of that is in DRAM: a control of the search,
            which is to find it.
    """

    comparison: MemoryComparison
    search: CanarySearch
    address: int
    ciphertext: bytes
    ciphertext_hits: int


def prove_held(
    platform: Platform,
    vm: Vm,
    canary: Canary,
    progress: Progress = lambda _done, _all: None,
) -> HeldProof:
    """Hold a guest, and look at its memory from all sides.

    Args:
        platform: its platform.
        vm: the guest.
        canary: that it has planted.
        progress: of the comparison.

    Raises:
        VmError: it does not hold its canary.
    """
    platform.check(vm)
    with vm.held() as engine:
        search = search_dram(vm, canary, platform.dram_path)
        address = vm.base + search.ram_offset
        with platform.dram_path.open("rb", buffering=0) as dram:
            ciphertext = os.pread(dram.fileno(), PAGE_BYTES, address)
        found = search_dram_for(ciphertext[: len(canary.line)], platform.dram_path)
        comparison = compare_memory(vm, engine, progress)
    return HeldProof(comparison, search, address, ciphertext, len(found.hits))
