# SPDX-License-Identifier: GPL-2.0-or-later
"""AES keys in memory, found by their key schedules.

A cipher that is in use keeps its round keys (FIPS 197, section 5.2), and these are full of
relations that nothing else in memory has: J. A. Halderman et al., "Lest We Remember: Cold Boot
Attacks on Encryption Keys", USENIX Security 2008. Whoever finds a schedule has the key: it is the
schedule's beginning, and follows from any other part of it that is as long.

What makes it fast
    Of the words w of a schedule, most obey w[i] ^ w[i-1] = w[i-Nk], Nk words being the key. No
    S-box is in that, and bytes stay in their column; so the relation holds as well for words that
    straddle two of the schedule's. Hence only aligned words of the data are looked at, wherever a
    schedule lies: three arrays of them, moved against each other. Where two words obey it, and so
    do those a key's length behind them, but not the word before them, a row of a schedule may
    begin; which schedule that would be is worked out and tried, relations with an S-box first.
    All zeros obey it trivially, and are left out.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from mktme.proof.key_patterns import SBOX

MAX_ERRORS: Final = 12
"""More bits than this that are wrong, and mostly-zero memory would have to be tried in full."""

MIN_SCHEDULE_BYTES: Final = 176
MAX_SCHEDULE_BYTES: Final = 240
"""Of AES-128, with 11 round keys, to AES-256, with 15."""

_XTS_REACH_BYTES: Final = 512
"""Two schedules that begin this close may be one XTS key's. Linux's struct crypto_aes_ctx has 484
bytes (include/crypto/aes.h), and OpenSSL's AES_KEY 244; an XTS context has two in a row."""

_BATCH_WORDS: Final = 1 << 17  # few calls, and arrays that stay in a core's caches
_HALO_WORDS: Final = 9  # of what follows a batch: a row of AES-256, and one
_BATCH_EDGES: Final = 1 << 10
_WORST_SPREAD: Final = 10
"""How many bits of a schedule's relations one wrong bit can spoil: one where it is itself the
result, one as w[i-Nk], and eight behind an S-box as w[i-1]."""

_Words: TypeAlias = npt.NDArray[np.uint32]
_SUB_BYTES: Final = np.frombuffer(SBOX, np.uint8)
# Rcon (FIPS 197, table 5): powers of x in GF(2^8).
_ROUND_CONSTANTS: Final = (0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x1B, 0x36)


class Form(enum.Enum):
    """Which round keys are kept, and in which order.

    Attributes:
        ENCRYPTION: those of FIPS 197, section 5.2, in their order.
        DECRYPTION: those of the equivalent inverse cipher (section 5.3.5), the last round's
            first: AES-NI's AESDEC wants them so, and Linux and OpenSSL keep them so.
    """

    ENCRYPTION = "encryption"
    DECRYPTION = "decryption"


@dataclass(frozen=True, slots=True)
class KeySchedule:
    """A key schedule that was found. Its repr does not show the key.

    Attributes:
        offset: of its first byte.
        size_bytes: 176, 208 or 240.
        form: which round keys it has.
        swapped: whether the bytes of each 4-byte word are reversed: software without AES
            instructions keeps words as a little-endian CPU's integers.
        errors: how many of its bits are not what they would be: memory that lost its charge.
        key: 16, 24 or 32 bytes.
    """

    offset: int
    size_bytes: int
    form: Form
    swapped: bool
    errors: int
    key: bytes = field(repr=False)

    @property
    def key_bits(self) -> int:
        """128, 192 or 256."""
        return 8 * len(self.key)


@dataclass(frozen=True, slots=True)
class _Shape:
    """A kind of schedule, and where its words tell of it.

    Attributes:
        step: of the relation w[p] ^ w[p-1] = w[p+step], in words of the schedule as it is kept.
        order: in which words are tried: those with an S-box tell most.
        anchors: int64, shape (n,): bytes from the schedule's first to where two words in a row
            may begin that obey it, as do those of the next row; they are aligned in the data, not
            in the schedule.
    """

    key_words: int
    rounds: int
    form: Form
    step: int
    order: tuple[int, ...]
    anchors: npt.NDArray[np.int64]

    @property
    def words(self) -> int:
        return 4 * (self.rounds + 1)

    def word(
        self, memory: _Words, starts: npt.NDArray[np.int64], index: int, swapped: bool
    ) -> _Words:
        """A word of some schedules, as it would be for encryption.

        Args:
            memory: uint32, shape (n,): the four bytes from each address on.
            starts: where each schedule begins, shape (k,).
            index: in the order of FIPS 197.
            swapped: whether the bytes of words are kept reversed.

        Returns:
            uint32, shape (k,).
        """
        row, column = divmod(index, 4)
        kept = index if self.form is Form.ENCRYPTION else 4 * (self.rounds - row) + column
        found = memory[starts + 4 * kept]
        if swapped:
            found = found.byteswap()
        if self.form is Form.DECRYPTION and 0 < row < self.rounds:
            found = _mix_columns(found)
        return found

    @classmethod
    def make(cls, key_words: int, form: Form) -> _Shape:
        rounds = key_words + 6
        if form is Form.ENCRYPTION:
            step = -key_words
            obey = {p for p in range(key_words, 4 * rounds + 4) if _is_linear(p, key_words)}
        else:
            # InvMixColumns is linear, so the relation holds for words that it was applied to: not
            # those of the first and the last round. Rounds are in reverse, words in them are not.
            step = key_words
            last = rounds - 1 - key_words // 4
            obey = {4 * row + word for row in range(1, last + 1) for word in (1, 2, 3)}
        anchors = [
            4 * p + shift
            for p in sorted(obey)
            for shift in range(4)
            if {p + 1, p + key_words, p + key_words + 1} <= obey
            and (shift == 0 or {p + 2, p + key_words + 2} <= obey)
        ]
        order = sorted(range(key_words, 4 * rounds + 4), key=lambda one: _is_linear(one, key_words))
        return cls(key_words, rounds, form, step, tuple(order), np.array(anchors, np.int64))


def _is_linear(index: int, key_words: int) -> bool:
    """Whether a word of a schedule is made without an S-box."""
    return index % key_words != 0 and not (key_words == 8 and index % 8 == 4)


# Rounds that are reversed tear AES-192's rows of six words apart: two words in a row that obey the
# relation are left, and those are everywhere. Its encryption schedule is kept as well.
_SHAPES: Final = (
    *(_Shape.make(words, Form.ENCRYPTION) for words in (4, 6, 8)),
    *(_Shape.make(words, Form.DECRYPTION) for words in (4, 8)),
)


def find_schedules(data: npt.NDArray[np.uint8], max_errors: int = 0) -> list[KeySchedule]:
    """Find the AES key schedules in some memory, at each byte offset.

    With errors, a schedule is found if two of its rows, one behind the other, have none, nor has
    some stretch as long as the key: certain for two wrong bits, and likely for one bit in 200.
    Schedules for decryption are found without errors only.

    Args:
        data: uint8, shape (n,), contiguous.
        max_errors: how many of a schedule's bits may be wrong, up to `MAX_ERRORS`.

    Returns:
        What was found, ascending.

    Raises:
        ValueError: more errors than can be told from noise.
    """
    if not 0 <= max_errors <= MAX_ERRORS:
        raise ValueError(f"0 to {MAX_ERRORS} bits of a schedule may be wrong, not {max_errors}")
    if len(data) < MIN_SCHEDULE_BYTES:
        return []
    words = data[: len(data) // 4 * 4].view("<u4")
    memory = np.ndarray(len(data) - 3, "<u4", data, strides=1)
    found: dict[tuple[int, Form], KeySchedule] = {}
    for shape, edges in zip(_SHAPES, _edges(words), strict=True):
        tolerated = max_errors if shape.form is Form.ENCRYPTION else 0
        for first in range(0, len(edges), _BATCH_EDGES):
            starts = (4 * edges[first : first + _BATCH_EDGES, np.newaxis] - shape.anchors).ravel()
            starts = starts[(starts >= 0) & (starts <= len(data) - 4 * shape.words)]
            for swapped in (False, True):
                for start in _candidates(memory, starts, shape, swapped, _WORST_SPREAD * tolerated):
                    one = _nearest(memory, int(start), shape, swapped)
                    if one.errors <= tolerated:
                        found[one.offset, one.form] = one
    return sorted(found.values(), key=lambda one: one.offset)


def xts_partners(found: Sequence[KeySchedule]) -> dict[int, int]:
    """Which schedules are likely to be an XTS key's two: data key and tweak key.

    They are next to each other, equally long, and of different keys. Which of them is which, they
    do not tell: Linux has the tweak key first, OpenSSL the data key.

    Args:
        found: ascending.

    Returns:
        Of each schedule that has one, by its index: the index of its partner.
    """
    # A key's schedules for encryption and for decryption are one place.
    places: list[list[int]] = []
    for index, one in enumerate(found):
        last = found[places[-1][0]] if places else None
        if last is not None and last.key == one.key and one.offset - last.offset < _XTS_REACH_BYTES:
            places[-1].append(index)
        else:
            places.append([index])
    partners: dict[int, int] = {}
    at = 0
    while at + 1 < len(places):
        here, there = places[at], places[at + 1]
        one, other = found[here[0]], found[there[0]]
        close = other.offset - one.offset <= _XTS_REACH_BYTES
        if close and one.key_bits == other.key_bits and one.key != other.key:
            partners |= dict.fromkeys(here, there[0]) | dict.fromkeys(there, here[0])
            at += 1
        at += 1
    return partners


# --- where a schedule may be ------------------------------------------------------------------


def _edges(words: _Words) -> list[npt.NDArray[np.int64]]:
    """Indices of words where a row of a schedule may begin, for each of `_SHAPES`."""
    count = len(words)
    most = min(count, _BATCH_WORDS + _HALO_WORDS)
    change = np.empty(most, np.uint32)
    obeys, pairs, edges = np.empty((3, most + 1), np.bool_)
    found: list[list[npt.NDArray[np.int64]]] = [[] for _shape in _SHAPES]
    for first in range(0, count, _BATCH_WORDS):
        low, high = max(1, first), min(count, first + _BATCH_WORDS + _HALO_WORDS)
        np.bitwise_xor(words[low:high], words[low - 1 : high - 1], out=change[: high - low])
        for shape, of_shape in zip(_SHAPES, found, strict=True):
            step, row = shape.step, shape.key_words
            start, stop = max(low, -step), min(high, count - max(step, 0))
            beginnings = min(stop - row - 1, first + _BATCH_WORDS) - start
            if beginnings < 1:
                continue
            obey = obeys[: stop - start + 1]
            obey[0] = False  # the word before the batch: if it did, one more place to try
            here, there = change[start - low : stop - low], words[start + step : stop + step]
            np.equal(here, there, out=obey[1:])
            pair = np.logical_and(obey[1:-1], obey[2:], out=pairs[: stop - start - 1])
            edge = edges[:beginnings]
            np.logical_and(pair[:beginnings], pair[row : row + beginnings], out=edge)
            np.greater(edge, obey[:beginnings], out=edge)
            if edge.any():
                places = np.flatnonzero(edge) + start
                # But not zeros, and words that repeat each other.
                told = (words[places + step] | words[places + step + 1]) != 0
                of_shape.append(places[told])
    return [np.concatenate([np.empty(0, np.int64), *of_shape]) for of_shape in found]


# --- whether it is one ------------------------------------------------------------------------


def _candidates(
    memory: _Words,
    starts: npt.NDArray[np.int64],
    shape: _Shape,
    swapped: bool,
    tolerated_bits: int,
) -> npt.NDArray[np.int64]:
    """Those places where no more bits of a schedule's relations are wrong than are tolerated.

    None being tolerated, that is: where a schedule is. What is none is found out early, as the
    relations that have an S-box in them come first.
    """
    size = shape.key_words
    wrong_bits = np.zeros(len(starts), np.int64)
    for index in shape.order:
        before, behind, here = (
            shape.word(memory, starts, one, swapped) for one in (index - size, index - 1, index)
        )
        wrong_bits += np.bitwise_count(here ^ before ^ _temp(behind, index, size))
        kept = wrong_bits <= tolerated_bits
        starts, wrong_bits = starts[kept], wrong_bits[kept]
        if not len(starts):
            break
    return np.unique(starts)


def _nearest(memory: _Words, start: int, shape: _Shape, swapped: bool) -> KeySchedule:
    """The schedule that is nearest to what is kept somewhere.

    Each stretch as long as the key is taken for right in turn, and the others follow.
    """
    size = shape.key_words
    at = np.array([start])
    kept = np.concatenate([shape.word(memory, at, one, swapped) for one in range(shape.words)])
    bases = [*range(0, shape.words - size, size), shape.words - size]
    guesses = np.repeat(kept[:, np.newaxis], len(bases), axis=1)
    for number, base in enumerate(bases):
        guess = guesses[:, number : number + 1]
        for index in range(base + size - 1, size - 1, -1):
            guess[index - size] = guess[index] ^ _temp(guess[index - 1], index, size)
    for index in range(size, shape.words):
        guesses[index] = guesses[index - size] ^ _temp(guesses[index - 1], index, size)
    errors = np.bitwise_count(guesses ^ kept[:, np.newaxis]).sum(axis=0)
    best = int(errors.argmin())
    return KeySchedule(
        offset=start,
        size_bytes=4 * shape.words,
        form=shape.form,
        swapped=swapped,
        errors=int(errors[best]),
        key=guesses[:size, best].tobytes(),
    )


# --- AES on words -----------------------------------------------------------------------------
#
# A word's first byte in memory is its lowest here, so RotWord turns right.


def _rotated(words: _Words, bits: int) -> _Words:
    return words >> np.uint32(bits) | words << np.uint32(32 - bits)


def _temp(previous: _Words, index: int, key_words: int) -> _Words:
    """What word `index` is made of besides w[i-Nk]: "temp" in FIPS 197, section 5.2.

    Args:
        previous: uint32, shape (n,): word `index` - 1 of some schedules.
        index: at least `key_words`.
        key_words: words of a key.
    """
    if _is_linear(index, key_words):
        return previous
    substituted: _Words = _SUB_BYTES[previous.view(np.uint8)].view(np.uint32)
    if index % key_words:
        return substituted
    return _rotated(substituted, 8) ^ np.uint32(_ROUND_CONSTANTS[index // key_words - 1])


def _mix_columns(columns: _Words) -> _Words:
    """MixColumns, which undoes InvMixColumns (FIPS 197, section 5.1.3): uint32, shape (n,)."""
    high = columns >> np.uint32(7) & np.uint32(0x0101_0101)
    twice = (columns & np.uint32(0x7F7F_7F7F)) << np.uint32(1) ^ high * np.uint32(0x1B)
    return twice ^ _rotated(twice ^ columns, 8) ^ _rotated(columns, 16) ^ _rotated(columns, 24)
