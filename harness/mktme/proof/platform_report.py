# SPDX-License-Identifier: GPL-2.0-or-later
"""What a platform is once its firmware has run: its registers in words, and what follows from them.

Fields of the registers: Intel 336907-004, tables 4-1 to 4-6; Intel SDM vol. 4, MSR 87H.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mktme.engine import tme as msrs
from mktme.engine.firmware import PlatformConfig, boot
from mktme.engine.keys import KeyMode, KeyTable
from mktme.engine.tme import MSR_NAMES, Revision, Tme, TmeActivate, decode_algorithms
from mktme.engine.xts import PAGE_BYTES, Algorithm
from mktme.service import wire


class Encryption(enum.Enum):
    """What TME does for memory that is under no programmed KeyID."""

    ON = "on"
    BYPASSED = "bypassed"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class RegisterField:
    """A field of a register.

    Attributes:
        bits: where it is, as Intel writes it: 7:4, or 31.
        value: the number in these bits.
        meaning: that number in words.
    """

    bits: str
    name: str
    value: int
    meaning: str


@dataclass(frozen=True, slots=True)
class Register:
    """A model-specific register.

    Attributes:
        msr: its address, such as 0x982.
        value: what RDMSR gives, 16 hexadecimal digits: not every JSON reader has 64-bit integers.
    """

    msr: str
    name: str
    value: str
    fields: tuple[RegisterField, ...]


@dataclass(frozen=True, slots=True)
class ExcludedRange:
    """What KeyID 0 leaves in plaintext."""

    base: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PlatformReport:
    """The document of `mktme platform show`.

    Attributes:
        file: the platform.toml, None for the defaults.
        revision: which of Intel's documents is followed where they disagree.
        dram_bytes: None for as much as the VMs take.
        physical_address_bits: KeyID bits included.
        address_bits: what KeyIDs leave of them for addresses.
        keyids: how many KeyIDs software can program: 1 to this number.
        algorithms: what it can program them for.
        policy: the TME key's algorithm, None without TME.
        save_key_for_standby: whether the TME key outlives standby.
    """

    schema: Literal["mktme.platform"]
    version: Literal[1]
    file: str | None
    revision: Revision
    dram_bytes: int | None
    physical_address_bits: int
    address_bits: int
    keyid_bits: int
    keyids: int
    algorithms: tuple[Algorithm, ...]
    encryption: Encryption
    policy: Algorithm | None
    save_key_for_standby: bool
    exclusion: ExcludedRange | None
    registers: tuple[Register, ...]


@dataclass(frozen=True, slots=True)
class KeyIdRow:
    """One KeyID.

    Attributes:
        algorithm: None for plaintext.
        vm: name of the VM that it was programmed for.
        size_bytes: how much of DRAM is under it.
    """

    keyid: int
    mode: KeyMode
    algorithm: Algorithm | None
    vm: str | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class KeyIdReport:
    """The document of `mktme keyid list`.

    Attributes:
        keyids: KeyID 0, and each that is programmed.
        free: how many more there are; they are as KeyID 0.
    """

    schema: Literal["mktme.keyid"]
    version: Literal[1]
    keyids: tuple[KeyIdRow, ...]
    free: int


@dataclass(frozen=True, slots=True)
class KeyIdChange:
    """The document of `mktme keyid program` and `mktme keyid clear`.

    Attributes:
        mode: how it is programmed now, None if it is not any more and as KeyID 0.
        algorithm: None for plaintext, or with `mode` None.
    """

    schema: Literal["mktme.keyid-change"]
    version: Literal[1]
    keyid: int
    mode: KeyMode | None
    algorithm: Algorithm | None


@dataclass(frozen=True, slots=True)
class PlatformCheck:
    """The document of `mktme platform validate`.

    Attributes:
        key: the setting that is wrong, None if none is.
        message: what is wrong, with the file and the line where that is certain.
        hint: what is allowed.
    """

    schema: Literal["mktme.platform-check"]
    version: Literal[1]
    file: str
    valid: bool
    key: str | None = None
    message: str | None = None
    hint: str | None = None


def describe(config: PlatformConfig, file: str | None = None) -> PlatformReport:
    """Run the firmware's sequence on registers of their own, and tell what it leaves.

    Args:
        config: the platform.
        file: where it was read from.

    Raises:
        FirmwareError: TME could not be enabled.
    """
    keys = KeyTable()
    tme = Tme(keys, maxphyaddr=config.physical_address_bits, revision=config.revision)
    try:
        boot(tme, config)
        return describe_registers(config, tme.rdmsr, file)
    finally:
        keys.reset(keep_saved_key=False)  # its TME key was for no memory


def describe_registers(
    config: PlatformConfig, rdmsr: Callable[[int], int], file: str | None = None
) -> PlatformReport:
    """Tell what a package's registers say.

    Args:
        config: the platform.
        rdmsr: reads one of its registers.
        file: where `config` was read from.
    """
    bits = config.physical_address_bits
    activate = TmeActivate.decode(rdmsr(msrs.IA32_TME_ACTIVATE))
    active = activate.lock and activate.enable
    mask = rdmsr(msrs.IA32_TME_EXCLUDE_MASK)
    excluded = None
    if mask >> 11 & 1:
        # The mask has a one for each address bit that all of the range shares.
        size_bytes = (1 << bits) - (mask & ~0xFFF)
        excluded = ExcludedRange(rdmsr(msrs.IA32_TME_EXCLUDE_BASE), size_bytes)
    encryption = Encryption.BYPASSED if activate.bypass else Encryption.ON
    return PlatformReport(
        schema="mktme.platform",
        version=1,
        file=file,
        revision=config.revision,
        dram_bytes=config.dram,
        physical_address_bits=bits,
        address_bits=bits - activate.keyid_bits,
        keyid_bits=activate.keyid_bits,
        keyids=rdmsr(msrs.IA32_MKTME_KEYID_PARTITIONING) & 0xFFFF_FFFF,
        algorithms=decode_algorithms(activate.algorithms),
        encryption=encryption if active else Encryption.OFF,
        policy=decode_algorithms(1 << activate.policy)[0] if active else None,
        save_key_for_standby=activate.save_key,
        exclusion=excluded,
        registers=tuple(_register(msr, rdmsr(msr), config) for msr in MSR_NAMES),
    )


def describe_keyids(status: wire.Status) -> KeyIdReport:
    """Tell of a running platform's KeyIDs."""
    names = {vm.vm: vm.name for vm in status.vms}
    rows = tuple(
        KeyIdRow(
            keyid=key.keyid,
            mode=key.mode,
            algorithm=key.algorithm,
            vm=None if key.vm is None else names[key.vm],
            size_bytes=key.pages * PAGE_BYTES,
        )
        for key in status.keys
    )
    return KeyIdReport("mktme.keyid", 1, rows, status.keyids_free)


@dataclass(frozen=True, slots=True)
class _Field:
    """Where a field is, and what puts its value into words."""

    high: int
    low: int
    name: str
    meaning: Callable[[int], str] = str

    def read(self, register: int) -> RegisterField:
        bits = str(self.low) if self.high == self.low else f"{self.high}:{self.low}"
        value = register >> self.low & (1 << self.high - self.low + 1) - 1
        return RegisterField(bits, self.name, value, self.meaning(value))


def _either(no: str, yes: str) -> Callable[[int], str]:
    return lambda value: yes if value else no


def _names(mask: int) -> str:
    return ", ".join(one.value for one in decode_algorithms(mask)) or "none"


def _page_address(value: int) -> str:
    return f"{value * PAGE_BYTES:#x}"


def _fields(msr: int, config: PlatformConfig) -> tuple[_Field, ...]:
    top = config.physical_address_bits - 1
    match msr:
        case msrs.IA32_MKTME_KEYID_PARTITIONING:
            return _Field(31, 0, "KeyIDs of MKTME"), _Field(63, 32, "KeyIDs of TDX")
        case msrs.IA32_TME_CAPABILITY:
            return (
                _Field(3, 0, "algorithms", _names),
                _Field(31, 31, "bypass", _either("not possible", "possible")),
                _Field(35, 32, "most KeyID bits"),
                _Field(50, 36, "most keys"),
            )
        case msrs.IA32_TME_ACTIVATE:
            tdx = _Field(39, 36, "TDX KeyID bits")
            return (
                _Field(0, 0, "lock", _either("unlocked", "locked until reset")),
                _Field(1, 1, "TME", _either("disabled", "enabled")),
                _Field(2, 2, "key select", _either("a new TME key", "the saved TME key")),
                _Field(3, 3, "save key", _either("lost in standby", "kept for standby")),
                _Field(7, 4, "policy", lambda value: _names(1 << value)),
                _Field(31, 31, "bypass", _either("off", "KeyID 0 is plaintext")),
                _Field(35, 32, "KeyID bits"),
                *([tdx] if config.revision is Revision.SDM else []),
                _Field(63, 48, "algorithms", _names),
            )
        case msrs.IA32_TME_EXCLUDE_MASK:
            enable = _Field(11, 11, "exclusion", _either("disabled", "enabled"))
            return enable, _Field(top, 12, "mask", _page_address)
        case msrs.IA32_TME_EXCLUDE_BASE:
            return (_Field(top, 12, "base", _page_address),)
    return (_Field(35, 32, "KeyID bits"),)  # MK_TME_CORE_ACTIVATE


def _register(msr: int, value: int, config: PlatformConfig) -> Register:
    fields = tuple(field.read(value) for field in _fields(msr, config))
    return Register(f"{msr:#x}", MSR_NAMES[msr], f"{value:#018x}", fields)
