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
    schedule lies: three arrays of them, moved against each other. Where two words in a row obey
    it, and the one before them does not, a row of a schedule may begin; what schedule that would
    be is worked out and compared in full. All zeros obey it trivially, and are left out.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from mktme.proof.key_patterns import SBOX

MAX_ERRORS: Final = 12
"""More bits than this that are wrong, and mostly-zero memory would have to be tried in full."""

MAX_SCHEDULE_BYTES: Final = 240
"""Of AES-256: 15 round keys."""

_XTS_REACH_BYTES: Final = 512
"""Two schedules that begin this close may be one XTS key's. Linux's struct crypto_aes_ctx has 484
bytes (include/crypto/aes.h), and OpenSSL's AES_KEY 244; an XTS context has two in a row."""

_BATCH_WORDS: Final = 1 << 16  # the arrays for this many fit a core's L2 cache
_BATCH_EDGES: Final = 1 << 10
_BATCH_STARTS: Final = 1 << 12
_WORST_SPREAD: Final = 10
"""How many bits of a schedule's relations one wrong bit can spoil: one where it is itself the
result, one as w[i-Nk], and eight behind an S-box as w[i-1]."""

_Bytes: TypeAlias = npt.NDArray[np.uint8]
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
        anchors: int64, shape (n,): bytes from the schedule's first to where two aligned words in
            a row may begin that obey it; aligned in the data, not in the schedule.
    """

    key_words: int
    rounds: int
    form: Form
    step: int
    anchors: npt.NDArray[np.int64]

    @property
    def words(self) -> int:
        return 4 * (self.rounds + 1)

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
            if p + 1 in obey and (shift == 0 or p + 2 in obey)
        ]
        return cls(key_words, rounds, form, step, np.array(anchors, np.int64))


def _is_linear(index: int, key_words: int) -> bool:
    """Whether a word of a schedule is made without an S-box."""
    return index % key_words != 0 and not (key_words == 8 and index % 8 == 4)


# Rounds that are reversed tear AES-192's rows of six words apart: two words in a row that obey the
# relation are left, and those are everywhere. Its encryption schedule is kept as well.
_SHAPES: Final = (
    *(_Shape.make(words, Form.ENCRYPTION) for words in (4, 6, 8)),
    *(_Shape.make(words, Form.DECRYPTION) for words in (4, 8)),
)


def find_schedules(data: _Bytes, max_errors: int = 0) -> list[KeySchedule]:
    """Find the AES key schedules in some memory, at each byte offset.

    With errors, a schedule is found if there is a row in it, and a stretch as long as the key,
    without any: certain for two wrong bits, and nearly so for one bit in 200. Those of
    decryption are found without errors only.

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
    words = data[: len(data) // 4 * 4].view("<u4")
    found: dict[tuple[int, Form], KeySchedule] = {}
    for shape, edges in _edges(words):
        for first in range(0, len(edges), _BATCH_EDGES):
            some = edges[first : first + _BATCH_EDGES, np.newaxis]
            starts = np.unique(4 * some - shape.anchors)
            starts = starts[(starts >= 0) & (starts <= len(data) - 4 * shape.words)]
            for one in _confirmed(data, starts, shape, max_errors):
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


def _edges(words: npt.NDArray[np.uint32]) -> Iterator[tuple[_Shape, npt.NDArray[np.int64]]]:
    """Indices of words where a row of a schedule may begin, by kind of schedule."""
    count = len(words)
    change = np.empty(_BATCH_WORDS + 2, np.uint32)
    obeys = np.empty(_BATCH_WORDS + 2, np.bool_)
    pairs = np.empty(_BATCH_WORDS + 1, np.bool_)
    for first in range(0, count, _BATCH_WORDS):
        # One word more at either end: what begins in this batch shows next to its border.
        low = max(1, first - 1)
        high = min(count, first + _BATCH_WORDS + 1)
        np.bitwise_xor(words[low:high], words[low - 1 : high - 1], out=change[: high - low])
        for shape in _SHAPES:
            step = shape.step
            start, stop = max(low, -step), min(high, count - step)
            if stop - start < 3:
                continue
            obey = obeys[: stop - start]
            pair = pairs[: stop - start - 1]
            np.equal(change[start - low : stop - low], words[start + step : stop + step], out=obey)
            np.logical_and(obey[:-1], obey[1:], out=pair)
            begins_here = bool(pair[0]) and start == max(1, -step)
            edge = np.greater(pair[1:], obey[:-2], out=pair[1:])
            found = np.flatnonzero(edge) + (start + 1)
            if begins_here:
                found = np.append(start, found)
            if len(found):
                found = found[(words[found + step] | words[found + step + 1]) != 0]
            if len(found):
                yield shape, found


# --- whether it is one ------------------------------------------------------------------------


def _confirmed(
    data: _Bytes, starts: npt.NDArray[np.int64], shape: _Shape, max_errors: int
) -> Iterator[KeySchedule]:
    """The schedules among what begins at `starts`, in full."""
    for first in range(0, len(starts), _BATCH_STARTS):
        some = starts[first : first + _BATCH_STARTS]
        kept = np.lib.stride_tricks.sliding_window_view(data, 4 * shape.words)[some]
        in_words = kept.reshape(len(some), shape.words, 4)
        for swapped in (False, True):
            schedules = in_words[:, :, ::-1] if swapped else in_words
            if shape.form is Form.DECRYPTION:
                schedules = _encryption_form(schedules)
            tolerated = _WORST_SPREAD * max_errors if shape.form is Form.ENCRYPTION else 0
            for index in np.flatnonzero(_spoilt_bits(schedules, shape.key_words) <= tolerated):
                key, errors = _nearest(schedules[index], shape)
                if errors <= max_errors:
                    yield KeySchedule(
                        offset=int(some[index]),
                        size_bytes=4 * shape.words,
                        form=shape.form,
                        swapped=swapped,
                        errors=errors,
                        key=key,
                    )


def _temp(previous: _Bytes, index: int, key_words: int) -> _Bytes:
    """What word `index` is made of besides w[i-Nk]: FIPS 197's "temp" (figure 11).

    Args:
        previous: uint8, shape (..., 4): word `index` - 1 of some schedules.
        index: at least `key_words`.
        key_words: words of a key.
    """
    if _is_linear(index, key_words):
        return previous
    if index % key_words:
        return _SUB_BYTES[previous]
    mixed = _SUB_BYTES[np.roll(previous, -1, axis=-1)]
    mixed[..., 0] ^= _ROUND_CONSTANTS[index // key_words - 1]
    return mixed


def _spoilt_bits(schedules: _Bytes, key_words: int) -> npt.NDArray[np.int64]:
    """How many bits of their relations do not hold: none, if they are schedules.

    Args:
        schedules: uint8, shape (n, words, 4), as for encryption.
        key_words: words of a key.

    Returns:
        int64, shape (n,).
    """
    spoilt = np.zeros(len(schedules), np.int64)
    for index in range(key_words, schedules.shape[1]):
        wrong = schedules[:, index] ^ schedules[:, index - key_words]
        wrong ^= _temp(schedules[:, index - 1], index, key_words)
        spoilt += np.bitwise_count(wrong).sum(axis=-1, dtype=np.int64)
    return spoilt


def _nearest(schedule: _Bytes, shape: _Shape) -> tuple[bytes, int]:
    """The key whose schedule is nearest to one with errors, and how many bits are wrong.

    Each stretch as long as the key is taken for right in turn, and the others follow.

    Args:
        schedule: uint8, shape (words, 4), as for encryption.
        shape: its kind.
    """
    size = shape.key_words
    bases = [*range(0, shape.words - size, size), shape.words - size]
    guesses = np.repeat(schedule[np.newaxis], len(bases), axis=0)
    for guess, base in zip(guesses, bases, strict=True):
        for index in range(base + size - 1, size - 1, -1):
            guess[index - size] = guess[index] ^ _temp(guess[index - 1], index, size)
    for index in range(size, shape.words):
        guesses[:, index] = guesses[:, index - size] ^ _temp(guesses[:, index - 1], index, size)
    errors = np.bitwise_count(guesses ^ schedule).sum(axis=(1, 2))
    best = int(errors.argmin())
    return guesses[best, :size].tobytes(), int(errors[best])


def _encryption_form(schedules: _Bytes) -> _Bytes:
    """Schedules of decryption as those of encryption that they are made of.

    Args:
        schedules: uint8, shape (n, words, 4), the last round first.
    """
    count, words, _ = schedules.shape
    rounds = schedules.reshape(count, words // 4, 4, 4)[:, ::-1].copy()
    inner = rounds[:, 1:-1]  # MixColumns undoes InvMixColumns (FIPS 197, section 5.1.3)
    twice = inner << 1 ^ (inner >> 7) * np.uint8(0x1B)
    rounds[:, 1:-1] = (
        twice
        ^ np.roll(twice ^ inner, -1, axis=-1)
        ^ np.roll(inner, -2, axis=-1)
        ^ np.roll(inner, -3, axis=-1)
    )
    return rounds.reshape(count, words, 4)
