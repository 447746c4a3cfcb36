# SPDX-License-Identifier: GPL-2.0-or-later
"""Text that somebody else chose: names of VMs, files and commands, made fit to be shown and kept.

A sidecar or a report may be anybody's. What is in a name must not move a terminal's cursor, make an
XML document invalid, or have a reader see another name than there is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

# C0 but tab and line feed, DEL and C1, marks and overrides of direction, byte order mark, lone
# surrogates, noncharacters: https://www.unicode.org/reports/tr36/#Bidirectional_Text_Spoofing
UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
    "\ufffe\uffff]"
)
"""Characters that could deceive a reader."""


def shown(text: str) -> str:
    """Text for a reader: each unsafe character is replaced by U+FFFD."""
    return UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def spelled(name: str | Path) -> str:
    r"""An argument or a file's name as text: bytes that are no UTF-8 are spelled, as ``\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
