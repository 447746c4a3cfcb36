# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of somebody else: what is in a name does nothing to a terminal or a document."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from .command import Mktme, runner
from .dump.conftest import VM_BASE, MakeImage, describe, make_image

__all__ = ["make_image"]

EVIL = "a\x1b[2Jl\u061ci\u202ece"
SHOWN = "a\ufffd[2Jl\ufffdi\ufffdce"


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@pytest.mark.parametrize(
    "command",
    [
        ("search", "--text", "needle"),
        ("info",),
        ("map", "-o", "x.svg", "--vm", "nobody"),
        ("decrypt", "-o", "x.raw", "--vm", "nobody"),
    ],
    ids=lambda command: command[0],
)
def test_names_on_a_terminal(
    mktme: Mktme,
    make_image: MakeImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    image = make_image({VM_BASE: b"needle"}, describe(name=EVIL))
    found = mktme("dump", command[0], image, *command[1:])
    said = found.out + found.err
    assert SHOWN in said
    assert not set(said) & set("\x1b\u061c\u202e")


def test_names_in_a_picture(mktme: Mktme, make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image({VM_BASE: os.urandom(4096)}, describe(name=EVIL))
    drawn = tmp_path / "x.svg"
    assert mktme("dump", "map", image, "--what", "keyid", "-o", drawn).code == 0
    assert SHOWN in "".join(ET.fromstring(drawn.read_bytes()).itertext())
