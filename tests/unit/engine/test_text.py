# SPDX-License-Identifier: GPL-2.0-or-later
"""Names that somebody else chose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mktme.engine.text import shown, spelled


@pytest.mark.parametrize("character", "\x1b\x9b\r\x7f\u061c\u200f\u202e\u2066\ufeff\udc80")
def test_what_deceives_is_not_shown(character: str) -> None:
    assert shown(f"a{character}b") == "a\ufffdb"


def test_other_text_is_shown_as_it_is() -> None:
    assert shown("Grüße, 世界 عربى\t\n[red]") == "Grüße, 世界 عربى\t\n[red]"


def test_names_that_are_no_utf_8_are_spelled() -> None:
    assert spelled(Path(os.fsdecode(b"/x/\xff.img"))) == r"/x/\xff.img"
    assert spelled("größe") == "größe"
