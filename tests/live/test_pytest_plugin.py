# SPDX-License-Identifier: GPL-2.0-or-later
"""The pytest plugin as another project's tests see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick_boots")

THEIRS = """
import os, signal
import pytest

pytestmark = pytest.mark.mktme(memory="256M")

def test_runs(mktme_vm):
    assert mktme_vm.domain.console.run("echo hello", timeout_s=20).output.strip() == "hello"

def test_loses_its_vm(mktme_vm, mktme_platform):
    os.kill(mktme_platform.engine_pid, signal.SIGKILL)
    with mktme_vm.domain.explained():
        mktme_vm.domain.console.wait_end(timeout_s=20)
        mktme_vm.domain.console.run("true", timeout_s=20)

def test_comes_after(mktme_vm):
    raise AssertionError("a lost VM must not be handed out")
"""


def pytest_in(directory: Path, text: str, **environment: str) -> str:
    (directory / "test_theirs.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "test_theirs.py"]
    answer = subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    return answer.stdout + answer.stderr


def test_a_lost_vm_stays_lost(tmp_path: Path) -> None:
    said = pytest_in(tmp_path, THEIRS)
    assert "1 failed, 1 passed, 1 error" in said, said
    assert "this VM was lost before: in test_theirs.py::test_loses_its_vm" in said
    assert "the engine is gone" in said
    assert "must not be handed out" not in said.partition("short test summary")[2]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("guest='tinny'", "unknown guest 'tinny'"),
        ("track='loads'", "'loads' is not a valid Track"),
        ("datapath='inlined'", "no data path 'inlined'"),
        ("memory='300000000'", "whole pages"),
        ("colour='red'", "unexpected keyword argument 'colour'"),
    ],
)
def test_a_wrong_marker_is_an_error(tmp_path: Path, words: str, complaint: str) -> None:
    said = pytest_in(
        tmp_path,
        f"import pytest\n\n@pytest.mark.mktme({words})\ndef test_it(mktme_vm):\n    pass\n",
    )
    assert "1 error" in said, said
    assert complaint in said


@pytest.mark.parametrize(
    ("emulator", "ci", "outcome", "complaint"),
    [
        ("/nonexistent", "", "1 error", "emulator /nonexistent is no file"),
        ("qemu11", "", "1 skipped", "there is no QEMU 11 at"),
        ("qemu11", "true", "1 error", "there is no QEMU 11 at"),
    ],
)
def test_another_emulator_that_is_not_there(
    tmp_path: Path, emulator: str, ci: str, outcome: str, complaint: str
) -> None:
    said = pytest_in(
        tmp_path,
        f"""
import pytest

@pytest.fixture(scope="module")
def mktme_emulator():
    return {emulator!r}

def test_it(mktme_vm):
    pass
""",
        CI=ci,
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert outcome in said, said
    assert complaint in said
