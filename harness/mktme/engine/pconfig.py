# SPDX-License-Identifier: GPL-2.0-or-later
"""PCONFIG, leaf MKTME_KEY_PROGRAM: how software programs a KeyID.

Sources: Intel SDM vol. 2B, PCONFIG (Operation; table 4-16 is the structure), and Intel
336907-004, tables 6-2 to 6-6. `mktme.engine.tme.Revision` says which is followed where they
disagree. One rule is ours: a key whose two halves are equal is refused, where the documents leave
that to software (FIPS 140-3 IG C.I; docs/adr/0005).
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from mktme.engine.errors import KeyIdError, KeyMaterialError
from mktme.engine.keys import KeyTable
from mktme.engine.rng import EntropyError
from mktme.engine.tme import ENCODINGS, GeneralProtection, Revision, Tme
from mktme.engine.xts import Algorithm, wipe

MKTME_KEY_PROGRAM: Final = 0
STRUCT_BYTES: Final = 192
STRUCT_ALIGN_BYTES: Final = 256
KEY_FIELD_1: Final = 64
KEY_FIELD_2: Final = 128
KEY_FIELD_BYTES: Final = 64

_HEADER: Final = struct.Struct("<HI")  # KEYID, KEYID_CTRL


class Command(enum.IntEnum):
    """KEYID_CTRL[7:0] (336907 table 6-5)."""

    SET_KEY_DIRECT = 0
    SET_KEY_RANDOM = 1
    CLEAR_KEY = 2
    NO_ENCRYPT = 3


class Status(enum.IntEnum):
    """What PCONFIG leaves in RAX (336907 table 6-6)."""

    PROG_SUCCESS = 0
    INVALID_PROG_CMD = 1
    ENTROPY_ERROR = 2
    INVALID_KEYID = 3
    INVALID_ENC_ALG = 4
    DEVICE_BUSY = 5

    @property
    def zf(self) -> bool:
        """What it leaves in RFLAGS.ZF, which software looks at first."""
        return self is not Status.PROG_SUCCESS


def encode(
    keyid: int,
    command: Command,
    algorithm: Algorithm,
    key: bytes | bytearray | memoryview | None = None,
) -> bytearray:
    """Lay out MKTME_KEY_PROGRAM_STRUCT, 192 bytes.

    Args:
        keyid: what to program.
        command: how.
        algorithm: what for; every command names one that is activated.
        key: data key, then tweak key; with SET_KEY_RANDOM, entropy of the same size to mix in.

    Returns:
        The structure, which holds the key: the caller wipes it.

    Raises:
        KeyIdError: the KeyID does not fit its 16 bits.
        KeyMaterialError: the key has not the algorithm's length.
    """
    if not 0 <= keyid < 1 << 16:
        raise KeyIdError(f"KeyID {keyid} has more than 16 bits", keyid=keyid)
    program = bytearray(STRUCT_BYTES)
    _HEADER.pack_into(program, 0, keyid, command | 1 << 8 + ENCODINGS[algorithm])
    if key is not None:
        place_key(program, algorithm, key)
    return program


def place_key(
    program: bytearray, algorithm: Algorithm, key: bytes | bytearray | memoryview
) -> None:
    """Put a data key and a tweak key into a structure's two key fields.

    Raises:
        KeyMaterialError: the key has not the algorithm's length.
    """
    material = memoryview(key).cast("B")
    if len(material) != algorithm.key_bytes:
        raise KeyMaterialError(
            f"{algorithm.value} needs a key of {algorithm.key_bytes} bytes, "
            f"this one has {len(material)}"
        )
    half = algorithm.key_bytes // 2
    program[KEY_FIELD_1 : KEY_FIELD_1 + half] = material[:half]
    program[KEY_FIELD_2 : KEY_FIELD_2 + half] = material[half:]


def named_algorithm(program: bytes | bytearray | memoryview) -> Algorithm | None:
    """The algorithm that a structure names, None unless it is exactly one that there is."""
    _, control = _HEADER.unpack_from(program)
    return _BY_BIT.get(control >> 8 & 0xFFFF)


def execute(
    tme: Tme, keys: KeyTable, leaf: int, address: int, program: bytes | bytearray | memoryview
) -> Status:
    """Execute PCONFIG at privilege level 0.

    Args:
        tme: the package's registers.
        keys: its key table.
        leaf: EAX.
        address: RBX, of which only the alignment matters here.
        program: the 192 bytes there.

    Returns:
        What RAX holds afterwards.

    Raises:
        ValueError: ``program`` has not 192 bytes.
        GeneralProtection: #GP(0).
        KeyMaterialError: data key and tweak key are equal; the KeyID keeps what it had.
    """
    if len(program) != STRUCT_BYTES:
        raise ValueError(f"MKTME_KEY_PROGRAM_STRUCT has {STRUCT_BYTES} bytes, not {len(program)}")
    if leaf != MKTME_KEY_PROGRAM:
        raise GeneralProtection(f"PCONFIG has no leaf {leaf:#x}")
    active = tme.activate
    if not tme.active or not active.keyid_bits:
        raise GeneralProtection("PCONFIG before MKTME was activated")
    if address % STRUCT_ALIGN_BYTES:
        raise GeneralProtection(f"PCONFIG: {address:#x} is not aligned to 256 bytes")
    by_sdm = tme.revision is Revision.SDM
    keyid, control = _HEADER.unpack_from(program)
    command, enc_alg = control & 0xFF, control >> 8 & 0xFFFF
    if not by_sdm and any(program[_HEADER.size : KEY_FIELD_1]):
        raise GeneralProtection("PCONFIG: RSVD is not zero")
    if control >> 24:
        raise GeneralProtection("PCONFIG: KEYID_CTRL[31:24] is reserved")
    if not by_sdm:
        _check_key_fields(memoryview(program), enc_alg)

    failure = _find_failure(tme, keyid, command, enc_alg)
    if failure is not None:
        if by_sdm:
            raise GeneralProtection(f"PCONFIG: {failure.name}")
        return failure
    if not keys.lock.acquire(blocking=False):
        return Status.DEVICE_BUSY
    try:
        return _update(keys, keyid, Command(command), _BY_BIT[enc_alg], memoryview(program))
    finally:
        keys.lock.release()


def _find_failure(tme: Tme, keyid: int, command: int, enc_alg: int) -> Status | None:
    """What is wrong with the fields, in the order in which both documents look at them."""
    if command > max(Command):
        return Status.INVALID_PROG_CMD
    if not 0 < keyid <= tme.mktme_keyids:
        return Status.INVALID_KEYID
    if enc_alg not in _BY_BIT or not enc_alg & tme.activate.algorithms:
        return Status.INVALID_ENC_ALG
    return None


def _update(
    keys: KeyTable, keyid: int, command: Command, algorithm: Algorithm, program: memoryview
) -> Status:
    """Change the key table, which is ours alone."""
    half = algorithm.key_bytes // 2
    match command:
        case Command.SET_KEY_DIRECT | Command.SET_KEY_RANDOM:
            material = bytearray(algorithm.key_bytes)
            try:
                material[:half] = program[KEY_FIELD_1 : KEY_FIELD_1 + half]
                material[half:] = program[KEY_FIELD_2 : KEY_FIELD_2 + half]
                if command is Command.SET_KEY_DIRECT:
                    keys.program_direct(keyid, algorithm, material)
                else:
                    keys.program_random(keyid, algorithm, material)
            except EntropyError:
                return Status.ENTROPY_ERROR
            finally:
                wipe(material)
        case Command.CLEAR_KEY:
            keys.clear(keyid)
        case Command.NO_ENCRYPT:
            keys.program_no_encrypt(keyid)
    return Status.PROG_SUCCESS


def _check_key_fields(program: memoryview, enc_alg: int) -> None:
    """336907 wants zeros behind the keys, and looks at ENC_ALG bit by bit to know where."""
    for bit, algorithm in _BY_BIT.items():
        if not enc_alg & bit:
            continue
        half = algorithm.key_bytes // 2
        for field in (KEY_FIELD_1, KEY_FIELD_2):
            if any(program[field + half : field + KEY_FIELD_BYTES]):
                raise GeneralProtection("PCONFIG: a key field has bytes behind its key")


_BY_BIT: Final = {1 << number: algorithm for algorithm, number in ENCODINGS.items()}
