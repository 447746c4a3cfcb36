# SPDX-License-Identifier: GPL-2.0-or-later
"""What firmware knows of the platform, and what it does with TME before an operating system runs.

`PlatformConfig` stands for the board's wiring and the BIOS's setup menu. `boot` is the sequence of
a BIOS (Intel 336907, chapter 4): exclusion range first, then IA32_TME_ACTIVATE, which locks all of
them, then the KeyID bits into every core.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import msgspec

from mktme.engine import tme as msrs
from mktme.engine.errors import EngineError
from mktme.engine.keys import MAX_KEYID_BITS
from mktme.engine.tme import Revision, Tme, TmeActivate, can_be_policy, encode_algorithms
from mktme.engine.xts import PAGE_BYTES, Algorithm

log = logging.getLogger(__name__)

MIN_PHYSICAL_ADDRESS_BITS: Final = 32
MAX_PHYSICAL_ADDRESS_BITS: Final = 52


class PlatformConfigError(EngineError):
    """A setting that this platform cannot have.

    Attributes:
        key: the setting, as platform.toml calls it.
    """

    def __init__(self, key: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{key}: {message}", hint=hint)
        self.key = key


class FirmwareError(EngineError):
    """Firmware could not bring memory encryption up as configured."""


class Exclusion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Physical addresses that KeyID 0 does not encrypt.

    Attributes:
        base: a multiple of the size.
        size_bytes: a power of two, at least 4096.
    """

    base: int
    size_bytes: int


class PlatformConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"
):
    """One platform as its firmware sets it up.

    Attributes:
        dram: bytes of DRAM; None for as much as the VMs take.
        physical_address_bits: MAXPHYADDR, KeyID bits included (CPUID 80000008H:EAX[7:0]).
        tme: whether memory is encrypted at all.
        policy: the TME key's algorithm.
        bypass: whether KeyID 0 is left out of encryption.
        save_key_for_standby: whether the TME key outlives standby.
        exclusion: what KeyID 0 leaves in plaintext.
        keyid_bits: how many of the uppermost address bits are KeyID; 0: TME alone.
        algorithms: what a KeyID may be programmed for.
        revision: which of Intel's documents is followed where they disagree.

    Raises:
        PlatformConfigError: a setting is out of range, or does not go with another one.
    """

    dram: int | None = None
    physical_address_bits: int = 46
    tme: bool = True
    policy: Algorithm = Algorithm.AES_XTS_128
    bypass: bool = False
    save_key_for_standby: bool = False
    exclusion: Exclusion | None = None
    keyid_bits: int = 6
    algorithms: tuple[Algorithm, ...] = tuple(Algorithm)
    revision: Revision = Revision.SDM

    def __post_init__(self) -> None:
        # Here, not in the types: msgspec looks at those only when it decodes.
        _check_range(
            "physical-address-bits",
            self.physical_address_bits,
            MIN_PHYSICAL_ADDRESS_BITS,
            MAX_PHYSICAL_ADDRESS_BITS,
        )
        _check_range("keyid-bits", self.keyid_bits, 0, MAX_KEYID_BITS)
        limit = 1 << self.physical_address_bits - self.keyid_bits
        if self.dram is not None and (self.dram <= 0 or self.dram % PAGE_BYTES):
            raise PlatformConfigError(
                "dram",
                f"{self.dram} bytes are not whole 4 KiB pages",
                hint="allowed: 4K, 8K, 12K, ...",
            )
        if self.dram is not None and self.dram > limit:
            raise PlatformConfigError(
                "dram",
                f"{self.dram} bytes do not fit: {self.physical_address_bits} address bits less"
                f" {self.keyid_bits} KeyID bits reach {limit} bytes",
                hint="allowed: at most that; or fewer keyid-bits, or more physical-address-bits",
            )
        if not can_be_policy(self.policy, self.revision):
            allowed = [one.value for one in Algorithm if can_be_policy(one, self.revision)]
            raise PlatformConfigError(
                "policy",
                f"{self.policy.value} is not for the TME key with revision {self.revision.value}",
                hint=f'allowed: {", ".join(allowed)}; or revision = "{Revision.SDM.value}"',
            )
        if self.keyid_bits and not self.tme:
            raise PlatformConfigError(
                "keyid-bits",
                f"{self.keyid_bits} KeyID bits without TME",
                hint="allowed: 0 while tme = false",
            )
        if self.keyid_bits and not self.algorithms:
            raise PlatformConfigError(
                "algorithms",
                "none, and KeyIDs that need one",
                hint=f"allowed: {', '.join(one.value for one in Algorithm)}",
            )
        if self.exclusion is not None:
            self._check_exclusion(self.exclusion)

    def _check_exclusion(self, exclusion: Exclusion) -> None:
        size, base = exclusion.size_bytes, exclusion.base
        if size < PAGE_BYTES or size & (size - 1):
            raise PlatformConfigError(
                "exclusion.size",
                f"{size} bytes are no power of two that makes whole 4 KiB pages",
                hint="allowed: 4K, 8K, 16K, ...: the range is a mask (336907 table 4-5)",
            )
        if base < 0 or base % size:
            raise PlatformConfigError(
                "exclusion.base",
                f"{base:#x} is no multiple of the range's {size} bytes",
                hint=f"allowed: 0, {size:#x}, {2 * size:#x}, ...",
            )
        if (base + size - 1) >> self.physical_address_bits:
            raise PlatformConfigError(
                "exclusion.base",
                f"{base:#x} and its {size} bytes need more than {self.physical_address_bits} bits",
                hint="allowed: a range below that; or more physical-address-bits",
            )


def _check_range(key: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise PlatformConfigError(
            key, f"{value} is out of range", hint=f"allowed: {least} to {most}"
        )


def boot(tme: Tme, config: PlatformConfig, *, resume: bool = False) -> None:
    """Set up and lock the registers of a package that was just reset.

    Args:
        tme: the package's registers.
        config: what to set up.
        resume: whether this is the way back from standby, with the key that was saved for it.

    Raises:
        FirmwareError: memory encryption is asked for and could not be enabled.
    """
    if config.exclusion is not None:
        address_mask = (1 << config.physical_address_bits) - 1
        mask = address_mask & -config.exclusion.size_bytes
        tme.wrmsr(msrs.IA32_TME_EXCLUDE_BASE, config.exclusion.base)
        tme.wrmsr(msrs.IA32_TME_EXCLUDE_MASK, mask | 1 << 11)
    activate = TmeActivate(
        enable=config.tme,
        save_key=config.tme and config.save_key_for_standby,
        restore_key=config.tme and resume and config.save_key_for_standby,
        policy=msrs.ENCODINGS[config.policy],
        bypass=config.tme and config.bypass,
        keyid_bits=config.keyid_bits,
        algorithms=encode_algorithms(config.algorithms) if config.keyid_bits else 0,
    )
    tme.wrmsr(msrs.IA32_TME_ACTIVATE, activate.encode())
    if activate.restore_key and not tme.active:
        log.warning("no TME key was saved for standby: a new one, and old memory is lost")
        tme.wrmsr(msrs.IA32_TME_ACTIVATE, replace(activate, restore_key=False).encode())
    if config.tme and not tme.active:
        raise FirmwareError(
            "TME could not be enabled: the random number generator gave no key",
            hint="nothing runs unprotected; start the platform again",
        )
    if config.keyid_bits:
        tme.wrmsr(msrs.MK_TME_CORE_ACTIVATE, 0)
