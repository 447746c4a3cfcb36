# SPDX-License-Identifier: GPL-2.0-or-later
"""Sequences of instructions on a package's registers and key table: PCONFIG, WRMSR and RDMSR.

An input is a head, which says what the package is, and a record for each instruction. What must
hold is read off Intel's documents (`mktme.engine.tme`, `mktme.engine.pconfig`): an instruction
that fails changes nothing, and one that succeeds only what it is for.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from mktme.engine import tme as msrs
from mktme.engine.errors import KeyMaterialError
from mktme.engine.keys import KeyDescription, KeyMode, KeyTable
from mktme.engine.pconfig import STRUCT_BYTES, Command, Status, encode, execute
from mktme.engine.tme import (
    ENCODINGS,
    GeneralProtection,
    Revision,
    Tme,
    TmeActivate,
    TmeCapability,
)
from mktme.engine.xts import Algorithm, XtsCipher

from ...unit.engine.fake_rng import FakeRng
from ..mutate import mutate_records, number
from ..target import Target

_ALGORITHMS: Final = tuple(ENCODINGS)
_ALL_MSRS: Final = tuple(msrs.MSR_NAMES)
_LOCKED_MSRS: Final = (0x982, 0x983, 0x984)
_LOCK: Final = 1
_LOCK_AND_ENABLE: Final = 3

# Flags; algorithms; most KeyID bits; most keys; physical address bits above 32.
_PACKAGE: Final = struct.Struct("<BBBHB")
_REVISION, _BYPASS = 1, 2


def _package(head: bytes, rng: FakeRng) -> tuple[Tme, KeyTable]:
    flags, algorithms, keyid_bits, max_keys, address_bits = _PACKAGE.unpack_from(head)
    keys = KeyTable(rng)
    capability = TmeCapability(
        algorithms=frozenset(one for one in _ALGORITHMS if algorithms >> ENCODINGS[one] & 1),
        bypass=bool(flags & _BYPASS),
        max_keyid_bits=keyid_bits & 0xF,
        max_keys=max_keys & 0x7FFF,
    )
    revision = Revision.SPEC_1_4 if flags & _REVISION else Revision.SDM
    return Tme(keys, capability, 32 + address_bits % 21, revision), keys


def _make_package(rng: Random) -> bytes:
    return _PACKAGE.pack(
        rng.getrandbits(2), 0xFF, 15, rng.choice((0x7FFF, 62, 63)), rng.randrange(21)
    )


_EVERYTHING: Final = _PACKAGE.pack(_BYPASS, 0xFF, 15, 0x7FFF, 14)
_EVERYTHING_BY_SPEC: Final = _PACKAGE.pack(_BYPASS | _REVISION, 0xFF, 15, 0x7FFF, 14)


def _ciphers(keys: KeyTable) -> dict[KeyDescription, XtsCipher | None]:
    """The whole key table, as far as anybody may see it; a cipher is itself and no other."""
    return {one: keys.cipher(one.keyid) for one in keys.describe()}


def _rdmsr(tme: Tme, msr: int) -> int | None:
    """None for #GP."""
    try:
        value = tme.rdmsr(msr)
    except GeneralProtection as error:
        assert error.msr == msr
        return None
    assert 0 <= value < 1 << 64
    return value


# --- PCONFIG ----------------------------------------------------------------------------------

# IA32_TME_ACTIVATE, then for each PCONFIG: EAX, RBX, flags, structure.
_ACTIVATE: Final = struct.Struct("<Q")
_PCONFIG: Final = struct.Struct(f"<BHB{STRUCT_BYTES}s")
_PCONFIG_HEAD_BYTES: Final = _PACKAGE.size + _ACTIVATE.size
_NO_ENTROPY, _CONTENTION = 1, 2


def check_pconfig(data: bytes) -> None:
    """Only what is documented comes out; KeyID 0 and what is not named stay as they were."""
    if len(data) < _PCONFIG_HEAD_BYTES:
        return
    rng = FakeRng()
    tme, keys = _package(data, rng)
    try:
        tme.wrmsr(0x982, _ACTIVATE.unpack_from(data, _PACKAGE.size)[0])
    except GeneralProtection:
        assert not tme.active
    end = len(data) - (len(data) - _PCONFIG_HEAD_BYTES) % _PCONFIG.size
    try:
        for leaf, address, flags, program in _PCONFIG.iter_unpack(data[_PCONFIG_HEAD_BYTES:end]):
            rng.broken = bool(flags & _NO_ENTROPY)
            if flags & _CONTENTION:
                with keys.lock:
                    _pconfig(tme, keys, leaf, address, program, busy=True)
            else:
                _pconfig(tme, keys, leaf, address, program, busy=False)
                assert not keys.lock.locked()
    finally:
        keys.reset(keep_saved_key=False)


def _pconfig(
    tme: Tme, keys: KeyTable, leaf: int, address: int, program: bytes, *, busy: bool
) -> None:
    before = _ciphers(keys)
    status = None
    try:
        status = execute(tme, keys, leaf, address, program)
    except GeneralProtection as error:
        assert error.msr is None
    except KeyMaterialError as error:
        halves_equal = program[64:80] == program[128:144]
        assert halves_equal, error
    after = _ciphers(keys)
    if status is not Status.PROG_SUCCESS:
        assert after == before
        assert status in (None, Status.ENTROPY_ERROR, Status.DEVICE_BUSY) or (
            tme.revision is Revision.SPEC_1_4 and status in Status
        )
        return
    assert not busy
    assert tme.active
    assert leaf == 0
    assert address % 256 == 0
    keyid = int.from_bytes(program[:2], "little")
    assert 0 < keyid <= tme.mktme_keyids < keys.keyid_count
    others = [one for one in after if one.keyid != keyid]
    assert others == [one for one in before if one.keyid != keyid]
    assert all(after[one] is before[one] for one in others)
    mode, algorithm = _outcome(program)
    named = next((one for one in after if one.keyid == keyid), None)
    if mode is KeyMode.PLATFORM:
        assert named is None
        assert keys.cipher(keyid) is keys.cipher(0)
    else:
        assert named == KeyDescription(keyid, mode, algorithm)
        assert (keys.cipher(keyid) is None) == (mode is KeyMode.NO_ENCRYPT)


def _outcome(program: bytes) -> tuple[KeyMode, Algorithm | None]:
    """What a structure asks for (336907, tables 6-3 to 6-5)."""
    enc_alg = int.from_bytes(program[3:5], "little")
    (algorithm,) = (one for one in _ALGORITHMS if enc_alg == 1 << ENCODINGS[one])
    match program[2]:
        case 0:
            return KeyMode.DIRECT, algorithm
        case 1:
            return KeyMode.RANDOM, algorithm
        case 2:
            return KeyMode.PLATFORM, algorithm
    return KeyMode.NO_ENCRYPT, None


def _make_pconfig(rng: Random) -> bytes:
    algorithm = rng.choice(_ALGORITHMS)
    command = rng.choice(list(Command))
    key = rng.choice((None, rng.randbytes(algorithm.key_bytes), bytes(algorithm.key_bytes)))
    if command is Command.SET_KEY_DIRECT and rng.randrange(4):
        key = rng.randbytes(algorithm.key_bytes)
    program = encode(rng.choice((0, 1, 2, 3, 62, 63, 64, 0x7FFF)), command, algorithm, key)
    if not rng.randrange(3):
        place = rng.choice((0, 1, 2, 3, 4, 5, 6, 63, 64, 80, 96, 128, 144, 191))
        program[place] ^= 1 << rng.randrange(8)
    flags = rng.choice((0, 0, 0, _NO_ENTROPY, _CONTENTION))
    return _PCONFIG.pack(
        rng.choice((0, 0, 0, 1)), rng.choice((0, 256, 512, 1)), flags, bytes(program)
    )


def _pconfig_seeds() -> Iterator[bytes]:
    """Each command with each algorithm on each revision; then all of them on one package."""
    activate = TmeActivate(
        enable=True, keyid_bits=6, algorithms=msrs.encode_algorithms(_ALGORITHMS)
    )
    every = [
        _PCONFIG.pack(0, 256, 0, bytes(encode(7, command, algorithm, _key(algorithm))))
        for command in Command
        for algorithm in _ALGORITHMS
    ]
    failing = [_PCONFIG.pack(0, 0, flags, every[2][4:]) for flags in (_NO_ENTROPY, _CONTENTION)]
    heads = [
        package + _ACTIVATE.pack(one.encode())
        for package in (_EVERYTHING, _EVERYTHING_BY_SPEC)
        for one in (activate, replace(activate, policy=2, bypass=True, save_key=True))
    ]
    yield from (head + record for head in heads[::2] for record in every)
    yield from (head + b"".join([*every, *failing]) for head in heads)


def _key(algorithm: Algorithm) -> bytes:
    return bytes(range(algorithm.key_bytes))


def _mutate_pconfig(data: bytes, rng: Random) -> bytes:
    if not rng.randrange(8):
        fields = replace(_make_activate(rng), enable=True)
        data = _make_package(rng) + _ACTIVATE.pack(fields.encode()) + data[_PCONFIG_HEAD_BYTES:]
    return mutate_records(data, rng, _PCONFIG_HEAD_BYTES, _PCONFIG.size, _make_pconfig)


# --- MSRs -------------------------------------------------------------------------------------

# Operation, MSR, value.
_STEP: Final = struct.Struct("<BHQ")


class _Operation(enum.IntEnum):
    WRITE = 0
    READ = 1
    RESET = 2
    STANDBY = 3
    BREAK_RNG = 4
    MEND_RNG = 5


@dataclass(frozen=True, slots=True)
class _State:
    """All that anybody may see of a package; a register is None where reading it is a #GP."""

    registers: dict[int, int | None]
    ciphers: dict[KeyDescription, XtsCipher | None]

    @classmethod
    def of(cls, tme: Tme, keys: KeyTable) -> _State:
        return cls({msr: _rdmsr(tme, msr) for msr in _ALL_MSRS}, _ciphers(keys))

    @property
    def locked(self) -> bool:
        return bool((self.registers[0x982] or 0) & _LOCK)


def check_msr(data: bytes) -> None:
    """Only #GP comes out; what is refused changes nothing, and what is locked stays locked."""
    if len(data) < _PACKAGE.size:
        return
    rng = FakeRng()
    tme, keys = _package(data, rng)
    end = len(data) - (len(data) - _PACKAGE.size) % _STEP.size
    state = _State.of(tme, keys)
    try:
        for operation, msr, value in _STEP.iter_unpack(data[_PACKAGE.size : end]):
            before = state
            match _Operation(operation % len(_Operation)):
                case _Operation.WRITE:
                    changes = _wrmsr(tme, msr, value, before)
                    state = _State.of(tme, keys)
                    assert changes or state == before
                    _check_lock(before, state)
                case _Operation.READ:
                    assert _rdmsr(tme, msr) == before.registers.get(msr)
                    assert _State.of(tme, keys) == before
                case _Operation.RESET | _Operation.STANDBY as event:
                    tme.reset()
                    keys.reset(keep_saved_key=event is _Operation.STANDBY)
                    state = _State.of(tme, keys)
                    assert not state.locked
                case _Operation.BREAK_RNG | _Operation.MEND_RNG as event:
                    rng.broken = event is _Operation.BREAK_RNG
            if state is not before:
                _check_registers(tme, keys)
    finally:
        keys.reset(keep_saved_key=False)


def _wrmsr(tme: Tme, msr: int, value: int, before: _State) -> bool:
    """Write a register; False if that was refused."""
    try:
        tme.wrmsr(msr, value)
    except GeneralProtection as error:
        assert (error.msr, error.value) == (msr, value)
        return False
    assert msr in (*_LOCKED_MSRS, 0x9FF)
    # The SDM has a locked write ignored.
    assert msr == 0x9FF or not before.locked or (msr == 0x982 and tme.revision is Revision.SDM)
    return True


def _check_lock(before: _State, after: _State) -> None:
    if before.locked:
        assert all(after.registers[msr] == before.registers[msr] for msr in _LOCKED_MSRS)
        assert after.ciphers == before.ciphers
    assert after.registers[0x981] == before.registers[0x981]


def _check_registers(tme: Tme, keys: KeyTable) -> None:
    """What holds of registers and key table at any time."""
    fields = tme.activate
    assert tme.active == (tme.rdmsr(0x982) & _LOCK_AND_ENABLE == _LOCK_AND_ENABLE)
    assert keys.keyid_bits == (fields.keyid_bits if tme.active else 0)
    assert (keys.cipher(0) is not None) == (tme.active and not fields.bypass)
    assert fields.keyid_bits <= tme.capability.max_keyid_bits
    assert tme.mktme_keyids == tme.rdmsr(0x87) & 0xFFFF_FFFF
    assert tme.mktme_keyids <= min(tme.capability.max_keys, keys.keyid_count - 1)
    exclusion = tme.exclusion
    if exclusion is not None:
        assert exclusion.mask & 0xFFF == exclusion.base & 0xFFF == 0


def _make_step(rng: Random) -> bytes:
    operation = rng.choice((_Operation.WRITE, _Operation.WRITE, *_Operation))
    msr = rng.choice(_ALL_MSRS)
    match msr:
        case 0x982:
            value = _make_activate(rng).encode()
            if not rng.randrange(4):
                value ^= 1 << rng.randrange(64)
        case 0x983:
            top = 32 + rng.randrange(21)
            value = ((1 << top) - 1) & -(1 << rng.randrange(12, 53)) | 1 << 11
        case 0x9FF:
            value = rng.choice((0, 0, 1 << 32))
        case _:
            value = number(rng)
    return _STEP.pack(operation, msr, value)


def _make_activate(rng: Random) -> TmeActivate:
    keyid_bits = rng.choice((0, 1, 6, 15))
    return TmeActivate(
        enable=bool(rng.randrange(8)),
        restore_key=not rng.randrange(4),
        save_key=not rng.randrange(2),
        policy=rng.choice((0, 0, 2, 2, 1)),
        bypass=not rng.randrange(3),
        keyid_bits=keyid_bits,
        tdx_keyid_bits=rng.choice((0, 0, rng.randrange(keyid_bits + 1))),
        algorithms=rng.choice((0, 1, 4, 5, msrs.encode_algorithms(_ALGORITHMS))),
    )


def _msr_seeds() -> Iterator[bytes]:
    """Each register read and written; a boot; a way through standby, and with a broken RNG."""
    address_mask = (1 << 46) - 1
    good = {
        0x983: address_mask & -(1 << 20) | 1 << 11,
        0x984: 16 << 20,
        0x982: TmeActivate(enable=True, save_key=True, keyid_bits=6, algorithms=5).encode(),
        0x9FF: 0,
    }
    restore = TmeActivate(enable=True, restore_key=True, keyid_bits=6, algorithms=5).encode()
    boot = b"".join(_STEP.pack(_Operation.WRITE, msr, value) for msr, value in good.items())
    read = b"".join(_STEP.pack(_Operation.READ, msr, 0) for msr in _ALL_MSRS)
    resume = _STEP.pack(_Operation.STANDBY, 0, 0) + _STEP.pack(_Operation.WRITE, 0x982, restore)
    sequences = [
        boot + read,
        boot + boot,
        boot + resume + read,
        boot + _STEP.pack(_Operation.RESET, 0, 0) + resume,
        _STEP.pack(_Operation.BREAK_RNG, 0, 0)
        + boot
        + _STEP.pack(_Operation.MEND_RNG, 0, 0)
        + boot,
        _STEP.pack(_Operation.WRITE, 0x982, 0) + boot,
        _STEP.pack(_Operation.WRITE, 0x981, 0) + _STEP.pack(_Operation.READ, 0x985, 0),
    ]
    yield from (head + one for head in (_EVERYTHING, _EVERYTHING_BY_SPEC) for one in sequences)


def _mutate_msr(data: bytes, rng: Random) -> bytes:
    return mutate_records(data, rng, _PACKAGE.size, _STEP.size, _make_step)


TARGETS: Final = (
    Target(
        name="pconfig",
        check=check_pconfig,
        seeds=tuple(_pconfig_seeds()),
        max_bytes=_PCONFIG_HEAD_BYTES + 16 * _PCONFIG.size,
        mutate=_mutate_pconfig,
    ),
    Target(
        name="msr",
        check=check_msr,
        seeds=tuple(_msr_seeds()),
        max_bytes=_PACKAGE.size + 16 * _STEP.size,
        mutate=_mutate_msr,
    ),
)
