# SPDX-License-Identifier: GPL-2.0-or-later
"""PCONFIG, row by row of Intel's tables, from raw structures.

Table numbers are those of 336907-004; for the SDM they mean the step of PCONFIG's Operation (vol.
2B) that takes the row's place. The bytes are put together here: what encodes and decodes them in
the engine is under test too.
"""

from __future__ import annotations

import itertools
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from mktme.engine import pconfig
from mktme.engine.errors import KeyIdError, KeyMaterialError
from mktme.engine.keys import KeyDescription, KeyMode, KeyTable
from mktme.engine.pconfig import Command, Status
from mktme.engine.tme import GeneralProtection, Revision, Tme, TmeCapability
from mktme.engine.xts import Algorithm

from ...vectors import reference
from .fake_rng import FakeRng

ALG_128, ALG_128_INTEGRITY, ALG_256 = 1 << 0, 1 << 1, 1 << 2
ALL_ALGS = ALG_128 | ALG_128_INTEGRITY | ALG_256
DIRECT, RANDOM, CLEAR, NO_ENCRYPT = range(4)
GP = "#GP(0)"
KEYS = {
    Algorithm.AES_XTS_128: bytes(range(0xA0, 0xC0)),
    Algorithm.AES_XTS_256: bytes(range(0xB0, 0xF0)),
    Algorithm.AES_XTS_128_INTEGRITY: bytes(range(0x80, 0xA0)),
}
BITS = {
    Algorithm.AES_XTS_128: ALG_128,
    Algorithm.AES_XTS_256: ALG_256,
    Algorithm.AES_XTS_128_INTEGRITY: ALG_128_INTEGRITY,
}
LINE = bytes(range(64))
ADDRESS = 0x1234_5678_9A40
DEADLINE_S = 30

Outcome = Status | str

REVISIONS = pytest.mark.parametrize(
    "revision", Revision, ids=["SDM vol. 2B PCONFIG, table 4-16", "336907-004 chapter 6"]
)
ALGORITHMS = pytest.mark.parametrize("algorithm", Algorithm)


def by(revision: Revision, status: Status) -> Outcome:
    """What became of a status: the SDM has #GP(0) for all but two."""
    return GP if revision is Revision.SDM else status


def structure(
    keyid: int = 1,
    command: int = RANDOM,
    enc_alg: int = ALG_128,
    reserved: int = 0,
    unused: bytes = bytes(58),
    data_key: bytes = b"",
    tweak_key: bytes = b"",
) -> bytearray:
    """MKTME_KEY_PROGRAM_STRUCT (SDM vol. 2B table 4-16, 336907 table 6-4)."""
    control = command | enc_alg << 8 | reserved << 24
    return bytearray(struct.pack("<HI58s64s64s", keyid, control, unused, data_key, tweak_key))


def with_key(
    algorithm: Algorithm, key: bytes | None = None, keyid: int = 1, command: int = DIRECT
) -> bytearray:
    key = KEYS[algorithm] if key is None else key
    half = len(key) // 2
    return structure(keyid, command, BITS[algorithm], data_key=key[:half], tweak_key=key[half:])


class Processor:
    """Registers and keys, activated with 6 KeyID bits and all algorithms unless asked else."""

    def __init__(
        self,
        revision: Revision = Revision.SDM,
        keyid_bits: int = 6,
        enc_algs: int = ALL_ALGS,
        tdx_bits: int = 0,
        capability: TmeCapability | None = None,
        rng: FakeRng | None = None,
    ) -> None:
        self.rng = FakeRng() if rng is None else rng
        self.keys = KeyTable(self.rng)
        self.tme = Tme(self.keys, capability, revision=revision)
        self.tme.wrmsr(0x982, 1 << 1 | keyid_bits << 32 | tdx_bits << 36 | enc_algs << 48)

    def execute(
        self, program: bytes | bytearray | memoryview, leaf: int = 0, address: int = 0
    ) -> Outcome:
        """Execute PCONFIG; unless it succeeds, the key table must be as it was."""
        before = self.table()
        outcome: Outcome
        try:
            outcome = pconfig.execute(self.tme, self.keys, leaf, address, program)
        except GeneralProtection:
            outcome = GP
        if outcome is not Status.PROG_SUCCESS:
            assert self.table() == before
        return outcome

    def table(self) -> dict[KeyDescription, tuple[bytes, int | None]]:
        """What KeyIDs are, and what they make of a line."""
        return {one: (self.encrypt(one.keyid), self.mac(one.keyid)) for one in self.keys.describe()}

    def encrypt(self, keyid: int) -> bytes:
        """A line under a KeyID."""
        cipher = self.keys.cipher(keyid)
        if cipher is None:
            return LINE
        words = np.frombuffer(LINE, np.uint64).reshape(1, 8)
        return cipher.encrypt_lines(words, np.array([ADDRESS], np.uint64)).tobytes()

    def uses(self, keyid: int, key: bytes) -> bool:
        """Whether a KeyID has a key, by another implementation of AES-XTS and of MACs."""
        mac = self.mac(keyid)
        if mac is not None and mac != reference.mac_entry(key, ADDRESS, LINE):
            return False
        return self.encrypt(keyid) == reference.encrypt(key, ADDRESS.to_bytes(16, "little"), LINE)

    def mac(self, keyid: int) -> int | None:
        """The MAC of a line under a KeyID, None if it has no integrity."""
        macs = self.keys.macs(keyid)
        if macs is None:
            return None
        words = np.frombuffer(LINE, np.uint64).reshape(1, 8)
        return int(macs.entries(words, np.array([ADDRESS], np.uint64))[0])


# --- table 6-5: commands ----------------------------------------------------------------------


@REVISIONS
@ALGORITHMS
def test_table_6_5_set_key_direct(revision: Revision, algorithm: Algorithm) -> None:
    processor = Processor(revision)
    assert processor.execute(with_key(algorithm)) is Status.PROG_SUCCESS
    assert processor.uses(1, KEYS[algorithm])
    assert not processor.uses(2, KEYS[algorithm])
    assert (processor.mac(1) is not None) == algorithm.has_integrity
    assert processor.keys.describe()[1:] == (KeyDescription(1, KeyMode.DIRECT, algorithm),)


@REVISIONS
@ALGORITHMS
@pytest.mark.parametrize("with_entropy", [False, True], ids=["without entropy", "with entropy"])
def test_table_6_5_set_key_random(
    revision: Revision, algorithm: Algorithm, with_entropy: bool
) -> None:
    processor = Processor(revision)
    entropy = KEYS[algorithm] if with_entropy else bytes(algorithm.key_bytes)
    program = with_key(algorithm, entropy, command=RANDOM)
    assert processor.execute(program) is Status.PROG_SUCCESS
    drawn = processor.rng.given[-1]
    mixed = bytes(left ^ right for left, right in zip(drawn, entropy, strict=True))
    assert processor.uses(1, mixed)
    assert processor.uses(1, drawn) != with_entropy
    assert not processor.uses(1, entropy)
    assert processor.keys.describe()[1:] == (KeyDescription(1, KeyMode.RANDOM, algorithm),)


@REVISIONS
@ALGORITHMS
def test_table_6_5_clear_key(revision: Revision, algorithm: Algorithm) -> None:
    processor = Processor(revision)
    processor.execute(with_key(algorithm))
    assert processor.execute(structure(1, CLEAR, BITS[algorithm])) is Status.PROG_SUCCESS
    assert processor.encrypt(1) == processor.encrypt(0)
    assert processor.mac(1) is None
    assert [one.keyid for one in processor.keys.describe()] == [0]


@REVISIONS
@ALGORITHMS
def test_table_6_5_no_encrypt(revision: Revision, algorithm: Algorithm) -> None:
    processor = Processor(revision)
    processor.execute(with_key(algorithm))
    assert processor.execute(structure(1, NO_ENCRYPT, BITS[algorithm])) is Status.PROG_SUCCESS
    assert processor.encrypt(1) == LINE
    assert processor.mac(1) is None
    assert processor.keys.describe()[1:] == (KeyDescription(1, KeyMode.NO_ENCRYPT, None),)


@REVISIONS
@pytest.mark.parametrize("command", [CLEAR, NO_ENCRYPT], ids=["CLEAR_KEY", "NO_ENCRYPT"])
def test_table_6_5_key_fields_of_other_commands_are_not_used(
    revision: Revision, command: int
) -> None:
    processor = Processor(revision)
    program = with_key(Algorithm.AES_XTS_128, command=command)
    assert processor.execute(program) is Status.PROG_SUCCESS
    assert not processor.uses(1, KEYS[Algorithm.AES_XTS_128])


# --- table 6-6: statuses ----------------------------------------------------------------------


@pytest.mark.parametrize("status", Status)
def test_table_6_6_zf_is_set_on_failure(status: Status) -> None:
    assert status.zf == (status.value != 0)


def test_tables_6_5_and_6_6_numbers() -> None:
    assert [(one.name, int(one)) for one in Command] == [
        ("SET_KEY_DIRECT", 0),
        ("SET_KEY_RANDOM", 1),
        ("CLEAR_KEY", 2),
        ("NO_ENCRYPT", 3),
    ]
    assert [(one.name, int(one)) for one in Status] == [
        ("PROG_SUCCESS", 0),
        ("INVALID_PROG_CMD", 1),
        ("ENTROPY_ERROR", 2),
        ("INVALID_KEYID", 3),
        ("INVALID_ENC_ALG", 4),
        ("DEVICE_BUSY", 5),
    ]


@REVISIONS
@pytest.mark.parametrize("command", [4, 5, 0x10, 0x80, 0x83, 0xFF], ids=hex)
def test_table_6_6_status_1_invalid_prog_cmd(revision: Revision, command: int) -> None:
    outcome = Processor(revision).execute(structure(command=command))
    assert outcome == by(revision, Status.INVALID_PROG_CMD)


@REVISIONS
def test_table_6_6_status_1_of_every_command_that_is_none(revision: Revision) -> None:
    processor = Processor(revision)
    outcomes = {processor.execute(structure(command=command)) for command in range(4, 256)}
    assert outcomes == {by(revision, Status.INVALID_PROG_CMD)}


@REVISIONS
@ALGORITHMS
def test_table_6_6_status_2_entropy_error_leaves_the_old_key(
    revision: Revision, algorithm: Algorithm
) -> None:
    processor = Processor(revision)
    processor.execute(with_key(algorithm))
    processor.rng.broken = True
    for keyid in (1, 2):
        program = structure(keyid, RANDOM, BITS[algorithm])
        assert processor.execute(program) is Status.ENTROPY_ERROR
    assert processor.uses(1, KEYS[algorithm])
    processor.rng.broken = False
    assert processor.execute(structure(1, RANDOM, BITS[algorithm])) is Status.PROG_SUCCESS
    assert not processor.uses(1, KEYS[algorithm])


@REVISIONS
@pytest.mark.parametrize("command", [DIRECT, CLEAR, NO_ENCRYPT])
def test_table_6_6_status_2_is_of_random_keys_alone(revision: Revision, command: int) -> None:
    processor = Processor(revision)
    processor.rng.broken = True
    program = with_key(Algorithm.AES_XTS_128, command=command)
    assert processor.execute(program) is Status.PROG_SUCCESS


@REVISIONS
@pytest.mark.parametrize("keyid_bits", range(1, 16))
def test_table_6_6_status_3_invalid_keyid(revision: Revision, keyid_bits: int) -> None:
    processor = Processor(revision, keyid_bits)
    last = 2**keyid_bits - 1
    for keyid in (1, last):
        assert processor.execute(structure(keyid)) is Status.PROG_SUCCESS
    for keyid in (0, last + 1, 0x8000 | last, 0xFFFF):
        assert processor.execute(structure(keyid)) == by(revision, Status.INVALID_KEYID)


@REVISIONS
def test_table_6_6_status_3_keyid_above_the_number_of_keys(revision: Revision) -> None:
    processor = Processor(revision, capability=TmeCapability(max_keyid_bits=6, max_keys=40))
    assert processor.execute(structure(40)) is Status.PROG_SUCCESS
    assert processor.execute(structure(41)) == by(revision, Status.INVALID_KEYID)


@pytest.mark.parametrize("tdx_bits", range(1, 7))
def test_sdm_keyids_left_to_tdx_are_refused(tdx_bits: int) -> None:
    processor = Processor(Revision.SDM, 6, tdx_bits=tdx_bits)
    outcomes = {keyid: processor.execute(structure(keyid)) for keyid in range(64)}
    programmed = [keyid for keyid, outcome in outcomes.items() if outcome != GP]
    assert programmed == list(range(1, 2 ** (6 - tdx_bits)))


@REVISIONS
@pytest.mark.parametrize("position", range(16))
def test_table_6_6_status_4_three_bits_are_algorithms(revision: Revision, position: int) -> None:
    outcome = Processor(revision).execute(structure(enc_alg=1 << position))
    good = 1 << position in (ALG_128, ALG_128_INTEGRITY, ALG_256)
    assert outcome == (Status.PROG_SUCCESS if good else by(revision, Status.INVALID_ENC_ALG))


@REVISIONS
@pytest.mark.parametrize("command", range(4))
def test_table_6_6_status_4_no_algorithm_or_several(revision: Revision, command: int) -> None:
    processor = Processor(revision)
    pairs = [1 << one | 1 << other for one, other in itertools.combinations(range(16), 2)]
    for enc_alg in (0, *pairs, 0xFFFF):
        outcome = processor.execute(structure(1, command, enc_alg))
        assert outcome == by(revision, Status.INVALID_ENC_ALG)


@REVISIONS
@pytest.mark.parametrize("command", range(4))
@pytest.mark.parametrize(
    "activated",
    [0, ALG_128, ALG_128_INTEGRITY, ALG_256],
    ids=["none", "128", "128 with integrity", "256"],
)
def test_table_6_6_status_4_algorithm_that_is_not_activated(
    revision: Revision, command: int, activated: int
) -> None:
    processor = Processor(revision, enc_algs=activated)
    for algorithm, bit in BITS.items():
        outcome = processor.execute(with_key(algorithm, command=command))
        good = bit == activated
        assert outcome == (Status.PROG_SUCCESS if good else by(revision, Status.INVALID_ENC_ALG))


@contextmanager
def held(lock: threading.Lock) -> Iterator[None]:
    """Another thread holds a lock."""
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            ready.set()
            done.wait(DEADLINE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield
    finally:
        done.set()
        thread.join()


@REVISIONS
@pytest.mark.parametrize("command", range(4))
def test_table_6_6_status_5_device_busy_while_the_lock_is_held(
    revision: Revision, command: int
) -> None:
    processor = Processor(revision)
    program = with_key(Algorithm.AES_XTS_128, command=command)
    with held(processor.keys.lock):
        assert processor.execute(program) is Status.DEVICE_BUSY
    assert processor.execute(program) is Status.PROG_SUCCESS


class SlowRng(FakeRng):
    """Takes until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = False
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def fill(self, buffer: memoryview) -> None:
        if self.slow:
            self.begun.set()
            assert self.go_on.wait(DEADLINE_S)
        super().fill(buffer)


@REVISIONS
def test_table_6_6_status_5_while_another_pconfig_runs(revision: Revision) -> None:
    rng = SlowRng()
    processor = Processor(revision, rng=rng)
    rng.slow = True
    outcomes: list[Outcome] = []
    other = threading.Thread(target=lambda: outcomes.append(processor.execute(structure(1))))
    other.start()
    assert rng.begun.wait(DEADLINE_S)
    assert processor.execute(with_key(Algorithm.AES_XTS_128, keyid=2)) is Status.DEVICE_BUSY
    assert not processor.keys.is_programmed(2)
    rng.go_on.set()
    other.join()
    assert outcomes == [Status.PROG_SUCCESS]
    assert processor.execute(with_key(Algorithm.AES_XTS_128, keyid=2)) is Status.PROG_SUCCESS


@REVISIONS
def test_table_is_consistent_whoever_programs_it_at_once(revision: Revision) -> None:
    """Four threads program the same two KeyIDs, each with keys of its own."""
    processor = Processor(revision)
    keys = [bytes([number]) * 31 + b"!" for number in range(1, 5)]
    outcomes: list[list[Status]] = [[] for _ in keys]
    start = threading.Barrier(len(keys))

    def run(number: int) -> None:
        programs = [
            with_key(Algorithm.AES_XTS_128, keys[number], keyid=1),
            with_key(Algorithm.AES_XTS_128, keys[number], keyid=2),
            structure(1, CLEAR),
            with_key(Algorithm.AES_XTS_128, keys[number], keyid=1),
        ]
        start.wait(DEADLINE_S)
        for program in programs * 50:
            outcomes[number].append(pconfig.execute(processor.tme, processor.keys, 0, 0, program))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(keys))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for own in outcomes:
        assert len(own) == 200
        assert set(own) <= {Status.PROG_SUCCESS, Status.DEVICE_BUSY}
    assert any(Status.PROG_SUCCESS in own for own in outcomes)
    for keyid in (1, 2):
        owners = [key for key in keys if processor.uses(keyid, key)]
        assert len(owners) == processor.keys.is_programmed(keyid)
    assert not processor.keys.lock.locked()


# --- tables 6-2 and 6-4: leaf, alignment, reserved and unused bytes ---------------------------


@REVISIONS
@pytest.mark.parametrize("leaf", [1, 2, 3, 0x100, 0xFFFF_FFFF], ids=hex)
def test_table_6_2_leaf_that_is_not_there(revision: Revision, leaf: int) -> None:
    assert Processor(revision).execute(structure(), leaf=leaf) == GP


@REVISIONS
def test_structure_must_be_aligned_to_256_bytes(revision: Revision) -> None:
    processor = Processor(revision)
    for base in (0, 0x7FFF_FFFF_FF00):
        assert processor.execute(structure(), address=base) is Status.PROG_SUCCESS
        misaligned = {processor.execute(structure(), address=base + at) for at in range(1, 256)}
        assert misaligned == {GP}


@REVISIONS
@pytest.mark.parametrize("position", range(8))
def test_table_6_4_keyid_ctrl_31_24_is_reserved(revision: Revision, position: int) -> None:
    assert Processor(revision).execute(structure(reserved=1 << position)) == GP


@REVISIONS
def test_table_6_4_bytes_6_to_63(revision: Revision) -> None:
    """SDM: ignored. 336907: must be zero."""
    processor = Processor(revision)
    expected = Status.PROG_SUCCESS if revision is Revision.SDM else GP
    for at in range(6, 64):
        program = with_key(Algorithm.AES_XTS_128)
        program[at] = 1
        assert processor.execute(program) == expected
    assert processor.uses(1, KEYS[Algorithm.AES_XTS_128]) == (expected is Status.PROG_SUCCESS)


@REVISIONS
@ALGORITHMS
@pytest.mark.parametrize("command", range(4))
def test_table_6_4_key_fields_behind_the_key(
    revision: Revision, algorithm: Algorithm, command: int
) -> None:
    """SDM: not used. 336907: must be zero, whatever the command."""
    processor = Processor(revision)
    expected = Status.PROG_SUCCESS if revision is Revision.SDM else GP
    half = algorithm.key_bytes // 2
    for at in (*range(64 + half, 128), *range(128 + half, 192)):
        program = with_key(algorithm, command=command)
        program[at] = 0x80
        assert processor.execute(program) == expected
        if command == DIRECT and expected is Status.PROG_SUCCESS:
            assert processor.uses(1, KEYS[algorithm])


@REVISIONS
@ALGORITHMS
def test_table_6_4_every_byte_of_the_key_is_used(revision: Revision, algorithm: Algorithm) -> None:
    """The control for the test above."""
    processor = Processor(revision)
    half = algorithm.key_bytes // 2
    for at in (*range(64, 64 + half), *range(128, 128 + half)):
        program = with_key(algorithm)
        program[at] ^= 0x80
        assert processor.execute(program) is Status.PROG_SUCCESS
        assert not processor.uses(1, KEYS[algorithm])


def test_336907_looks_at_key_fields_before_it_finds_two_algorithms() -> None:
    processor = Processor(Revision.SPEC_1_4)
    for at in (80, 144, 96, 160):
        program = structure(enc_alg=ALG_128 | ALG_256)
        program[at] = 1
        assert processor.execute(program) == GP
    program = structure(enc_alg=ALG_256 | 1 << 5)
    program[80] = 1
    assert processor.execute(program) is Status.INVALID_ENC_ALG


def test_336907_has_no_place_for_the_key_of_no_algorithm() -> None:
    program = structure(enc_alg=1 << 3, data_key=bytes(range(64)), tweak_key=bytes(range(64)))
    assert Processor(Revision.SPEC_1_4).execute(program) is Status.INVALID_ENC_ALG


@REVISIONS
@pytest.mark.parametrize(
    "activate",
    [
        pytest.param(None, id="never written"),
        pytest.param(0, id="TME off"),
        pytest.param(1 << 1, id="TME alone"),
        pytest.param(1 << 1 | 1 << 48, id="TME alone, algorithms"),
        pytest.param(1 << 1 | 1 << 2, id="nothing to restore"),
        pytest.param(1 << 1 | 1 << 2 | 6 << 32 | 1 << 48, id="KeyIDs, nothing to restore"),
    ],
)
def test_nothing_is_programmed_before_activation(revision: Revision, activate: int | None) -> None:
    processor = Processor(revision)
    processor.tme.reset()
    processor.keys.reset()
    if activate is not None:
        processor.tme.wrmsr(0x982, activate)
    assert processor.execute(structure()) == GP


# --- the order of checks ----------------------------------------------------------------------

Fault = tuple[str, Callable[[bytearray], None], Status | None]


def put(at: int, *values: int) -> Callable[[bytearray], None]:
    def apply(program: bytearray) -> None:
        program[at : at + len(values)] = bytes(values)

    return apply


# In the documents' order: what the message says, the fault, 336907's status (None: #GP).
IN_STRUCTURE: list[Fault] = [
    ("RSVD", put(63, 1), None),
    ("KEYID_CTRL", put(5, 1), None),
    ("key field", put(191, 1), None),
    ("INVALID_PROG_CMD", put(2, 4), Status.INVALID_PROG_CMD),
    ("INVALID_KEYID", put(0, 64, 0), Status.INVALID_KEYID),
    ("INVALID_ENC_ALG", put(4, 0x10), Status.INVALID_ENC_ALG),
]
ONLY_336907 = ("RSVD", "key field")


@REVISIONS
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(first, second, id=f"{first[0]}, then {second[0]}")
        for first, second in itertools.combinations(IN_STRUCTURE, 2)
    ],
)
def test_first_fault_of_the_structure_is_what_counts(
    revision: Revision, first: Fault, second: Fault
) -> None:
    processor = Processor(revision)
    program = structure()
    first[1](program)
    second[1](program)
    by_sdm = revision is Revision.SDM
    faults = [one for one in (first, second) if not (by_sdm and one[0] in ONLY_336907)]
    with held(processor.keys.lock):
        if not faults:
            assert processor.execute(program) is Status.DEVICE_BUSY
        elif faults[0][2] is not None and not by_sdm:
            assert processor.execute(program) is faults[0][2]
        else:
            with pytest.raises(GeneralProtection, match=faults[0][0]):
                pconfig.execute(processor.tme, processor.keys, 0, 0, program)


@REVISIONS
@pytest.mark.parametrize("fault", IN_STRUCTURE, ids=[fault[0] for fault in IN_STRUCTURE])
def test_structure_is_looked_at_last(revision: Revision, fault: Fault) -> None:
    processor = Processor(revision)
    program = structure()
    fault[1](program)

    def message(leaf: int, address: int) -> str:
        with pytest.raises(GeneralProtection) as caught:
            pconfig.execute(processor.tme, processor.keys, leaf, address, program)
        return str(caught.value)

    assert "aligned" in message(0, 128)
    assert "leaf" in message(1, 128)
    processor.tme.reset()
    assert "before MKTME was activated" in message(0, 128)
    assert "leaf" in message(1, 128)


# --- key material -----------------------------------------------------------------------------


@REVISIONS
@ALGORITHMS
@pytest.mark.parametrize("byte", [0, 0x5A], ids=["zeros", "other"])
def test_equal_halves_are_refused_and_the_old_key_stays(
    revision: Revision, algorithm: Algorithm, byte: int
) -> None:
    processor = Processor(revision)
    processor.execute(with_key(algorithm))
    before = processor.table()
    program = with_key(algorithm, bytes([byte]) * algorithm.key_bytes)
    with pytest.raises(KeyMaterialError, match=r"IG C\.I"):
        processor.execute(program)
    assert processor.table() == before
    assert not processor.keys.lock.locked()
    program[64] ^= 1
    assert processor.execute(program) is Status.PROG_SUCCESS


@ALGORITHMS
def test_equal_halves_of_a_random_key_are_refused_too(algorithm: Algorithm) -> None:
    """Entropy that knows what will be drawn makes them; the RNG's owner alone could."""
    rng = FakeRng()
    foreseen = FakeRng()
    processor = Processor(rng=rng)
    next_key = bytearray(algorithm.key_bytes)
    foreseen.given.extend(rng.given)
    foreseen.fill(memoryview(next_key))
    with pytest.raises(KeyMaterialError):
        processor.execute(with_key(algorithm, bytes(next_key), command=RANDOM))
    assert bytes(next_key) == rng.given[-1]
    assert not processor.keys.is_programmed(1)
    assert not processor.keys.lock.locked()


@REVISIONS
@ALGORITHMS
def test_nothing_shows_the_structures_key(revision: Revision, algorithm: Algorithm) -> None:
    processor = Processor(revision)
    key = KEYS[algorithm]
    program = with_key(algorithm)
    processor.execute(program)
    shown = [repr(processor.keys), repr(processor.keys.describe()), repr(processor.keys.cipher(1))]
    shown += [repr(vars(processor.keys)), repr(vars(processor.tme))]
    program[5] = 1
    with pytest.raises(GeneralProtection) as refused:
        pconfig.execute(processor.tme, processor.keys, 0, 0, program)
    with pytest.raises(KeyMaterialError) as weak:
        processor.execute(with_key(algorithm, key[: len(key) // 2] * 2))
    for caught in (refused, weak):
        shown += [str(caught.value), repr(caught.value), repr(caught.value.__dict__)]
    everything = " ".join(shown)
    for part in (key[:8], key[-8:]):
        assert part.hex() not in everything
        assert repr(part)[2:-1] not in everything
        assert repr(list(part))[1:-1] not in everything


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("command", range(4))
def test_structure_is_only_read(
    kind: type[bytes] | type[bytearray] | type[memoryview], command: int
) -> None:
    program = bytes(with_key(Algorithm.AES_XTS_256, command=command))
    given = kind(program)
    assert Processor().execute(given) is Status.PROG_SUCCESS
    assert bytes(given) == program


class SpyTable(KeyTable):
    """Keeps what it is given, which the caller is to wipe."""

    given: bytes | bytearray | memoryview = b""
    size_bytes = 0

    def program_direct(
        self, keyid: int, algorithm: Algorithm, key: bytes | bytearray | memoryview
    ) -> None:
        assert any(key)
        self.given = key
        self.size_bytes = len(key)
        super().program_direct(keyid, algorithm, key)


@ALGORITHMS
def test_key_on_its_way_to_the_table_is_wiped(algorithm: Algorithm) -> None:
    keys = SpyTable()
    tme = Tme(keys)
    tme.wrmsr(0x982, 1 << 1 | 6 << 32 | ALL_ALGS << 48)
    weak = with_key(algorithm, b"x" * algorithm.key_bytes)
    assert pconfig.execute(tme, keys, 0, 0, with_key(algorithm)) is Status.PROG_SUCCESS
    assert len(keys.given) == keys.size_bytes == algorithm.key_bytes
    assert not any(keys.given)
    with pytest.raises(KeyMaterialError):
        pconfig.execute(tme, keys, 0, 0, weak)
    assert not any(keys.given)


def test_key_outlives_its_structure() -> None:
    processor = Processor()
    program = with_key(Algorithm.AES_XTS_128)
    processor.execute(program)
    program[:] = bytes(len(program))
    assert processor.uses(1, KEYS[Algorithm.AES_XTS_128])


# --- the structure ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 191, 193, 256])
def test_structure_of_another_size_is_a_mistake_of_the_caller(size: int) -> None:
    with pytest.raises(ValueError, match="192 bytes"):
        Processor().execute(bytes(size))


@ALGORITHMS
@pytest.mark.parametrize("command", Command)
def test_encoded_structure(algorithm: Algorithm, command: Command) -> None:
    key = KEYS[algorithm]
    encoded = pconfig.encode(0xABCD, command, algorithm, key)
    assert encoded == with_key(algorithm, keyid=0xABCD, command=command)
    assert pconfig.named_algorithm(encoded) is algorithm
    assert pconfig.encode(3, command, algorithm) == structure(3, command, BITS[algorithm])


@ALGORITHMS
def test_encoding_takes_no_key_of_another_size(algorithm: Algorithm) -> None:
    for size in (0, algorithm.key_bytes - 1, algorithm.key_bytes + 1, 48):
        with pytest.raises(KeyMaterialError, match=f"this one has {size}"):
            pconfig.encode(1, Command.SET_KEY_DIRECT, algorithm, bytes(size))


@pytest.mark.parametrize("keyid", [-1, 1 << 16])
def test_encoding_takes_no_keyid_of_more_than_16_bits(keyid: int) -> None:
    with pytest.raises(KeyIdError, match="16 bits") as caught:
        pconfig.encode(keyid, Command.CLEAR_KEY, Algorithm.AES_XTS_128)
    assert caught.value.keyid == keyid


@pytest.mark.parametrize("enc_alg", [0, 1 << 3, 1 << 15, ALG_128 | ALG_256])
def test_structure_that_names_no_algorithm(enc_alg: int) -> None:
    assert pconfig.named_algorithm(structure(enc_alg=enc_alg)) is None
