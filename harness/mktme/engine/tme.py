# SPDX-License-Identifier: GPL-2.0-or-later
"""The TME and MKTME model-specific registers, 981H to 984H and their two companions.

Sources: Intel 336907-004 (Memory Encryption Technologies Specification, rev. 1.4), tables 4-1 to
4-6, and Intel SDM vol. 4, table 2-2. Where the two disagree, `Revision` says which one is followed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from mktme.engine.errors import EngineError
from mktme.engine.keys import MAX_KEYID_BITS, KeyTable
from mktme.engine.rng import EntropyError
from mktme.engine.xts import Algorithm

IA32_MKTME_KEYID_PARTITIONING: Final = 0x87
IA32_TME_CAPABILITY: Final = 0x981
IA32_TME_ACTIVATE: Final = 0x982
IA32_TME_EXCLUDE_MASK: Final = 0x983
IA32_TME_EXCLUDE_BASE: Final = 0x984
MK_TME_CORE_ACTIVATE: Final = 0x9FF

MSR_NAMES: Final = {
    IA32_MKTME_KEYID_PARTITIONING: "IA32_MKTME_KEYID_PARTITIONING",
    IA32_TME_CAPABILITY: "IA32_TME_CAPABILITY",
    IA32_TME_ACTIVATE: "IA32_TME_ACTIVATE",
    IA32_TME_EXCLUDE_MASK: "IA32_TME_EXCLUDE_MASK",
    IA32_TME_EXCLUDE_BASE: "IA32_TME_EXCLUDE_BASE",
    MK_TME_CORE_ACTIVATE: "MK_TME_CORE_ACTIVATE",
}

ENCODINGS: Final = {
    Algorithm.AES_XTS_128: 0,
    Algorithm.AES_XTS_128_INTEGRITY: 1,
    Algorithm.AES_XTS_256: 2,
}
"""An algorithm's number: the policy in 982H[7:4]; its bit in 981H, 982H[63:48] and ENC_ALG."""

_LOCK: Final = 1 << 0
_ENABLE: Final = 1 << 1
_KEY_SELECT: Final = 1 << 2
_EXCLUDE_ENABLE: Final = 1 << 11
_CPUID_TME: Final = 1 << 13
_CPUID_PCONFIG: Final = 1 << 18


class Revision(enum.Enum):
    """Which of Intel's documents is followed where they disagree.

    A write to a locked IA32_TME_ACTIVATE is ignored (SDM) or a #GP (336907, table 4-3); its bits
    39:36 are TDX's (SDM) or reserved (336907, table 4-2). The TME key's policy may be one with
    integrity (SDM, which lists 0001) or must not (336907, which says so from rev. 1.6 on;
    docs/adr/0008). PCONFIG answers a bad command, KeyID or algorithm with #GP (SDM) or with a
    status (336907, table 6-6), and ignores (SDM) or refuses with #GP (336907) what is set in the
    structure's unused bytes.
    """

    SDM = "sdm"
    SPEC_1_4 = "spec-1.4"


class GeneralProtection(EngineError):  # noqa: N818  its name is the exception's, #GP
    """The instruction raises #GP(0), and changes nothing.

    Attributes:
        msr: the register, of RDMSR and WRMSR.
        value: what was to be written, of WRMSR.
    """

    def __init__(self, message: str, *, msr: int | None = None, value: int | None = None) -> None:
        super().__init__(message)
        self.msr = msr
        self.value = value


@dataclass(frozen=True, slots=True)
class TmeCapability:
    """What the processor can do: IA32_TME_CAPABILITY (981H), 336907 table 4-1.

    Attributes:
        algorithms: what there is.
        bypass: whether TME can be bypassed for KeyID 0.
        max_keyid_bits: most KeyID bits, 0 to 15; 0: no MKTME.
        max_keys: most KeyIDs that can have a key, KeyID 0 not counted.
    """

    algorithms: frozenset[Algorithm] = frozenset(Algorithm)
    bypass: bool = True
    max_keyid_bits: int = MAX_KEYID_BITS
    max_keys: int = (1 << MAX_KEYID_BITS) - 1

    def encode(self) -> int:
        """As RDMSR gives it."""
        return (
            encode_algorithms(self.algorithms)
            | self.bypass << 31
            | self.max_keyid_bits << 32
            | self.max_keys << 36
        )


@dataclass(frozen=True, slots=True)
class TmeActivate:
    """The fields of IA32_TME_ACTIVATE (982H), 336907 table 4-2; TDX bits from the SDM, vol. 4.

    Attributes:
        restore_key: key select: the stored key in place of a new one.
        save_key: keep the key for standby.
        policy: the TME key's algorithm, as it is encoded.
        bypass: no encryption for KeyID 0.
        keyid_bits: physical address bits that are KeyID.
        tdx_keyid_bits: how many of them, the uppermost, are left to TDX.
        algorithms: what PCONFIG may choose, a mask.
    """

    lock: bool = False
    enable: bool = False
    restore_key: bool = False
    save_key: bool = False
    policy: int = 0
    bypass: bool = False
    keyid_bits: int = 0
    tdx_keyid_bits: int = 0
    algorithms: int = 0

    @classmethod
    def decode(cls, value: int) -> TmeActivate:
        """Take a register value apart; reserved bits are let go."""
        return cls(
            lock=bool(value & _LOCK),
            enable=bool(value & _ENABLE),
            restore_key=bool(value & _KEY_SELECT),
            save_key=bool(value >> 3 & 1),
            policy=value >> 4 & 0xF,
            bypass=bool(value >> 31 & 1),
            keyid_bits=value >> 32 & 0xF,
            tdx_keyid_bits=value >> 36 & 0xF,
            algorithms=value >> 48 & 0xFFFF,
        )

    def encode(self) -> int:
        """As WRMSR takes it."""
        return (
            self.lock
            | self.enable << 1
            | self.restore_key << 2
            | self.save_key << 3
            | self.policy << 4
            | self.bypass << 31
            | self.keyid_bits << 32
            | self.tdx_keyid_bits << 36
            | self.algorithms << 48
        )


@dataclass(frozen=True, slots=True)
class ExclusionRange:
    """What KeyID 0 does not encrypt: physical addresses that equal `base` in the bits of `mask`."""

    mask: int
    base: int


@dataclass(frozen=True, slots=True)
class CpuidBits:
    """What memory encryption adds to a CPUID leaf (SDM vol. 2A, CPUID).

    Attributes:
        leaf: EAX.
        subleaf: ECX.
        bits: of EAX, EBX, ECX and EDX, 32 each.
    """

    leaf: int
    subleaf: int
    bits: tuple[int, int, int, int]

    @property
    def has_pconfig(self) -> bool:
        """Whether it is the leaf that says that there is PCONFIG."""
        return (self.leaf, self.subleaf) == (7, 0) and bool(self.bits[3] & _CPUID_PCONFIG)


class Tme:
    """The registers of one package, and what writing them does to its key table.

    Args:
        keys: the key table; a write that activates TME gives it the TME key.
        capability: what 981H says.
        maxphyaddr: bits of a physical address, KeyID bits included.
        revision: which document to follow.
    """

    def __init__(
        self,
        keys: KeyTable,
        capability: TmeCapability | None = None,
        maxphyaddr: int = 46,
        revision: Revision = Revision.SDM,
    ) -> None:
        self._keys = keys
        self._address_bits = ((1 << maxphyaddr) - 1) & ~0xFFF
        self.capability = TmeCapability() if capability is None else capability
        self.revision = revision
        self.reset()

    def reset(self) -> None:
        """CPU reset: every register as at power-on, so the lock is off. Keys are not touched."""
        self._activate = 0
        self._core_keyid_bits = 0
        self._exclude_mask = 0
        self._exclude_base = 0

    @property
    def activate(self) -> TmeActivate:
        """IA32_TME_ACTIVATE as it is now."""
        return TmeActivate.decode(self._activate)

    @property
    def active(self) -> bool:
        """Whether memory encryption is locked and enabled."""
        return self._activate & (_LOCK | _ENABLE) == _LOCK | _ENABLE

    @property
    def exclusion(self) -> ExclusionRange | None:
        """The exclusion range, None when there is none."""
        if not self._exclude_mask & _EXCLUDE_ENABLE:
            return None
        return ExclusionRange(self._exclude_mask & self._address_bits, self._exclude_base)

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """What PCONFIG may choose: the activated algorithms."""
        return decode_algorithms(self.activate.algorithms)

    @property
    def mktme_keyids(self) -> int:
        """How many KeyIDs PCONFIG can program: 1 to this number. 0 before activation."""
        fields = self.activate
        if not self.active:
            return 0
        count = (1 << (fields.keyid_bits - fields.tdx_keyid_bits)) - 1
        return min(count, self.capability.max_keys)

    def cpuid(self) -> tuple[CpuidBits, ...]:
        """What CPUID says of it: leaf 7 names TME and PCONFIG, leaf 1BH what PCONFIG is for."""
        has_keyids = self.capability.max_keyid_bits > 0
        leaf_7 = CpuidBits(7, 0, (0, 0, _CPUID_TME, _CPUID_PCONFIG if has_keyids else 0))
        if not has_keyids:
            return (leaf_7,)
        # Subleaf type 1: target identifiers, of which 1 is MKTME and 0 is none.
        return leaf_7, CpuidBits(0x1B, 0, (1, 1, 0, 0))

    def rdmsr(self, msr: int) -> int:
        """Read a register.

        Raises:
            GeneralProtection: it is none of ours.
        """
        match msr:
            case 0x87:  # SDM vol. 4: [31:0] NUM_MKTME_KEYIDS, [63:32] NUM_TDX_PRIV_KEYIDS
                fields = self.activate
                tdx = (1 << fields.keyid_bits) - (1 << (fields.keyid_bits - fields.tdx_keyid_bits))
                return self.mktme_keyids | (tdx if self.active else 0) << 32
            case 0x981:
                return self.capability.encode()
            case 0x982:
                return self._activate
            case 0x983:
                return self._exclude_mask
            case 0x984:
                return self._exclude_base
            case 0x9FF if self.capability.max_keyid_bits:
                return self._core_keyid_bits << 32
        raise GeneralProtection(f"RDMSR of {msr:X}H, which is not there", msr=msr)

    def wrmsr(self, msr: int, value: int) -> None:
        """Write a register: the conditions and effects of 336907, table 4-3.

        Raises:
            ValueError: the value has more than 64 bits.
            GeneralProtection: the write is refused.
        """
        if value < 0 or value >> 64:
            raise ValueError("an MSR has 64 bits")
        match msr:
            case 0x982:
                self._write_activate(value)
            case 0x983:
                self._check_unlocked(msr, value)
                self._check_reserved(msr, value, self._address_bits | _EXCLUDE_ENABLE)
                mask = value & self._address_bits
                # Contiguous: ones from the uppermost address bit down, then zeros.
                if mask and mask != self._address_bits & -(mask & -mask):
                    raise _refusal(msr, value, "TMEEMASK is not of a contiguous region")
                self._exclude_mask = value
            case 0x984:
                self._check_unlocked(msr, value)
                self._check_reserved(msr, value, self._address_bits)
                self._exclude_base = value
            case 0x9FF if self.capability.max_keyid_bits:
                if value:
                    raise _refusal(msr, value, "its KeyID bits are read-only")
                self._core_keyid_bits = self.activate.keyid_bits
            case 0x87 | 0x981:
                raise _refusal(msr, value, "it is read-only")
            case _:
                raise GeneralProtection(
                    f"WRMSR to {msr:X}H, which is not there", msr=msr, value=value
                )

    def _write_activate(self, value: int) -> None:
        msr = IA32_TME_ACTIVATE
        if self._activate & _LOCK:
            if self.revision is Revision.SDM:
                return
            raise _refusal(msr, value, "it is locked")
        fields = TmeActivate.decode(value)
        self._check_reserved(msr, value, self._writable())
        if not self.capability.encode() & 0xF & 1 << fields.policy:
            raise _refusal(msr, value, f"policy {fields.policy} is not enumerated")
        if not can_be_policy(algorithm_of(fields.policy), self.revision):
            raise _refusal(msr, value, f"policy {fields.policy} is not for KeyID 0")
        if fields.keyid_bits > self.capability.max_keyid_bits:
            raise _refusal(msr, value, f"{fields.keyid_bits} KeyID bits are too many")
        if fields.keyid_bits and not fields.enable:
            raise _refusal(msr, value, "KeyID bits without TME")
        if fields.tdx_keyid_bits > fields.keyid_bits:
            raise _refusal(msr, value, "more TDX bits than KeyID bits")

        committed = value & ~(_LOCK | _ENABLE)
        if not fields.enable:
            self._activate = committed | _LOCK
        elif self._activate_keys(fields):
            self._activate = committed | _LOCK | _ENABLE
        elif not fields.keyid_bits:
            self._activate = committed

    def _activate_keys(self, fields: TmeActivate) -> bool:
        """Get a TME key and open the key table; False if there is no key to be had."""
        algorithm = algorithm_of(fields.policy)
        if fields.restore_key:
            if not self._keys.restore_tme_key(algorithm):
                return False
        else:
            try:
                self._keys.draw_tme_key(algorithm)
            except EntropyError:
                return False
        if fields.save_key:
            self._keys.save_tme_key()
        self._keys.activate(fields.keyid_bits, bypass=fields.bypass)
        return True

    def _writable(self) -> int:
        """The bits of 982H that are not reserved on this processor."""
        bits = 0xFF | self.capability.bypass << 31
        if self.capability.max_keyid_bits:
            bits |= (0xFF if self.revision is Revision.SDM else 0xF) << 32
            bits |= encode_algorithms(self.capability.algorithms) << 48
        return bits

    def _check_unlocked(self, msr: int, value: int) -> None:
        if self._activate & _LOCK:
            raise _refusal(msr, value, "IA32_TME_ACTIVATE is locked")

    @staticmethod
    def _check_reserved(msr: int, value: int, writable: int) -> None:
        if value & ~writable:
            raise _refusal(msr, value, f"reserved bits {value & ~writable:#x} are set")


def algorithm_of(number: int) -> Algorithm:
    """The algorithm that has a number, which must be one of `ENCODINGS`."""
    return next(one for one, its_number in ENCODINGS.items() if its_number == number)


def can_be_policy(algorithm: Algorithm, revision: Revision) -> bool:
    """Whether a document lets the TME key have an algorithm; see `Revision`."""
    return revision is Revision.SDM or not algorithm.has_integrity


def encode_algorithms(algorithms: frozenset[Algorithm] | tuple[Algorithm, ...]) -> int:
    """Algorithms as the mask that registers hold."""
    return sum(1 << ENCODINGS[one] for one in set(algorithms))


def decode_algorithms(mask: int) -> tuple[Algorithm, ...]:
    """The inverse of `encode_algorithms`; bits of no algorithm are let go."""
    return tuple(one for one, number in ENCODINGS.items() if mask >> number & 1)


def _refusal(msr: int, value: int, why: str) -> GeneralProtection:
    return GeneralProtection(
        f"WRMSR of {value:#x} to {MSR_NAMES[msr]}: {why}", msr=msr, value=value
    )
