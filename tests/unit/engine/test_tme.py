# SPDX-License-Identifier: GPL-2.0-or-later
"""The TME registers, row by row of Intel's tables.

Table numbers are those of 336907-004. Values are put together here from the tables' bit positions:
what encodes and decodes them in the engine is under test too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.engine.keys import KeyDescription, KeyMode, KeyTable
from mktme.engine.tme import (
    MSR_NAMES,
    CpuidBits,
    ExclusionRange,
    GeneralProtection,
    Revision,
    Tme,
    TmeActivate,
    TmeCapability,
)
from mktme.engine.xts import Algorithm

from .fake_rng import FakeRng

PARTITIONING, CAPABILITY, ACTIVATE, EXCLUDE_MASK, EXCLUDE_BASE, CORE_ACTIVATE = (
    0x87, 0x981, 0x982, 0x983, 0x984, 0x9FF,
)  # fmt: skip
REGISTERS = (PARTITIONING, CAPABILITY, ACTIVATE, EXCLUDE_MASK, EXCLUDE_BASE, CORE_ACTIVATE)

LOCK, ENABLE, RESTORE, SAVE = 1 << 0, 1 << 1, 1 << 2, 1 << 3
POLICY_256, POLICY_INTEGRITY = 0b0010 << 4, 0b0001 << 4
BYPASS = 1 << 31
ALG_128, ALG_128_INTEGRITY, ALG_256 = 1 << 48, 1 << 49, 1 << 50
EXCLUDE_ENABLE = 1 << 11
ADDRESS_FIELD = (1 << 46) - (1 << 12)

TME_ONLY = TmeCapability(
    algorithms=frozenset({Algorithm.AES_XTS_128}), bypass=False, max_keyid_bits=0, max_keys=0
)
REVISIONS = pytest.mark.parametrize(
    "revision", Revision, ids=["SDM vol. 4 table 2-2", "336907-004 chapter 4"]
)


def keyid_bits(count: int) -> int:
    return count << 32


def tdx_bits(count: int) -> int:
    return count << 36


class Processor:
    """A Tme and its key table, with an RNG that fails on demand."""

    def __init__(
        self,
        revision: Revision = Revision.SDM,
        capability: TmeCapability | None = None,
        maxphyaddr: int = 46,
    ) -> None:
        self.rng = FakeRng()
        self.keys = KeyTable(self.rng)
        self.tme = Tme(self.keys, capability, maxphyaddr, revision)

    def state(self) -> tuple[object, ...]:
        """All that anybody can see."""
        values = []
        for msr in REGISTERS:
            try:
                values.append(self.tme.rdmsr(msr))
            except GeneralProtection:
                values.append(-1)
        return (*values, self.keys.describe(), self.keys.keyid_count, self.tme.exclusion)

    def refuses(self, msr: int, value: int) -> bool:
        """Whether a WRMSR raises #GP, which names it and changes nothing."""
        before = self.state()
        try:
            self.tme.wrmsr(msr, value)
        except GeneralProtection as error:
            refusal = error
        else:
            return False
        assert (refusal.msr, refusal.value) == (msr, value)
        assert self.state() == before
        return True

    def store_key(self, policy: int = 0) -> None:
        """Leave a key in storage, as the way into standby does, and reset."""
        self.tme.wrmsr(ACTIVATE, ENABLE | SAVE | policy)
        self.tme.reset()
        self.keys.reset()


# --- IA32_TME_ACTIVATE ------------------------------------------------------------------------


def nothing(processor: Processor) -> None:
    pass


def break_rng(processor: Processor) -> None:
    processor.rng.broken = True


def store_key(processor: Processor) -> None:
    processor.store_key()


def store_key_and_break_rng(processor: Processor) -> None:
    processor.store_key()
    processor.rng.broken = True


def store_key_256(processor: Processor) -> None:
    processor.store_key(POLICY_256)


@dataclass(frozen=True)
class Row:
    """A row of table 4-3, "IA32_TME_ACTIVATE WRMSR Response and Error Handling", or a case of it.

    Attributes:
        rdmsr: what RDMSR gives afterwards; None: the write is a #GP.
        before: what happened already.
    """

    number: int
    case: str
    value: int
    rdmsr: int | None
    before: Callable[[Processor], None] = nothing
    capability: TmeCapability | None = None

    def __str__(self) -> str:
        return f"336907 table 4-3 row {self.number}: {self.case}"


GP = None
ROWS = [
    Row(1, "no algorithm enumerated", ENABLE, GP, capability=TmeCapability(frozenset())),
    Row(1, "no MKTME enumerated: KeyID bits", ENABLE | keyid_bits(1), GP, capability=TME_ONLY),
    Row(1, "no MKTME enumerated: TDX bits", ENABLE | tdx_bits(1), GP, capability=TME_ONLY),
    Row(1, "no MKTME enumerated: algorithms", ENABLE | ALG_128, GP, capability=TME_ONLY),
    Row(1, "no bypass enumerated", ENABLE | BYPASS, GP, capability=TME_ONLY),
    Row(1, "no AES-XTS-256 enumerated", ENABLE | POLICY_256, GP, capability=TME_ONLY),
    Row(1, "all that is enumerated", ENABLE | SAVE, LOCK | ENABLE | SAVE, capability=TME_ONLY),
    *[
        Row(3, f"reserved bit {position}", ENABLE | 1 << position, GP)
        for position in (*range(8, 31), *range(40, 48))
    ],
    *[
        Row(4, f"policy {policy:04b}", ENABLE | policy << 4, GP)
        for policy in range(16)
        if policy not in (0b0000, 0b0001, 0b0010)
    ],
    Row(4, "a policy that is not enumerated, TME off", 0b0011 << 4, GP),
    Row(
        4,
        "no integrity enumerated, policy 0001",
        ENABLE | POLICY_INTEGRITY,
        GP,
        capability=TmeCapability(frozenset({Algorithm.AES_XTS_128, Algorithm.AES_XTS_256})),
    ),
    Row(5, "TME off", 0, LOCK),
    Row(5, "TME off, lock bit written", LOCK, LOCK),
    Row(5, "TME off, key select", RESTORE, LOCK | RESTORE),
    Row(5, "TME off, RNG fails", 0, LOCK, break_rng),
    Row(6, "new key, policy 0000", ENABLE, LOCK | ENABLE),
    Row(6, "new key, policy 0010", ENABLE | POLICY_256, LOCK | ENABLE | POLICY_256),
    Row(6, "new key, lock bit written", LOCK | ENABLE, LOCK | ENABLE),
    Row(6, "new key although one is stored", ENABLE, LOCK | ENABLE, store_key),
    *[
        Row(6, f"new key, {count} KeyID bits", value := ENABLE | keyid_bits(count), LOCK | value)
        for count in range(1, 16)
    ],
    Row(7, "RNG fails", ENABLE, 0, break_rng),
    Row(7, "RNG fails, other bits", SAVE | ENABLE | BYPASS, SAVE | BYPASS, break_rng),
    Row(7, "RNG fails, lock bit written", LOCK | ENABLE, 0, break_rng),
    Row(8, "stored key", ENABLE | RESTORE, LOCK | ENABLE | RESTORE, store_key),
    Row(
        8,
        "stored key, RNG fails",
        ENABLE | RESTORE,
        LOCK | ENABLE | RESTORE,
        store_key_and_break_rng,
    ),
    Row(
        8,
        "stored key, KeyID bits",
        value := ENABLE | RESTORE | keyid_bits(6) | ALG_128,
        LOCK | value,
        store_key,
    ),
    Row(9, "no stored key", ENABLE | RESTORE, RESTORE),
    Row(9, "stored key of the other policy", ENABLE | RESTORE, RESTORE, store_key_256),
    Row(10, "save key", ENABLE | SAVE, LOCK | ENABLE | SAVE),
    Row(10, "bypass", ENABLE | BYPASS, LOCK | ENABLE | BYPASS),
    Row(
        10,
        "everything",
        value := ENABLE
        | SAVE
        | POLICY_256
        | BYPASS
        | keyid_bits(15)
        | ALG_128
        | ALG_128_INTEGRITY
        | ALG_256,
        LOCK | value,
    ),
    *[
        Row(
            11,
            f"{count} KeyID bits of {most}",
            ENABLE | keyid_bits(count),
            GP if count > most else LOCK | ENABLE | keyid_bits(count),
            capability=TmeCapability(max_keyid_bits=most, max_keys=(1 << most) - 1),
        )
        for most in (1, 6, 14)
        for count in range(16)
    ],
    *[Row(12, f"{count} KeyID bits, TME off", keyid_bits(count), GP) for count in range(1, 16)],
    Row(13, "KeyID bits, RNG fails", ENABLE | keyid_bits(1) | SAVE, 0, break_rng),
    Row(13, "KeyID bits, no stored key", ENABLE | RESTORE | keyid_bits(15), 0),
    *[
        Row(14, f"reserved algorithm bit {position}", ENABLE | keyid_bits(6) | 1 << position, GP)
        for position in range(48, 64)
        if position not in (48, 49, 50)
    ],
    *[
        Row(
            14,
            "an algorithm that is not enumerated",
            ENABLE | keyid_bits(6) | algorithm,
            GP,
            capability=TmeCapability(frozenset({Algorithm.AES_XTS_128})),
        )
        for algorithm in (ALG_128_INTEGRITY, ALG_256)
    ],
]


@REVISIONS
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_write_of_activate(row: Row, revision: Revision) -> None:
    processor = Processor(revision, row.capability)
    row.before(processor)
    assert processor.refuses(ACTIVATE, row.value) == (row.rdmsr is GP)
    assert processor.tme.rdmsr(ACTIVATE) == (row.rdmsr or 0)
    enabled = row.rdmsr is not None and row.rdmsr & 3 == 3
    assert processor.tme.active == enabled
    bits = row.value >> 32 & 0xF if enabled else 0
    assert processor.keys.keyid_bits == bits
    is_encrypted = processor.keys.cipher(0) is not None
    assert is_encrypted == (enabled and not row.value & BYPASS)


def test_rows_are_complete() -> None:
    """Row 2 is about all the others, and has a test of its own."""
    assert {row.number for row in ROWS} | {2} == set(range(1, 15))


INTEGRITY_POLICIES = pytest.mark.parametrize(
    "value",
    [
        pytest.param(ENABLE | POLICY_INTEGRITY, id="TME alone"),
        pytest.param(ENABLE | POLICY_INTEGRITY | keyid_bits(6) | ALG_128_INTEGRITY, id="KeyIDs"),
        pytest.param(POLICY_INTEGRITY, id="TME off"),
    ],
)


@INTEGRITY_POLICIES
def test_sdm_vol_4_table_2_2_integrity_may_be_the_policy(value: int) -> None:
    processor = Processor(Revision.SDM)
    processor.tme.wrmsr(ACTIVATE, value)
    assert processor.tme.rdmsr(ACTIVATE) == LOCK | value
    assert (processor.keys.macs(0) is not None) == bool(value & ENABLE)


@INTEGRITY_POLICIES
def test_336907_integrity_is_no_policy(value: int) -> None:
    """As row 4, although the algorithm is enumerated."""
    processor = Processor(Revision.SPEC_1_4)
    assert processor.tme.rdmsr(CAPABILITY) & 1 << 1
    assert processor.refuses(ACTIVATE, value)
    # For other KeyIDs it may be activated.
    value = value & ~POLICY_INTEGRITY | ENABLE | keyid_bits(6) | ALG_128_INTEGRITY
    processor.tme.wrmsr(ACTIVATE, value)
    assert processor.tme.rdmsr(ACTIVATE) == LOCK | value


LOCKED_BY = [
    pytest.param(0, id="TME off"),
    pytest.param(ENABLE, id="TME on"),
    pytest.param(ENABLE | keyid_bits(6) | ALG_128, id="KeyIDs"),
]
AFTER_LOCK = [0, LOCK, ENABLE, LOCK | ENABLE, ENABLE | keyid_bits(15), 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("before", LOCKED_BY)
@pytest.mark.parametrize("value", AFTER_LOCK, ids=hex)
def test_table_4_3_row_2_locked_write_is_refused_by_336907(before: int, value: int) -> None:
    processor = Processor(Revision.SPEC_1_4)
    processor.tme.wrmsr(ACTIVATE, before)
    assert processor.refuses(ACTIVATE, value)


@pytest.mark.parametrize("before", LOCKED_BY)
@pytest.mark.parametrize("value", AFTER_LOCK, ids=hex)
def test_sdm_vol_4_table_2_2_locked_write_is_ignored_by_the_sdm(before: int, value: int) -> None:
    processor = Processor(Revision.SDM)
    processor.tme.wrmsr(ACTIVATE, before)
    state, given = processor.state(), list(processor.rng.given)
    processor.tme.wrmsr(ACTIVATE, value)
    assert processor.state() == state
    assert processor.rng.given == given


@REVISIONS
@pytest.mark.parametrize("value", [ENABLE, ENABLE | keyid_bits(6) | ALG_128], ids=["TME", "MKTME"])
def test_failed_activation_can_be_tried_again(revision: Revision, value: int) -> None:
    processor = Processor(revision)
    processor.rng.broken = True
    processor.tme.wrmsr(ACTIVATE, value)
    processor.tme.wrmsr(ACTIVATE, value | RESTORE)
    assert not processor.tme.active
    assert processor.keys.describe() == (KeyDescription(0, KeyMode.PLATFORM, None),)
    processor.rng.broken = False
    processor.tme.wrmsr(ACTIVATE, value)
    assert processor.tme.rdmsr(ACTIVATE) == LOCK | value


def test_row_13_keeps_what_was_written_before() -> None:
    processor = Processor()
    processor.rng.broken = True
    processor.tme.wrmsr(ACTIVATE, ENABLE | SAVE)
    processor.tme.wrmsr(ACTIVATE, ENABLE | keyid_bits(6))
    assert processor.tme.rdmsr(ACTIVATE) == SAVE


@pytest.mark.parametrize(
    ("policy", "algorithm"),
    [
        (0, Algorithm.AES_XTS_128),
        (POLICY_INTEGRITY, Algorithm.AES_XTS_128_INTEGRITY),
        (POLICY_256, Algorithm.AES_XTS_256),
    ],
    ids=["0000", "0001", "0010"],
)
def test_policy_is_the_tme_keys_algorithm(policy: int, algorithm: Algorithm) -> None:
    processor = Processor()
    processor.tme.wrmsr(ACTIVATE, ENABLE | policy)
    assert processor.keys.describe() == (KeyDescription(0, KeyMode.PLATFORM, algorithm),)
    assert [len(key) for key in processor.rng.given] == [algorithm.key_bytes]


def test_algorithms_are_what_was_activated() -> None:
    """Not what the processor has, nor what firmware was to set up."""
    processor = Processor()
    assert not processor.tme.algorithms
    processor.tme.wrmsr(ACTIVATE, ENABLE | keyid_bits(6) | ALG_256)
    assert processor.tme.algorithms == (Algorithm.AES_XTS_256,)


@pytest.mark.parametrize("save", [0, SAVE], ids=["not saved", "saved"])
def test_key_is_stored_only_if_asked_for(save: int) -> None:
    processor = Processor()
    processor.tme.wrmsr(ACTIVATE, ENABLE | save)
    processor.tme.reset()
    processor.keys.reset()
    processor.tme.wrmsr(ACTIVATE, ENABLE | RESTORE)
    assert processor.tme.active == bool(save)
    assert len(processor.rng.given) == 1


def test_key_is_not_stored_with_tme_off() -> None:
    processor = Processor()
    processor.tme.wrmsr(ACTIVATE, SAVE)
    assert processor.tme.rdmsr(ACTIVATE) == LOCK | SAVE
    processor.tme.reset()
    processor.tme.wrmsr(ACTIVATE, ENABLE | RESTORE)
    assert not processor.tme.active


def test_reset_unlocks_and_clears_registers() -> None:
    processor = Processor()
    fresh = processor.state()
    processor.tme.wrmsr(EXCLUDE_BASE, 1 << 20)
    processor.tme.wrmsr(EXCLUDE_MASK, ADDRESS_FIELD | EXCLUDE_ENABLE)
    processor.tme.wrmsr(ACTIVATE, ENABLE | keyid_bits(6))
    processor.tme.wrmsr(CORE_ACTIVATE, 0)
    assert processor.state() != fresh
    processor.tme.reset()
    assert processor.keys.keyid_bits == 6
    processor.keys.reset()
    assert processor.state() == fresh
    processor.tme.wrmsr(ACTIVATE, ENABLE)
    assert processor.tme.active


def test_refusal_says_what_was_written_where_and_why() -> None:
    with pytest.raises(GeneralProtection) as caught:
        Processor().tme.wrmsr(ACTIVATE, ENABLE | 1 << 40)
    assert str(caught.value) == (
        "WRMSR of 0x10000000002 to IA32_TME_ACTIVATE: reserved bits 0x10000000000 are set"
    )


# --- bits of TDX ------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(36, 40))
def test_table_4_2_bits_39_36_are_reserved_by_336907(position: int) -> None:
    processor = Processor(Revision.SPEC_1_4)
    assert processor.refuses(ACTIVATE, ENABLE | keyid_bits(15) | 1 << position)


@pytest.mark.parametrize("tdx", range(16))
@pytest.mark.parametrize("count", [1, 6, 15])
def test_sdm_tdx_gets_at_most_all_keyid_bits(count: int, tdx: int) -> None:
    processor = Processor()
    value = ENABLE | keyid_bits(count) | tdx_bits(tdx)
    if tdx > count:
        assert processor.refuses(ACTIVATE, value)
        return
    processor.tme.wrmsr(ACTIVATE, value)
    assert processor.tme.rdmsr(ACTIVATE) == LOCK | value
    assert processor.tme.mktme_keyids == 2 ** (count - tdx) - 1
    assert processor.tme.rdmsr(PARTITIONING) & 0xFFFFFFFF == 2 ** (count - tdx) - 1
    # KeyID 0, MKTME's and TDX's are all the KeyIDs there are.
    assert processor.tme.rdmsr(PARTITIONING) >> 32 == 2**count - 2 ** (count - tdx)


def test_tdx_bits_without_keyid_bits_are_refused() -> None:
    assert Processor().refuses(ACTIVATE, ENABLE | tdx_bits(1))
    assert Processor().refuses(ACTIVATE, tdx_bits(1))


# --- IA32_TME_CAPABILITY, IA32_MKTME_KEYID_PARTITIONING, MK_TME_CORE_ACTIVATE -----------------


@pytest.mark.parametrize(
    ("capability", "value"),
    [
        pytest.param(TmeCapability(frozenset(), False, 0, 0), 0, id="336907 table 4-1: nothing"),
        pytest.param(
            TmeCapability(frozenset({Algorithm.AES_XTS_128}), False, 0, 0),
            1 << 0,
            id="336907 table 4-1 bit 0: AES-XTS-128",
        ),
        pytest.param(
            TmeCapability(frozenset({Algorithm.AES_XTS_128_INTEGRITY}), False, 0, 0),
            1 << 1,
            id="SDM vol. 4 table 2-2 bit 1: AES-XTS-128 with integrity",
        ),
        pytest.param(
            TmeCapability(frozenset({Algorithm.AES_XTS_256}), False, 0, 0),
            1 << 2,
            id="336907 table 4-1 bit 2: AES-XTS-256",
        ),
        pytest.param(
            TmeCapability(frozenset(), True, 0, 0), 1 << 31, id="336907 table 4-1 bit 31: bypass"
        ),
        pytest.param(
            TmeCapability(frozenset(), False, 0b1010, 0),
            0b1010 << 32,
            id="336907 table 4-1 bits 35:32: KeyID bits",
        ),
        pytest.param(
            TmeCapability(frozenset(), False, 0, 0b101_0000_1111_0001),
            0b101_0000_1111_0001 << 36,
            id="336907 table 4-1 bits 50:36: keys",
        ),
        pytest.param(
            TmeCapability(),
            1 << 0 | 1 << 1 | 1 << 2 | 1 << 31 | 15 << 32 | 0x7FFF << 36,
            id="336907 table 4-1: the model's default",
        ),
    ],
)
def test_capability(capability: TmeCapability, value: int) -> None:
    assert Processor(capability=capability).tme.rdmsr(CAPABILITY) == value


@REVISIONS
@pytest.mark.parametrize("msr", [CAPABILITY, PARTITIONING], ids=MSR_NAMES.get)
@pytest.mark.parametrize("activate", [None, ENABLE | keyid_bits(6)], ids=["before", "activated"])
def test_read_only_register(revision: Revision, msr: int, activate: int | None) -> None:
    processor = Processor(revision)
    if activate is not None:
        processor.tme.wrmsr(ACTIVATE, activate)
    for value in (0, 1, processor.tme.rdmsr(msr), (1 << 64) - 1):
        assert processor.refuses(msr, value)


def test_partitioning_counts_keyids_once_they_are_activated() -> None:
    processor = Processor()
    assert processor.tme.rdmsr(PARTITIONING) == 0
    processor.tme.wrmsr(ACTIVATE, ENABLE | keyid_bits(6))
    assert processor.tme.rdmsr(PARTITIONING) == 63


@pytest.mark.parametrize("value", [0, ENABLE], ids=["TME off", "TME alone"])
def test_partitioning_is_0_without_keyids(value: int) -> None:
    processor = Processor()
    processor.tme.wrmsr(ACTIVATE, value)
    assert processor.tme.rdmsr(PARTITIONING) == processor.tme.mktme_keyids == 0


def test_fewer_keys_than_keyids_is_what_counts() -> None:
    processor = Processor(capability=TmeCapability(max_keyid_bits=6, max_keys=40))
    processor.tme.wrmsr(ACTIVATE, ENABLE | keyid_bits(6))
    assert processor.tme.rdmsr(PARTITIONING) == processor.tme.mktme_keyids == 40


@REVISIONS
def test_table_4_4_core_activate_takes_the_keyid_bits_when_it_is_written(
    revision: Revision,
) -> None:
    processor = Processor(revision)
    processor.tme.wrmsr(CORE_ACTIVATE, 0)
    assert processor.tme.rdmsr(CORE_ACTIVATE) == 0
    processor.tme.wrmsr(ACTIVATE, ENABLE | keyid_bits(6))
    assert processor.tme.rdmsr(CORE_ACTIVATE) == 0
    processor.tme.wrmsr(CORE_ACTIVATE, 0)
    assert processor.tme.rdmsr(CORE_ACTIVATE) == 6 << 32


@REVISIONS
@pytest.mark.parametrize("position", range(64))
def test_table_4_4_core_activate_takes_no_bit(revision: Revision, position: int) -> None:
    assert Processor(revision).refuses(CORE_ACTIVATE, 1 << position)


def test_table_4_4_core_activate_is_not_there_without_mktme() -> None:
    processor = Processor(capability=TME_ONLY)
    assert processor.refuses(CORE_ACTIVATE, 0)
    with pytest.raises(GeneralProtection):
        processor.tme.rdmsr(CORE_ACTIVATE)


# --- the exclusion range ----------------------------------------------------------------------


@REVISIONS
@pytest.mark.parametrize("maxphyaddr", [32, 46, 52])
@pytest.mark.parametrize("position", range(64))
def test_table_4_5_reserved_bits_of_the_mask(
    position: int, maxphyaddr: int, revision: Revision
) -> None:
    processor = Processor(revision, maxphyaddr=maxphyaddr)
    field = (1 << maxphyaddr) - (1 << 12)
    is_reserved = position < 11 or position >= maxphyaddr
    assert processor.refuses(EXCLUDE_MASK, field | EXCLUDE_ENABLE | 1 << position) == is_reserved


@REVISIONS
@pytest.mark.parametrize("maxphyaddr", [32, 46, 52])
@pytest.mark.parametrize("position", range(64))
def test_table_4_6_reserved_bits_of_the_base(
    position: int, maxphyaddr: int, revision: Revision
) -> None:
    processor = Processor(revision, maxphyaddr=maxphyaddr)
    is_reserved = position < 12 or position >= maxphyaddr
    assert processor.refuses(EXCLUDE_BASE, 1 << position) == is_reserved
    assert processor.tme.rdmsr(EXCLUDE_BASE) == (0 if is_reserved else 1 << position)


def test_table_4_5_every_mask_of_a_small_processor_is_contiguous_or_refused() -> None:
    """64 pages: a mask is good if the pages that match it have no gap."""
    accepted = 0
    for mask in range(64):
        matching = [page for page in range(64) if page & mask == 0]
        is_contiguous = matching == list(range(len(matching)))
        for enable in (0, EXCLUDE_ENABLE):
            processor = Processor(maxphyaddr=18)
            assert processor.refuses(EXCLUDE_MASK, mask << 12 | enable) != is_contiguous
        accepted += is_contiguous
    assert accepted == 7


@given(
    field=st.one_of(
        st.integers(0, (1 << 34) - 1),
        st.builds(lambda low, flip: (1 << 34) - (1 << low) ^ flip, st.integers(0, 34),
                  st.one_of(st.just(0), st.sampled_from([1 << at for at in range(34)]))),
    ),
    enabled=st.booleans(),
)  # fmt: skip
def test_table_4_5_mask_is_ones_then_zeros(field: int, enabled: bool) -> None:
    processor = Processor()
    is_contiguous = re.fullmatch("1*0*", f"{field:034b}") is not None
    value = field << 12 | (EXCLUDE_ENABLE if enabled else 0)
    assert processor.refuses(EXCLUDE_MASK, value) != is_contiguous
    assert processor.tme.rdmsr(EXCLUDE_MASK) == (value if is_contiguous else 0)


@REVISIONS
@pytest.mark.parametrize("msr", [EXCLUDE_MASK, EXCLUDE_BASE], ids=MSR_NAMES.get)
@pytest.mark.parametrize("activate", [0, ENABLE], ids=["TME off", "TME on"])
def test_tables_4_5_and_4_6_exclusion_registers_are_locked_by_activate(
    revision: Revision, msr: int, activate: int
) -> None:
    processor = Processor(revision)
    processor.tme.wrmsr(msr, 1 << 45)
    processor.tme.wrmsr(ACTIVATE, activate)
    for value in (0, 1 << 45, (1 << 64) - 1):
        assert processor.refuses(msr, value)
    assert processor.tme.rdmsr(msr) == 1 << 45


def test_failed_activation_locks_no_exclusion_register() -> None:
    processor = Processor()
    processor.rng.broken = True
    processor.tme.wrmsr(ACTIVATE, ENABLE)
    assert not processor.refuses(EXCLUDE_BASE, 1 << 20)
    assert not processor.refuses(EXCLUDE_MASK, 0)


def test_exclusion_is_there_when_it_is_enabled() -> None:
    processor = Processor()
    mask = ADDRESS_FIELD - 0xF000
    processor.tme.wrmsr(EXCLUDE_BASE, 1 << 20)
    processor.tme.wrmsr(EXCLUDE_MASK, mask)
    assert processor.tme.exclusion is None
    processor.tme.wrmsr(EXCLUDE_MASK, mask | EXCLUDE_ENABLE)
    assert processor.tme.exclusion == ExclusionRange(mask, 1 << 20)


# --- all registers ----------------------------------------------------------------------------


@pytest.mark.parametrize("msr", [0, 0x86, 0x88, 0x980, 0x985, 0x9FB, 0x9FE, 0xA00, 1 << 32])
def test_registers_that_are_not_modelled(msr: int) -> None:
    processor = Processor()
    with pytest.raises(GeneralProtection) as caught:
        processor.tme.rdmsr(msr)
    assert (caught.value.msr, caught.value.value) == (msr, None)
    assert processor.refuses(msr, 0)


@pytest.mark.parametrize("value", [-1, 1 << 64])
@pytest.mark.parametrize("msr", REGISTERS, ids=MSR_NAMES.get)
def test_value_of_more_than_64_bits_is_a_mistake_of_the_caller(msr: int, value: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        Processor().tme.wrmsr(msr, value)


def test_fields_of_activate_are_off_unless_asked_for() -> None:
    assert TmeActivate().encode() == 0


@given(st.integers(0, (1 << 64) - 1))
def test_fields_of_activate_are_taken_apart_and_put_together(value: int) -> None:
    reserved = sum(1 << position for position in (*range(8, 31), *range(40, 48)))
    fields = TmeActivate.decode(value)
    assert fields.encode() == value & ~reserved
    assert fields == TmeActivate(
        lock=bool(value & LOCK),
        enable=bool(value & ENABLE),
        restore_key=bool(value & RESTORE),
        save_key=bool(value & SAVE),
        policy=value // 2**4 % 2**4,
        bypass=bool(value & BYPASS),
        keyid_bits=value // 2**32 % 2**4,
        tdx_keyid_bits=value // 2**36 % 2**4,
        algorithms=value // 2**48,
    )


# --- CPUID (SDM vol. 2A) ----------------------------------------------------------------------


def test_cpuid_names_tme_and_pconfig_and_its_target() -> None:
    leaf_7, leaf_1b = Tme(KeyTable(FakeRng())).cpuid()
    assert leaf_7 == CpuidBits(7, 0, (0, 0, 1 << 13, 1 << 18))
    assert leaf_7.has_pconfig
    assert leaf_1b == CpuidBits(0x1B, 0, (1, 1, 0, 0))
    assert not leaf_1b.has_pconfig


def test_processor_without_mktme_has_no_pconfig() -> None:
    capability = TmeCapability(max_keyid_bits=0, max_keys=0)
    (leaf_7,) = Tme(KeyTable(FakeRng()), capability).cpuid()
    assert leaf_7 == CpuidBits(7, 0, (0, 0, 1 << 13, 0))
    assert not leaf_7.has_pconfig
