# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the command in this process, for the tests of what it prints and how it exits."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from mktme import cli


@dataclass(frozen=True)
class Result:
    """What a run of the command left."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """All of it in one line: boxes and line breaks depend on the terminal."""
        return " ".join(re.sub(r"[^\x20-\x7e]+", " ", self.out + self.err).split())


class Mktme(Protocol):
    """Runs the command in this process."""

    def __call__(self, *arguments: str | Path) -> Result: ...


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["mktme", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, captured.out, captured.err)

    return run
