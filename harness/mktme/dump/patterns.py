# SPDX-License-Identifier: GPL-2.0-or-later
"""What a search looks for, and how it finds that in a piece of memory.

Text, bytes and regular expressions are matched by Hyperscan, all in one pass; it lets other
threads run meanwhile (docs/adr/0015-hyperscan.md). AES key schedules: `mktme.dump.aes_keys`.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, cast

import hyperscan
import numpy as np
import numpy.typing as npt

from mktme.dump.aes_keys import MAX_ERRORS, MAX_SCHEDULE_BYTES, KeySchedule, find_schedules
from mktme.engine.errors import MktmeError

DEFAULT_MATCH_BYTES: Final = 4096
MAX_MATCH_BYTES: Final = 16 << 20
EXCERPT_BYTES: Final = 64
KEY_SCHEDULES: Final = "AES key schedules"

_LOOKED_AT_TOGETHER: Final = 1 << 16


class PatternError(MktmeError):
    """A pattern that nothing, or everything, matches, or that cannot be understood."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Something to look for; `text`, `hexadecimal` and `regex` make one.

    Attributes:
        name: what to call it.
        expression: what Hyperscan is given.
        size_bytes: of each match; None if they differ.
        ignore_case: whether ASCII letters match in either case.
    """

    name: str
    expression: bytes
    size_bytes: int | None
    ignore_case: bool = False

    @classmethod
    def text(
        cls,
        text: str,
        encoding: Literal["utf-8", "utf-16-le"] = "utf-8",
        *,
        ignore_case: bool = False,
    ) -> Pattern:
        """A string.

        Raises:
            PatternError: it is empty.
        """
        try:
            data = text.encode(encoding, "surrogateescape")
        except UnicodeEncodeError as error:
            raise PatternError(
                f"text {_quoted(text)} has no form in {encoding}",
                hint="search for its bytes: --hex",
            ) from error
        kind = "text" if encoding == "utf-8" else "UTF-16"
        return cls._literal(f"{kind} {_quoted(text)}", data, ignore_case)

    @classmethod
    def hexadecimal(cls, digits: str) -> Pattern:
        """Bytes, two hexadecimal digits each, spaces between them or not.

        Raises:
            PatternError: it is empty, or something else.
        """
        try:
            data = bytes.fromhex(digits)
        except ValueError as error:
            raise PatternError(
                f"{_quoted(digits)} are no bytes in hexadecimal", hint='such as "de ad be ef"'
            ) from error
        return cls._literal(f"bytes {data.hex(' ')}", data, False)

    @classmethod
    def regex(cls, expression: str, *, ignore_case: bool = False) -> Pattern:
        r"""A regular expression on bytes, in PCRE's syntax, as far as Hyperscan has it.

        It has no back-references and no look-around. ``^`` and ``$`` are a line's ends, a dot is
        no newline unless ``(?s)`` says so, and letters outside ASCII are their bytes in UTF-8.

        Raises:
            PatternError: it is empty or holds a NUL (write ``\x00``).
        """
        data = expression.encode("utf-8", "surrogateescape")
        if not data or b"\0" in data:
            what = "holds a NUL" if data else "is empty"
            raise PatternError(f"the expression {what}", hint=r"a NUL is written \x00")
        return cls(f"regex {_quoted(expression)}", data, None, ignore_case)

    @classmethod
    def _literal(cls, name: str, data: bytes, ignore_case: bool) -> Pattern:
        if not data:
            raise PatternError(f"{name.strip()}: it is empty", hint="it would be found everywhere")
        escaped = b"".join(b"\\x%02x" % byte for byte in data)
        return cls(name, escaped, len(data), ignore_case)


def _quoted(text: str) -> str:
    """As it was typed, but for what a terminal would not show."""
    return "'" + "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text) + "'"


class Match(NamedTuple):
    """Something that was found.

    Attributes:
        start, end: first byte, and the first behind it.
        name: what it is: the pattern's name, or which kind of key schedule.
        excerpt: its first bytes, up to `EXCERPT_BYTES`; none of a key schedule.
        schedule: the key schedule, its offset being `start`.
    """

    start: int
    end: int
    name: str
    excerpt: bytes = b""
    schedule: KeySchedule | None = None


class Window(NamedTuple):
    """Memory to be searched, and which of what is in it is to be told.

    Attributes:
        address: of its first byte.
        data: uint8, shape (n,), contiguous.
        first: a match begins here or later,
        stop: and before this,
        beyond: and ends after this: matches in a hole's zeros alone are not told.
    """

    address: int
    data: npt.NDArray[np.uint8]
    first: int
    stop: int
    beyond: int


class Searcher:
    """Patterns, ready to be looked for. Threads may use one at the same time.

    Which match
        Wherever a match begins is a hit: text overlaps itself. Of an expression, each place where
        a match ends counts with the leftmost beginning that is no more than `max_match_bytes`
        away, and each beginning with the furthest such end. A match is found wherever it lies
        unless it is longer than that, or the tail of such a one, a byte of which is cut off.

    Args:
        patterns: what to look for.
        aes_keys: whether to look for AES key schedules.
        max_errors: how many bits of a schedule may be wrong; see `find_schedules`.
        max_match_bytes: the longest match of a regular expression.

    Raises:
        PatternError: there is nothing to look for, or Hyperscan does not take an expression.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        patterns: Sequence[Pattern],
        *,
        aes_keys: bool = False,
        max_errors: int = 0,
        max_match_bytes: int = DEFAULT_MATCH_BYTES,
    ) -> None:
        if not patterns and not aes_keys:
            raise PatternError(
                "nothing to look for", hint="--text, --utf16, --hex, --regex or --aes-keys"
            )
        if not 1 <= max_match_bytes <= MAX_MATCH_BYTES:
            raise ValueError(f"matches have 1 to {MAX_MATCH_BYTES} bytes")
        if not 0 <= max_errors <= MAX_ERRORS:
            raise ValueError(f"0 to {MAX_ERRORS} bits may be wrong")
        self.patterns = tuple(patterns)
        self.names = tuple(one.name for one in patterns) + (KEY_SCHEDULES,) * aes_keys
        """What is looked for."""
        self._aes_keys = aes_keys
        self._max_errors = max_errors
        self._sizes = [one.size_bytes for one in patterns]
        self._longest = max_match_bytes
        longest = [size or max_match_bytes for size in self._sizes]
        self.reach_bytes = max([*longest, *[MAX_SCHEDULE_BYTES] * aes_keys])
        """The longest that anything found can be."""
        self._database = _compile(self.patterns) if patterns else None
        self._local = threading.local()

    def find(self, window: Window, most: int) -> tuple[list[Match], bool]:
        """Look for everything in a window.

        Args:
            window: where.
            most: after how many hits of patterns the rest of it may be left.

        Returns:
            What is to be told, ascending; whether that is all.
        """
        found: list[Match] = []
        whole = True
        if self._database is not None:
            found, whole = self._match(self._database, window, most)
        if self._aes_keys:
            found += (
                Match(
                    start,
                    start + one.size_bytes,
                    f"AES-{one.key_bits} key schedule",
                    schedule=replace(one, offset=start),
                )
                for one in find_schedules(window.data, self._max_errors)
                if window.first <= (start := window.address + one.offset) < window.stop
                and start + one.size_bytes > window.beyond
            )
        found.sort(key=lambda one: one[:2])
        return found, whole

    def _match(
        self, database: hyperscan.Database, window: Window, most: int
    ) -> tuple[list[Match], bool]:
        sizes, longest = self._sizes, self._longest
        first, stop, beyond = (
            at - window.address for at in (window.first, window.stop, window.beyond)
        )
        ends: dict[tuple[int, int], int] = {}
        # By expression: where matches end that are too long.
        late: dict[int, bytearray] = defaultdict(lambda: bytearray(len(window.data) + 1))

        def keep(number: int, start: int, end: int) -> None:
            if first <= start < stop and end > beyond:
                ends[start, number] = max(end, ends.get((start, number), 0))

        def matched(number: int, start: int, end: int, _flags: int, _context: object) -> bool:
            size = sizes[number]
            if size is not None:
                start = end - size
            elif end - start > longest:
                if end > beyond and end - longest < stop:
                    late[number][end] = 1
                return False
            keep(number, start, end)
            return len(ends) > most  # no more of it

        whole = True
        try:
            # Its stub says bytes; it takes any buffer.
            data = cast(bytes, window.data)
            database.scan(data, matched, scratch=self._scratch(database))
        except hyperscan.ScanTerminated:
            whole = False
        for number, where in late.items():
            tries, end = 0, where.find(1)
            while end >= 0 and whole:
                for start, at in self._nearer(database, window.data, number, where, end):
                    keep(number, start, at)
                tries += 1
                whole = max(tries, len(ends)) <= most
                end = where.find(1, end)
        return [
            Match(
                window.address + start,
                window.address + end,
                self.patterns[number].name,
                window.data[start : min(end, start + EXCERPT_BYTES)].tobytes(),
            )
            for (start, number), end in ends.items()
        ], whole

    def _nearer(
        self,
        database: hyperscan.Database,
        data: npt.NDArray[np.uint8],
        number: int,
        late: bytearray,
        end: int,
    ) -> list[tuple[int, int]]:
        """The leftmost beginning that is near enough to an end, and those of ends that come soon.

        Hyperscan tells of an end the leftmost beginning and no other. So what is near enough to the
        first end is scanned by itself, together with the ends that come soon.

        Args:
            database: the patterns.
            data: uint8, shape (n,).
            number: of the expression.
            late: n + 1 flags: ends that are to be looked at. What is done with loses its flag.
            end: the first of them.

        Returns:
            Beginnings and ends.
        """
        longest = self._longest
        low = end - longest  # not 0: what is too long begins before it
        high = min(len(data), end + min(longest, _LOOKED_AT_TOGETHER) + 1)
        starts = self._starts(database, data[low:high], number, late, low)
        if starts.get(end) == low:
            before = self._starts(database, data[low - 1 : end + 1], number, late, low - 1)
            if before.get(end) == low - 1:
                # The tail of something longer, and so is what ends right behind it.
                at = end
                while starts.get(at) == low:
                    late[at] = 0
                    del starts[at]
                    at += 1
            else:  # what is before it counts
                del starts[end]
                starts |= before
        late[end] = 0
        found = [(start, at) for at, start in starts.items() if at - start <= longest]
        for _, at in found:
            late[at] = 0
        return found

    def _starts(
        self,
        database: hyperscan.Database,
        data: npt.NDArray[np.uint8],
        number: int,
        late: bytearray,
        address: int,
    ) -> dict[int, int]:
        """By flagged ends of matches of an expression: where they begin, in this memory alone."""
        found: dict[int, int] = {}

        def matched(one: int, start: int, end: int, _flags: int, _context: object) -> None:
            if one == number and late[address + end]:
                found[address + end] = address + start

        database.scan(cast(bytes, data), matched, scratch=self._scratch(database))
        return found

    def _scratch(self, database: hyperscan.Database) -> hyperscan.Scratch:
        """Hyperscan's working memory: one a thread."""
        scratch: hyperscan.Scratch | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = database.scratch.clone()
        return scratch


def _compile(patterns: Sequence[Pattern]) -> hyperscan.Database:
    def compiled(some: Sequence[Pattern]) -> hyperscan.Database:
        database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
        database.compile([one.expression for one in some], flags=[_flags(one) for one in some])
        return database

    # One at a time first: the error of many does not tell which it is of.
    for one in patterns:
        try:
            compiled([one])
        except hyperscan.error as error:
            raise _refused(one, str(error).rstrip(".")) from error
    try:
        return compiled(patterns)
    except hyperscan.error as error:
        raise PatternError(
            f"the expressions together: {error}", hint="search for fewer at a time"
        ) from error


def _flags(pattern: Pattern) -> int:
    flags = hyperscan.HS_FLAG_MULTILINE
    if pattern.size_bytes is None:
        flags |= hyperscan.HS_FLAG_SOM_LEFTMOST
    if pattern.ignore_case:
        flags |= hyperscan.HS_FLAG_CASELESS
    return flags


def _refused(pattern: Pattern, reason: str) -> PatternError:
    if "empty buffer" in reason:
        return PatternError(
            f"{pattern.name}: it matches the empty string, so it would be found everywhere",
            hint="ask for one byte at least, such as a+ for a*",
        )
    name = pattern.name if len(pattern.name) < 80 else f"{pattern.name[:76]}..."
    syntax = (
        "the syntax is PCRE's without back-references and look-around; what is too large may be"
        " two expressions"
    )
    return PatternError(
        f"{name}: {reason[:1].lower()}{reason[1:]}",
        hint=syntax if pattern.size_bytes is None else "look for a part of it",
    )
