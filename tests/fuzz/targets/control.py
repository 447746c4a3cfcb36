# SPDX-License-Identifier: GPL-2.0-or-later
"""A decoder with a bug, for the fuzzer to find.

It is behind four bytes of which each is looked at only when those before it are right: chance
needs 2^32 tries to get there, coverage a few times 2^8.
"""

from __future__ import annotations

from typing import Final

import atheris

from ..target import Target

MAGIC: Final = b"\x9c\x31\xe7\x58"


def check(data: bytes) -> None:
    """Read the byte behind the magic, whether there is one or not."""
    if len(data) >= len(MAGIC) and data[0] == MAGIC[0]:  # noqa: SIM102  each a branch of its own
        if data[1] == MAGIC[1]:  # noqa: SIM102
            if data[2] == MAGIC[2]:  # noqa: SIM102
                if data[3] == MAGIC[3]:
                    data[len(data)]


atheris.instrument_func(check)

TARGETS: Final = (Target(name="control", check=check, seeds=(b"none",), max_bytes=64),)
