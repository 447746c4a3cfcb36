# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run takes of its platform, which is known before an image is built or a guest booted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mktme.engine.firmware import PlatformConfig
from mktme.engine.xts import Algorithm
from mktme.vm.config import region_bytes
from mktme.vm.host import UsageError
from mktme.vm.pages import GuestPages


@dataclass(frozen=True, slots=True)
class Demand:
    """What the guests of a run take of their platform, all at the same time.

    Attributes:
        guests: how many.
        memory_bytes: RAM and NVDIMM of each.
        algorithm: of their keys.
        keyids: how many for all of them.
    """

    guests: int
    memory_bytes: int
    algorithm: Algorithm
    keyids: int

    @property
    def dram_bytes(self) -> int:
        """DRAM for all of them."""
        return self.guests * region_bytes(self.memory_bytes)

    def check(self, platform: PlatformConfig | None) -> None:
        """Check that a platform has it; None is one that has whatever it takes.

        Raises:
            UsageError: it has not.
        """
        if platform is None:
            return
        if platform.keyid_bits == 0:
            raise UsageError(
                "the platform has no KeyIDs for guests",
                hint="tme = true and keyid-bits = 6 in platform.toml",
            )
        if (1 << platform.keyid_bits) - 1 < self.keyids:
            raise UsageError(
                f"the platform's {(1 << platform.keyid_bits) - 1} KeyIDs are too few: the run takes"
                f" {self.keyids}",
                hint=f"keyid-bits = {self.keyids.bit_length()} or more in platform.toml",
            )
        if self.algorithm not in platform.algorithms:
            raise UsageError(
                f"the platform's algorithms do not include {self.algorithm.value}",
                hint=f"--algorithm {platform.algorithms[0].value}",
            )
        reach = 1 << platform.physical_address_bits - platform.keyid_bits
        if self.dram_bytes > reach:
            raise UsageError(
                f"the platform's addresses reach {mib(reach)} and the guests take"
                f" {mib(self.dram_bytes)}",
                hint="more physical-address-bits in platform.toml, or fewer keyid-bits",
            )
        if platform.dram is not None and platform.dram < self.dram_bytes:
            raise UsageError(
                f"the platform has {mib(platform.dram)} of DRAM and the guests take"
                f" {mib(self.dram_bytes)}",
                hint=f'dram = "{self.dram_bytes >> 20}M" in platform.toml, or less --memory',
            )


def run_demand(
    memory_bytes: int, algorithm: Algorithm, pages: Sequence[GuestPages], guests: int
) -> Demand:
    """What `run` takes of its platform."""
    keyids = 1 + sum(one.use.has_own_keyid for one in pages)
    return Demand(guests, memory_bytes, algorithm, guests * keyids)


def demo_demand(memory_bytes: int, algorithm: Algorithm) -> Demand:
    """What `demo` takes of its platform."""
    # Two guests, then two controls, one of which is read under a further KeyID.
    return Demand(2, memory_bytes, algorithm, 3)


def mib(size_bytes: int) -> str:
    """A size as people read it."""
    return f"{size_bytes >> 10} KiB" if size_bytes % (1 << 20) else f"{size_bytes >> 20} MiB"
