# SPDX-License-Identifier: GPL-2.0-or-later
"""What a fuzz target is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

# What msgspec and Python quote of their input, which ends where the path to it begins.
_QUOTED: Final = re.compile(r"['\"].*['\"]|unknown field `.*`(?= - at|$)", re.DOTALL)
_NUMBER: Final = re.compile(r"\b(?:0x[0-9a-f]+|\d+)\b")


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder under test.

    Attributes:
        name: as the command line has it.
        check: takes an input; whatever it raises is a finding. It returns the outcome in a few
            words: each that is new counts as coverage, which is how an input comes to be kept
            for what happens inside a C extension. None where our own code tells enough.
        seeds: inputs to start from: valid ones of each kind, and what chance would not come upon.
        max_bytes: of an input.
        mutate: a change that keeps the structure; None of an input that has none.
        tokens: what inputs of this kind are made of.
    """

    name: str
    check: Callable[[bytes], str | None]
    seeds: tuple[bytes, ...]
    max_bytes: int
    mutate: Callable[[bytes, Random], bytes | None] | None = None
    tokens: tuple[bytes, ...] = ()


def refusal(message: str) -> str:
    """The outcome that is an error: what is wrong and where, without what is there."""
    return _NUMBER.sub("", _QUOTED.sub("", message))
