# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of somebody else: what is in a name does nothing to a terminal or a document."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from .command import Mktme, runner
from .dump.conftest import VM_BASE, MakeImage, describe, make_image

__all__ = ["make_image"]

EVIL = "a\x1b[2Jl\u061ci\u202ece"
SHOWN = "a\ufffd[2Jl\ufffdi\ufffdce"


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mktme.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )


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


@pytest.mark.parametrize(
    "command",
    [
        ("stats",),
        ("diff", "IMAGE"),
        ("search", "--text", "needle"),
    ],
    ids=lambda command: command[0],
)
def test_file_names_that_are_no_utf_8(
    make_image: MakeImage, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name = os.fsdecode(b"im\xffage")
    image = str(make_image({VM_BASE: b"needle"}, name=name))
    output = tmp_path / "x.json"
    others = (image if one == "IMAGE" else one for one in command[1:])
    ended = run_process("dump", command[0], image, *others, "--json", str(output))
    assert (ended.returncode, ended.stderr.count("mktme:")) in ((0, 0), (1, 0)), ended.stderr
    assert r"im\\xffage" in output.read_text()
    drawn = os.fsdecode(b"dra\xffwn.svg")
    ended = run_process("dump", "map", image, "-o", str(tmp_path / drawn))
    assert ended.returncode == 0, ended.stderr
    assert "im\ufffdage" in (tmp_path / drawn).read_text()


def test_names_in_a_picture(mktme: Mktme, make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image({VM_BASE: os.urandom(4096)}, describe(name=EVIL))
    drawn = tmp_path / "x.svg"
    assert mktme("dump", "map", image, "--what", "keyid", "-o", drawn).code == 0
    assert SHOWN in "".join(ET.fromstring(drawn.read_bytes()).itertext())
