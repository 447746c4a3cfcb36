# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest that sees the platform's memory encryption needs of its processor and platform."""

from __future__ import annotations

from typing import Final

from mktme.engine.firmware import PlatformConfig
from mktme.vm.config import VmConfig
from mktme.vm.domain import Domain
from mktme.vm.guest_map import guest_physical, modules_of
from mktme.vm.host import QEMU11, EnvironmentUnfitError, Host, UsageError

ADDRESS_BITS: Final = 40
"""MAXPHYADDR of every processor that QEMU emulates (target/i386/cpu.h, TCG_PHYS_ADDR_BITS)."""
_PLUGIN_API: Final = 7
_VENDOR: Final = "GenuineIntel"
# Firmware, APICs and PCI devices are below, whatever the guest's memory.
_FOUR_GIB: Final = 4 << 30


def visible_platform(platform: PlatformConfig | None) -> PlatformConfig:
    """The platform for a guest that sees it; None is the usual one, with QEMU's address bits."""
    return PlatformConfig(physical_address_bits=ADDRESS_BITS) if platform is None else platform


def check_visible(config: VmConfig, platform: PlatformConfig) -> None:
    """Check that a platform can show itself to a guest.

    Linux takes the KeyID bits off its physical address width, and can use no memory above.

    Raises:
        UsageError: it cannot.
    """
    bits = platform.physical_address_bits
    if bits != ADDRESS_BITS:
        raise UsageError(
            f"the platform has {bits} physical address bits, the guest's processor {ADDRESS_BITS}",
            hint=f"physical-address-bits = {ADDRESS_BITS} in platform.toml",
        )
    machine = config.hardware.machine
    top = guest_physical(config.memory_bytes - 1, config.memory_bytes, machine) + 1
    modules = modules_of(config.memory_bytes, config.nvdimm_bytes, config.dimms, machine)
    top = max([_FOUR_GIB, top, *(one.guest_physical + one.size_bytes for one in modules)])
    most_keyid_bits = bits - (top - 1).bit_length()
    if platform.keyid_bits > most_keyid_bits:
        raise UsageError(
            f"{platform.keyid_bits} KeyID bits of {bits} leave the guest {bits} -"
            f" {platform.keyid_bits} for addresses, and its memory and devices reach {top:#x}",
            hint=f"keyid-bits = {most_keyid_bits} or fewer in platform.toml",
        )


def require_visible(host: Host) -> None:
    """Check that a host's QEMU lets a plugin answer instructions.

    Raises:
        EnvironmentUnfitError: it does not.
    """
    if host.plugin_api < _PLUGIN_API:
        version = ".".join(map(str, host.qemu_version))
        raise EnvironmentUnfitError(
            f"QEMU {version} does not let a plugin answer a guest's instructions: that came with"
            " QEMU 11",
            hint=f"make qemu11, and --emulator {QEMU11}",
        )


def check_processor(domain: Domain) -> None:
    """Check that a started guest's processor is one that can have TME.

    Raises:
        UsageError: it is of another vendor, or has another address width.
    """
    path = domain.qmp("query-cpus-fast")[0]["qom-path"]
    vendor = domain.qmp("qom-get", path=path, property="vendor")
    if vendor != _VENDOR:
        raise UsageError(
            f"the guest's processor is {vendor}'s, and TME is Intel's",
            hint=f"a model of Intel's, or vendor={_VENDOR}, in its -cpu",
        )
    bits = domain.qmp("qom-get", path=path, property="phys-bits")
    if bits != ADDRESS_BITS:
        raise UsageError(
            f"the guest's processor has {bits} physical address bits",
            hint=f"phys-bits={ADDRESS_BITS} in its -cpu",
        )
