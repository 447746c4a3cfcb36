# SPDX-License-Identifier: GPL-2.0-or-later
"""What became of a guest's page: the outcomes of tampering, told apart.

XTS encrypts each 16-byte block of a 64-byte line by itself, mixed with the line's address and the
block's place in it (NIST SP 800-38E). So a change of ciphertext makes noise of the blocks that it
is in, all of each and none other.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mktme.engine.xts import LINE_BYTES, LINES_PER_PAGE, PAGE_BYTES

BLOCK_BYTES: Final = 16
ALL_LINES: Final = (1 << LINES_PER_PAGE) - 1
_BLOCKS_PER_LINE: Final = LINE_BYTES // BLOCK_BYTES
_BLOCK_BITS: Final = BLOCK_BYTES * 8
# Of 128 bits of noise half differ from anything, +- 5.7 (one sigma). Six sigma: once in 10^9.
_NOISE_BITS: Final = range(_BLOCK_BITS // 2 - 34, _BLOCK_BITS // 2 + 35)


class Outcome(enum.Enum):
    """What tampering led to."""

    INTACT = "as written"
    """The reader gets what the guest wrote."""
    ONE_BLOCK = "one block"
    """One 16-byte block is noise, and only that one."""
    GARBAGE = "garbage"
    """All blocks of the lines that were attacked are noise, and only they."""
    OLD_DATA = "old data"
    """The lines that were attacked are what the guest wrote there before, and it is not told."""
    ZEROS = "zeros"
    """The lines that were attacked are zeros, and the guest is not told."""
    MACHINE_CHECK = "#MC"
    """The guest's kernel reports a machine check, and the host knows of the line."""
    REFUSED = "refused"
    """The reader gets nothing but an integrity violation."""
    OTHER = "other"
    """None of these."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What became of a page, and why it is not clearer than that."""

    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """What a reader of a page may know.

    Attributes:
        page: what was written last.
        earlier: what was written before that, if anything.
        others: what other plaintext there is that must not turn up: no block of it is noise.
    """

    page: bytes
    earlier: bytes | None = None
    others: tuple[bytes, ...] = ()


def classify(found: bytes, written: Written, lines: int) -> Damage:
    """Say what became of a page.

    Args:
        found: the page as somebody reads it.
        written: what it could be.
        lines: which of its lines were attacked (bit i: line i).

    Raises:
        ValueError: a page is not 4096 bytes.
    """
    for page in (found, written.page, written.earlier or found, *written.others):
        if len(page) != PAGE_BYTES:
            raise ValueError(f"a page of {len(page)} bytes")
    changed = [
        block
        for block in range(PAGE_BYTES // BLOCK_BYTES)
        if _at(found, block) != _at(written.page, block)
    ]
    if not changed:
        return Damage(Outcome.INTACT)
    beside = [block for block in changed if not lines >> block // _BLOCKS_PER_LINE & 1]
    if beside:
        return Damage(Outcome.OTHER, f"{len(beside)} blocks that were left alone changed")
    attacked = [
        block
        for block in range(PAGE_BYTES // BLOCK_BYTES)
        if lines >> block // _BLOCKS_PER_LINE & 1
    ]
    if not any(any(_at(found, block)) for block in attacked):
        return Damage(Outcome.ZEROS)
    if written.earlier is not None and all(
        _at(found, block) == _at(written.earlier, block) for block in attacked
    ):
        return Damage(Outcome.OLD_DATA)
    told = _why_no_noise(found, written, changed)
    if told is not None:
        return Damage(Outcome.OTHER, told)
    if len(changed) == 1:
        return Damage(Outcome.ONE_BLOCK)
    if changed == attacked:
        return Damage(Outcome.GARBAGE)
    return Damage(Outcome.OTHER, f"{len(changed)} of {len(attacked)} blocks are noise")


def _why_no_noise(found: bytes, written: Written, blocks: Iterable[int]) -> str | None:
    """What is wrong with blocks that should be noise; None if they are."""
    known = {bytes(BLOCK_BYTES), b"\xff" * BLOCK_BYTES}
    for page in (written.page, written.earlier or b"", *written.others):
        known |= {page[at : at + BLOCK_BYTES] for at in range(0, len(page), BLOCK_BYTES)}
    seen: set[bytes] = set()
    for block in blocks:
        data = _at(found, block)
        if data in known:
            return f"block {block} is plaintext that is known"
        if data in seen:
            return f"block {block} is as another"
        seen.add(data)
        # Not only what was there: ciphertext that can be shaped gives the old plaintext, changed.
        for other in (_at(written.page, block), _at(written.earlier or written.page, block)):
            bits = (int.from_bytes(data) ^ int.from_bytes(other)).bit_count()
            if bits not in _NOISE_BITS:
                return (
                    f"block {block} differs in {bits} of {_BLOCK_BITS} bits from what was written"
                )
    return None


def _at(page: bytes, block: int) -> bytes:
    return page[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
