# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever is done to a package, it does as the documents say, and no key reads another's memory.

`Model` is the documents (Intel SDM vol. 2B, PCONFIG, and vol. 4, table 2-2; 336907-004, tables 4-1
to 4-6 and 6-2 to 6-6) as a few dictionaries: it knows no key, only which keys are the same. A
state machine does the same to it and to a package, as software, attackers, and power supplies
might, and compares all that can be seen. Packages that are broken on purpose show that it finds
what is wrong.
"""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mktme.engine.dram import Dram
from mktme.engine.errors import KeyIdError, KeyMaterialError
from mktme.engine.firmware import Exclusion, FirmwareError, PlatformConfig
from mktme.engine.integrity import LineMacs
from mktme.engine.package import Package, PowerEvent
from mktme.engine.rng import EntropyError, Rng
from mktme.engine.tme import GeneralProtection, Revision
from mktme.engine.xts import Algorithm

PAGES = 4
PAGE = 4096
LINE = 64
REGISTERS = (0x87, 0x981, 0x982, 0x983, 0x984, 0x9FF)
GP = "#GP(0)"
WEAK_KEY = "equal halves"
BUSY, NO_ENTROPY = 5, 2
POLICIES = {0: "aes-xts-128", 1: "aes-xts-128-integrity", 2: "aes-xts-256"}
KEY_BYTES = {"aes-xts-128": 16, "aes-xts-128-integrity": 16, "aes-xts-256": 32}  # of each half
MODES = {"given": "direct", "drawn": "random", "none": "no-encrypt"}

# What memory is encrypted with: ("given", algorithm, its bytes), ("drawn", algorithm, a number
# that no other drawn key has), or PLAIN.
Key = tuple[str, str | None, bytes | int]
PLAIN: Key = ("none", None, 0)


def has_integrity(key: Key) -> bool:
    return key[1] == "aes-xts-128-integrity"


def cipher_of(key: Key) -> Key:
    """What encrypts: MACs are beside it."""
    return (key[0], "aes-xts-128", key[2]) if has_integrity(key) else key


def bits(value: int, high: int, low: int) -> int:
    """A field, as the documents write it."""
    return value >> low & (1 << high - low + 1) - 1


class Model:
    """The package that the documents describe; True and False say whether there is no #GP."""

    def __init__(self, config: PlatformConfig) -> None:
        self.config = config
        self.by_sdm = config.revision is Revision.SDM
        self.drawn = 0
        self.saved: Key | None = None
        self.reset()

    def reset(self) -> None:
        self.registers = {0x982: 0, 0x983: 0, 0x984: 0, 0x9FF: 0}
        self.tme = PLAIN
        self.keyids: dict[int, Key] = {}
        self.pages = [0] * PAGES

    @property
    def locked(self) -> bool:
        return bits(self.registers[0x982], 0, 0) == 1

    @property
    def active(self) -> bool:
        return bits(self.registers[0x982], 1, 0) == 3

    @property
    def keyid_bits(self) -> int:
        return bits(self.registers[0x982], 35, 32) if self.active else 0

    @property
    def for_mktme(self) -> int:
        """How many KeyIDs software may program."""
        tdx = bits(self.registers[0x982], 39, 36) if self.active else 0
        return (1 << self.keyid_bits - tdx) - 1

    def rdmsr(self, msr: int) -> int:
        if msr == 0x981:
            return 0x0007_FFFF_8000_0007
        if msr == 0x87:
            return self.for_mktme | ((1 << self.keyid_bits) - 1 - self.for_mktme) << 32
        return self.registers[msr]

    def wrmsr(self, msr: int, value: int, rng_works: bool) -> bool:
        width = self.config.physical_address_bits
        field = bits(value, width - 1, 12)
        if msr == 0x982:
            return self._activate(value, rng_works)
        if msr == 0x983 and not self.locked:
            zeros = bits(value, 63, width) == bits(value, 10, 0) == 0
            contiguous = "01" not in f"{field:0{width - 12}b}"
            good = zeros and contiguous
        elif msr == 0x984 and not self.locked:
            good = bits(value, 63, width) == bits(value, 11, 0) == 0
        elif msr == 0x9FF:
            good = value == 0
            value = self.keyid_bits << 32
        else:
            return False
        if good:
            self.registers[msr] = value
        return good

    def _activate(self, value: int, rng_works: bool) -> bool:
        if self.locked:
            return self.by_sdm
        enable, restore, save = (bits(value, at, at) for at in (1, 2, 3))
        policy, count = bits(value, 7, 4), bits(value, 35, 32)
        tdx = bits(value, 39, 36)
        reserved = bits(value, 30, 8), bits(value, 47, 40), bits(value, 63, 51)
        if any(reserved) or policy not in POLICIES or tdx > count or (tdx and not self.by_sdm):
            return False
        if policy == 1 and not self.by_sdm:
            return False
        if count and not enable:
            return False
        key: Key | None = None
        if not enable:
            self.registers[0x982] = value & ~3 | 1
            return True
        if not restore and rng_works:
            key = self._draw(POLICIES[policy])
        if restore and self.saved is not None and self.saved[1] == POLICIES[policy]:
            key = self.saved
        if key is not None:
            self.registers[0x982] = value | 3
            self.tme = PLAIN if bits(value, 31, 31) else key
            self.saved = key if save else self.saved
        elif not count:
            self.registers[0x982] = value & ~3
        return True

    def _draw(self, algorithm: str) -> Key:
        self.drawn += 1
        return "drawn", algorithm, self.drawn

    def pconfig(
        self, leaf: int, address: int, program: bytes, rng_works: bool, busy: bool
    ) -> str | int:
        def refuse(status: int) -> str | int:
            return GP if self.by_sdm else status

        keyid = int.from_bytes(program[0:2], "little")
        command, enc_alg = program[2], int.from_bytes(program[3:5], "little")
        if leaf or not self.keyid_bits or address % 256 or program[5]:
            return GP
        if not self.by_sdm:
            unused = program[6:64]
            for policy, algorithm in POLICIES.items():
                if enc_alg >> policy & 1:
                    size = KEY_BYTES[algorithm]
                    unused += program[64 + size : 128] + program[128 + size :]
            if any(unused):
                return GP
        if command not in range(4):
            return refuse(1)
        if keyid not in range(1, self.for_mktme + 1):
            return refuse(3)
        if enc_alg not in (1, 2, 4) or not enc_alg & bits(self.registers[0x982], 63, 48):
            return refuse(4)
        if busy:
            return BUSY
        algorithm = POLICIES[enc_alg.bit_length() - 1]
        size = KEY_BYTES[algorithm]
        data_key, tweak_key = program[64 : 64 + size], program[128 : 128 + size]
        if command == 0:
            if data_key == tweak_key:
                return WEAK_KEY
            self.keyids[keyid] = "given", algorithm, data_key + tweak_key
        elif command == 1:
            if not rng_works:
                return NO_ENTROPY
            self.keyids[keyid] = self._draw(algorithm)
        elif command == 2:
            self.keyids.pop(keyid, None)
        else:
            self.keyids[keyid] = PLAIN
        return 0

    def power(self, event: PowerEvent, rng_works: bool) -> bool:
        """Reset, and firmware; whether that gives up."""
        self.reset()
        if event is PowerEvent.POWER_CYCLE:
            self.saved = None
        config = self.config
        if config.exclusion is not None:
            top = 1 << config.physical_address_bits
            self.wrmsr(0x984, config.exclusion.base, rng_works)
            self.wrmsr(0x983, top - config.exclusion.size_bytes | 1 << 11, rng_works)
        numbers = {name: number for number, name in POLICIES.items()}
        value = numbers[config.policy.value] << 4
        if config.tme:
            value |= 1 << 1 | config.save_key_for_standby << 3 | config.bypass << 31
        if config.keyid_bits:
            value |= config.keyid_bits << 32
            value |= sum(1 << 48 + numbers[one.value] for one in config.algorithms)
        if config.tme and config.save_key_for_standby and event is PowerEvent.STANDBY:
            self.wrmsr(0x982, value | 1 << 2, rng_works)
        if not self.locked:
            self.wrmsr(0x982, value, rng_works)
        self.registers[0x9FF] = self.keyid_bits << 32
        return config.tme and not self.active

    def key(self, keyid: int, page: int) -> Key:
        """What a page's memory is encrypted with when it is accessed through a KeyID."""
        mask, base = self.registers[0x983], self.registers[0x984]
        excluded = bits(mask, 11, 11) and (page * PAGE ^ base) & mask >> 12 << 12 == 0
        if keyid == 0 and excluded:
            return PLAIN
        return self.keyids.get(keyid, self.tme)

    def describe(self) -> list[tuple[int, str, str | None]]:
        keyids = [(keyid, MODES[key[0]], key[1]) for keyid, key in sorted(self.keyids.items())]
        return [(0, "platform", self.tme[1]), *keyids]


# --- what may happen --------------------------------------------------------------------------


def often(*likely: Any, rarely: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    return st.sampled_from([*(likely * 4), *rarely])


def exclusions() -> st.SearchStrategy[Exclusion | None]:
    def make(power: int, place: int) -> Exclusion:
        size = PAGE << power
        return Exclusion(base=place * size, size_bytes=size)

    return st.none() | st.builds(make, st.integers(0, 2), st.integers(0, 3))


CONFIGS = st.builds(
    lambda keyid_bits, tme, policy, **others: PlatformConfig(
        keyid_bits=keyid_bits if tme else 0,
        tme=tme,
        policy=policy[0],
        revision=policy[1],
        **others,
    ),
    keyid_bits=often(2, 3, rarely=(0, 1, 15)),
    tme=often(True, rarely=(False,)),
    policy=st.tuples(st.sampled_from(Algorithm), st.sampled_from(Revision)).filter(
        lambda pair: pair != (Algorithm.AES_XTS_128_INTEGRITY, Revision.SPEC_1_4)
    ),
    bypass=often(False, rarely=(True,)),
    save_key_for_standby=st.booleans(),
    exclusion=exclusions(),
    algorithms=often(tuple(Algorithm), rarely=tuple((one,) for one in Algorithm)),
    physical_address_bits=st.sampled_from([32, 46]),
)

ACTIVATIONS = st.builds(
    lambda low, policy, bypass, count, tdx, algorithms, flip: (
        (low | policy << 4 | bypass << 31 | count << 32 | tdx << 36 | algorithms << 48) ^ flip
    ),
    low=often(2, 2 | 4, 2 | 8, 2 | 4 | 8, rarely=tuple(range(16))),
    policy=often(0, 1, 2, rarely=(3, 15)),
    bypass=st.booleans(),
    count=often(0, 2, 3, rarely=(1, 15)),
    tdx=often(0, rarely=(1, 2, 4)),
    algorithms=often(7, rarely=(0, 1, 2, 4, 5, 8)),
    flip=st.one_of(*[st.just(0)] * 6, st.integers(0, 63).map(lambda at: 1 << at)),
)
MASKS = st.builds(
    lambda width, low, enable, flip: (1 << width) - (1 << low) | enable << 11 ^ flip,
    width=st.sampled_from([32, 46]),
    low=st.integers(12, 15),
    enable=often(1, rarely=(0,)),
    flip=st.one_of(*[st.just(0)] * 4, st.integers(0, 63).map(lambda at: 1 << at)),
)
BASES = st.integers(0, 2 * PAGES).map(lambda page: page * PAGE) | st.integers(0, 63).map(
    lambda at: 1 << at
)
WRITES = st.one_of(
    st.tuples(st.just(0x982), ACTIVATIONS),
    st.tuples(st.just(0x983), MASKS),
    st.tuples(st.just(0x984), BASES),
    st.tuples(st.just(0x9FF), often(0, rarely=(6 << 32,))),
    st.tuples(st.sampled_from([*REGISTERS, 0, 0x980, 0x985]), st.integers(0, 2**64 - 1)),
)

KEYIDS = often(0, 1, 2, 3, rarely=(4, 7, 8, 2**15 - 1, 2**16 - 1))
# Keys that share a half with another one, and halves that make a weak key together.
HALVES = [bytes([number]) * 31 + b"!" for number in (1, 2)]
VALID_PROGRAMS = st.builds(
    lambda keyid, command, policy, data_key, tweak_key: b"".join(
        (
            keyid.to_bytes(2, "little"),
            bytes((command, 1 << policy, 0, 0)),
            bytes(58),
            data_key[-KEY_BYTES[POLICIES[policy]] :].ljust(64, b"\0"),
            tweak_key[-KEY_BYTES[POLICIES[policy]] :].ljust(64, b"\0"),
        )
    ),
    keyid=often(1, 2, 3, rarely=(0, 4, 7, 8)),
    command=often(0, 0, 1, 1, 2, 3, rarely=(4,)),
    policy=st.sampled_from([0, 1, 2]),
    data_key=st.sampled_from(HALVES),
    tweak_key=st.sampled_from([*HALVES, bytes(31) + b"3", bytes(31) + b"4"]),
)


def damaged(program: bytes, faults: list[tuple[int, int]]) -> bytes:
    spoilt = bytearray(program)
    for at, value in faults:
        spoilt[at] = value
    return bytes(spoilt)


PLACES = st.sampled_from([*range(8), 63, 64, 80, 95, 96, 127, 128, 144, 160, 191])
FAULTS = st.lists(st.tuples(PLACES, st.sampled_from([0, 1, 2, 4, 5, 128])), min_size=1, max_size=2)
WILD_PROGRAMS = st.builds(damaged, VALID_PROGRAMS, FAULTS) | st.binary(min_size=192, max_size=192)
WORKS = often(True, rarely=(False,) * 2)
PAGE_NUMBERS = st.integers(0, PAGES - 1)


class Source:
    """Random numbers from a seed, which give out on demand."""

    def __init__(self) -> None:
        self.works = True
        self._random = random.Random(1)

    def read_into(self, buffer: memoryview) -> None:
        if not self.works:
            raise OSError(errno.EAGAIN, "gave out on purpose")
        buffer[:] = self._random.randbytes(len(buffer))


class PackageMachine(RuleBasedStateMachine):
    """Does the same to a package and to the model, and compares."""

    @staticmethod
    def sabotage(package: Package) -> None:
        """Nothing; those that are to be found out override it."""

    @initialize(config=CONFIGS)
    def power_on(self, config: PlatformConfig) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="mktme-model-"))
        self.dram = Dram.create(self.directory / "dram", PAGES * PAGE)
        self.source = Source()
        self.package = Package(self.dram, config, Rng(self.source))
        self.sabotage(self.package)
        self.model = Model(config)
        self.model.power(PowerEvent.POWER_CYCLE, True)
        # By page, what was written last, and under which key; and every line ever written.
        self.written: dict[int, tuple[Key, bytes]] = {}
        self.lines: set[bytes] = set()
        self.random = np.random.default_rng(1)

    def teardown(self) -> None:
        if not hasattr(self, "dram"):
            return
        try:
            for keyid in range(min(2**self.model.keyid_bits, 4)):
                self.check_all(keyid)
        finally:
            self.dram.close()
            shutil.rmtree(self.directory)

    @rule(write=WRITES, rng_works=WORKS)
    def write_register(self, write: tuple[int, int], rng_works: bool) -> None:
        msr, value = write
        self.source.works = rng_works
        refusal = None
        try:
            self.package.wrmsr(msr, value)
        except GeneralProtection as error:
            refusal = error
        assert self.model.wrmsr(msr, value, rng_works) == (refusal is None)
        if refusal is not None:
            assert (refusal.msr, refusal.value) == (msr, value)

    @precondition(lambda self: not self.model.locked)
    @rule(value=ACTIVATIONS, rng_works=WORKS)
    def activate(self, value: int, rng_works: bool) -> None:
        self.write_register((0x982, value), rng_works)

    @precondition(lambda self: self.model.keyid_bits)
    @rule(steps=st.lists(st.tuples(VALID_PROGRAMS, WORKS, PAGE_NUMBERS), min_size=1, max_size=5))
    def program(self, steps: list[tuple[bytes, bool, int]]) -> None:
        """Program KeyIDs and write a page through each, as VMs come and go."""
        for program, rng_works, page in steps:
            self.execute(0, 256, program, rng_works, False)
            self.write_through(page, int.from_bytes(program[:2], "little"))

    @rule(
        leaf=often(0, rarely=(1, 2, 2**31)),
        address=often(0, 256, rarely=(1, 128, 255)),
        program=WILD_PROGRAMS,
        rng_works=WORKS,
        busy=often(False, rarely=(True,)),
    )
    def execute(self, leaf: int, address: int, program: bytes, rng_works: bool, busy: bool) -> None:
        self.source.works = rng_works
        outcome: str | int
        with self.package.keys.lock if busy else nullcontext():
            try:
                outcome = int(self.package.pconfig(leaf, address, program))
            except GeneralProtection:
                outcome = GP
            except KeyMaterialError:
                outcome = WEAK_KEY
        assert outcome == self.model.pconfig(leaf, address, program, rng_works, busy)
        if outcome == 0:
            self.check_all(int.from_bytes(program[:2], "little"))

    @rule(event=st.sampled_from(PowerEvent), rng_works=WORKS)
    def power(self, event: PowerEvent, rng_works: bool) -> None:
        self.source.works = rng_works
        failed = False
        try:
            self.package.power(event)
        except FirmwareError:
            failed = True
        assert failed == self.model.power(event, rng_works)
        self.check_all(0)

    @rule(page=PAGE_NUMBERS, keyid=KEYIDS)
    def assign(self, page: int, keyid: int) -> None:
        there = True
        try:
            self.package.controller.assign(page * PAGE, PAGE, keyid)
        except KeyIdError:
            there = False
        assert there == (keyid < 2**self.model.keyid_bits)
        if there:
            self.model.pages[page] = keyid

    @rule(page=PAGE_NUMBERS)
    def write(self, page: int) -> None:
        words = self.random.integers(1, 2**64, (1, 512), np.uint64)
        self.package.controller.update_pages(np.array([page]), words)
        data = words.tobytes()
        key = self.model.key(self.model.pages[page], page)
        self.written[page] = key, data
        self.lines.update(split(data))
        stored = bytearray(PAGE)
        self.dram.read_into(page * PAGE, stored)
        if key == PLAIN:
            assert stored == data
        else:
            assert self.lines.isdisjoint(split(bytes(stored)))

    @rule(page=PAGE_NUMBERS, keyid=KEYIDS)
    def write_through(self, page: int, keyid: int) -> None:
        self.assign(page, keyid)
        self.write(page)
        for other in range(min(2**self.model.keyid_bits, 4)):
            self.check_page(page, other)

    @rule(page=PAGE_NUMBERS, keyid=KEYIDS)
    def read(self, page: int, keyid: int) -> None:
        if keyid >= 2**self.model.keyid_bits:
            with pytest.raises(KeyIdError):
                self.package.controller.read_pages(page, 1, keyid=keyid)
        else:
            self.check_page(page, keyid)

    def check_all(self, keyid: int) -> None:
        for page in range(PAGES):
            self.check_page(page, keyid)

    def check_page(self, page: int, keyid: int) -> None:
        """The plaintext under the key that it was written with, and nobody's under any other."""
        poisoned = np.zeros(1, np.uint64)
        read_pages = self.package.controller.read_pages
        found = read_pages(page, 1, keyid=keyid, poisoned=poisoned).tobytes()
        reader = self.model.key(keyid, page)
        if page not in self.written:
            assert not any(found)
            assert not poisoned[0]
            return
        key, data = self.written[page]
        refused = has_integrity(reader) and key != reader
        assert int(poisoned[0]) == (2**64 - 1 if refused else 0)
        if refused:
            assert found == b"\xff" * PAGE
        elif cipher_of(key) == cipher_of(reader):
            assert found == data
        else:
            assert self.lines.isdisjoint(split(found))

    @invariant()
    def registers_and_keyids_agree(self) -> None:
        found = [self.package.rdmsr(msr) for msr in REGISTERS]
        assert found == [self.model.rdmsr(msr) for msr in REGISTERS]
        keyids = [
            (one.keyid, one.mode.value, one.algorithm.value if one.algorithm else None)
            for one in self.package.keys.describe()
        ]
        assert keyids == self.model.describe()
        assert self.package.keys.keyid_bits == self.model.keyid_bits


def split(data: bytes) -> list[bytes]:
    return [data[at : at + LINE] for at in range(0, len(data), LINE)]


def test_package_does_as_the_documents_say() -> None:
    run_state_machine_as_test(
        PackageMachine,
        settings=settings(max_examples=150, stateful_step_count=40, deadline=None),
    )


# --- packages that are broken on purpose ------------------------------------------------------


def clear_does_nothing(package: Package) -> None:
    package.keys.clear = lambda keyid: None  # type: ignore[method-assign]


def reset_keeps_programmed_keys(package: Package) -> None:
    keys, reset = package.keys, package.keys.reset

    def broken(*, keep_saved_key: bool = True) -> None:
        programmed = dict(keys._programmed)
        keys._programmed.clear()
        reset(keep_saved_key=keep_saved_key)
        keys._programmed.update(programmed)

    keys.reset = broken  # type: ignore[method-assign]


def standby_loses_the_key(package: Package) -> None:
    package.keys.save_tme_key = lambda: None  # type: ignore[method-assign]


def keys_are_drawn_twice(package: Package) -> None:
    class Stuck(Rng):
        def fill(self, buffer: memoryview) -> None:
            super().fill(buffer)  # it may have to fail
            buffer[:] = bytes(range(len(buffer)))

    package.keys._rng = Stuck(package.keys._rng._source)


def keys_share_a_tweak_key(package: Package) -> None:
    program_direct = package.keys.program_direct

    def broken(keyid: int, algorithm: Algorithm, key: bytes | bytearray | memoryview) -> None:
        data_key = bytes(key)[: algorithm.key_bytes // 2]
        tweak_key = bytes(range(100, 100 + len(data_key)))
        weak = bytes(key)[len(data_key) :] == data_key
        program_direct(keyid, algorithm, data_key + (data_key if weak else tweak_key))

    package.keys.program_direct = broken  # type: ignore[method-assign]


def failed_draw_takes_the_old_key_away(package: Package) -> None:
    program_random = package.keys.program_random

    def broken(keyid: int, algorithm: Algorithm, entropy: bytearray | None = None) -> None:
        try:
            program_random(keyid, algorithm, entropy)
        except EntropyError:
            package.keys.clear(keyid)
            raise

    package.keys.program_random = broken  # type: ignore[method-assign,assignment]


def bypass_is_forgotten(package: Package) -> None:
    activate = package.keys.activate
    package.keys.activate = (  # type: ignore[method-assign]
        lambda keyid_bits, *, bypass=False: activate(keyid_bits)
    )


def nothing_is_excluded(package: Package) -> None:
    package.controller.exclude = lambda exclusion: None  # type: ignore[method-assign]
    package.controller.exclude(None)


def lock_is_ignored(package: Package) -> None:
    package.tme._check_unlocked = lambda msr, value: None  # type: ignore[method-assign]


def pages_keep_their_keyids(package: Package) -> None:
    package.controller.reset = lambda: None  # type: ignore[method-assign]


def integrity_is_forgotten(package: Package) -> None:
    package.keys.macs = lambda keyid: None  # type: ignore[method-assign]


def macs_have_one_key(package: Package) -> None:
    macs, same = package.keys.macs, LineMacs(bytes(32))
    package.keys.macs = lambda keyid: same if macs(keyid) else None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "defect",
    [
        clear_does_nothing,
        reset_keeps_programmed_keys,
        standby_loses_the_key,
        keys_are_drawn_twice,
        keys_share_a_tweak_key,
        failed_draw_takes_the_old_key_away,
        bypass_is_forgotten,
        nothing_is_excluded,
        lock_is_ignored,
        pages_keep_their_keyids,
        integrity_is_forgotten,
        macs_have_one_key,
    ],
    ids=lambda defect: defect.__name__,
)
def test_broken_package_is_found_out(defect: Callable[[Package], None]) -> None:
    machine = type("Broken", (PackageMachine,), {"sabotage": staticmethod(defect)})
    with pytest.raises((AssertionError, KeyIdError)):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=2000,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )
