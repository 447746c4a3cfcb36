# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme report`, and `--html`: a page that is whole or not there."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mktme import cli_report
from mktme.cli import ExitCode
from mktme.dump.image import DumpChangedError
from mktme.proof import runs
from mktme.proof.report import RunReport, write_json
from mktme.proof.runs import Narrator, RunOptions
from mktme.report.dumps import Look
from mktme.vm import images
from mktme.vm.config import VmConfig

from .command import Mktme, Result, runner
from .dump.conftest import MakeImage, make_image
from .proof.test_report import REPORT
from .report.markup import Parsed
from .vm.test_domain_xml import IMAGE

__all__ = ["make_image"]


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@pytest.fixture
def run_json(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    write_json(path, REPORT)
    return path


@contextmanager
def full_disk(size_bytes: int) -> Iterator[None]:
    """No file can grow further: as a full disk, for a process alone (setrlimit(2))."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_page_of_a_run(mktme: Mktme, run_json: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = mktme("report", run_json, "-o", page)
    assert (result.code, result.out) == (ExitCode.OK, "")
    assert "alice" in Parsed.of(page.read_text()).one("main").text
    assert sorted(os.listdir(tmp_path)) == ["report.html", "run.json"]


def test_page_with_images(
    mktme: Mktme, run_json: Path, make_image: MakeImage, tmp_path: Path
) -> None:
    dumps = [make_image({0: os.urandom(4096)}, name=name) for name in ("before.img", "after.img")]
    page = tmp_path / "report.html"
    assert mktme("report", run_json, *dumps, "-o", page).code == ExitCode.OK
    heads = [one.text for one in Parsed.of(page.read_text()).all("h3")]
    assert [head for head in heads if head.endswith(".img")] == ["before.img", "after.img"]


def test_what_is_no_report_is_refused(mktme: Mktme, tmp_path: Path) -> None:
    for content, why in (("{}", "no report of mktme's"), ("<html>", "no JSON")):
        (tmp_path / "x.json").write_text(content)
        result = mktme("report", tmp_path / "x.json", "-o", tmp_path / "x.html")
        assert result.code == ExitCode.USAGE
        assert f"x.json: {why}" in result.err
        assert "hint: give it what mktme run --json FILE, or demo, wrote" in result.err
    assert os.listdir(tmp_path) == ["x.json"]


def test_image_without_a_description_is_refused(
    mktme: Mktme, run_json: Path, tmp_path: Path
) -> None:
    (tmp_path / "dram").write_bytes(bytes(4096))
    result = mktme("report", run_json, tmp_path / "dram", "-o", tmp_path / "x.html")
    assert result.code != ExitCode.OK
    assert "dram.json: no such file: nothing says how dram is to be read" in result.err
    assert not (tmp_path / "x.html").exists()


def test_page_does_not_replace_what_it_is_made_of(
    mktme: Mktme, run_json: Path, make_image: MakeImage, tmp_path: Path
) -> None:
    image = make_image({})
    (tmp_path / "link.html").symlink_to(run_json)
    for output in (run_json, image, tmp_path / "dram.json", tmp_path / "link.html"):
        before = output.read_bytes()
        result = mktme("report", run_json, image, "-o", output)
        assert result.code == ExitCode.USAGE
        assert f"-o {output}: it would take the place of" in result.err
        assert output.read_bytes() == before


def test_place_that_is_none(mktme: Mktme, run_json: Path, tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "none" / "x.html"):
        result = mktme("report", run_json, "-o", output)
        assert result == Result(
            ExitCode.USAGE,
            "",
            f"mktme: -o {output}: no file can be written there\n"
            "  hint: name a file in a directory that exists\n",
        )


def test_full_disk_leaves_the_old_page(mktme: Mktme, run_json: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")
    with full_disk(4096):
        result = mktme("report", run_json, "-o", page)
    assert result.code == ExitCode.RUN_FAILED
    assert f"mktme: {page}: cannot write the report: File too large" in result.err
    assert "hint: choose another place with -o FILE" in result.err
    assert page.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["report.html", "run.json"]
    assert mktme("report", run_json, "-o", page).code == ExitCode.OK  # control
    assert len(page.read_bytes()) > 4096


def test_other_commands_do_not_wait_for_charts() -> None:
    program = (
        "import sys, mktme.cli; heavy = {'matplotlib', 'jinja2'};"
        "print(sorted(heavy & set(sys.modules)));"
        "import mktme.report.page; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "['jinja2', 'matplotlib']"]


# --- --html of run and demo -------------------------------------------------------------------


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, make_image: MakeImage) -> list[RunOptions]:
    """Runs that do nothing but show DRAM once; returns what they were asked for."""
    asked: list[RunOptions] = []
    image = make_image({0: os.urandom(4096)})

    def demo(config: VmConfig, narrator: Narrator, options: RunOptions) -> RunReport:
        asked.append(options)
        if options.look is not None:
            options.look(image, "all guests")
        return REPORT

    def run(config: VmConfig, narrator: Narrator, *, options: RunOptions, **_: int) -> RunReport:
        return demo(config, narrator, options)

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "demo", demo)
    monkeypatch.setattr(images, "ensure", lambda *_: IMAGE)
    return asked


@pytest.mark.parametrize("command", ["run", "demo"])
def test_run_ends_with_a_page(
    mktme: Mktme, look: list[RunOptions], tmp_path: Path, command: str
) -> None:
    page = tmp_path / "report.html"
    result = mktme(command, "--html", page)
    assert result.code == ExitCode.OK
    assert f"report {page}" in result.out
    assert "all guests" in [one.text for one in Parsed.of(page.read_text()).all("h3")]
    assert look[0].arguments == (command, "--html", str(page))


@pytest.mark.parametrize("command", ["run", "demo"])
def test_arguments_that_are_no_utf_8_are_spelled(
    mktme: Mktme, look: list[RunOptions], tmp_path: Path, command: str
) -> None:
    assert mktme(command, "--json", tmp_path / os.fsdecode(b"\xff.json")).code == ExitCode.OK
    assert look[0].arguments == (command, "--json", rf"{tmp_path}/\xff.json")


@pytest.mark.parametrize("command", ["run", "demo"])
def test_no_page_unasked(mktme: Mktme, look: list[RunOptions], command: str) -> None:
    result = mktme(command)
    assert result.code == ExitCode.OK
    assert "report" not in result.out
    assert look[0].look is None


def test_fault_of_mktme_is_no_failed_proof(
    mktme: Mktme, look: list[RunOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **_options: object) -> RunReport:
        raise RuntimeError("not thought of")

    monkeypatch.setattr(runs, "run", run)
    result = mktme("run")
    assert (result.code, result.out) == (ExitCode.RUN_FAILED, "")
    said, hint = result.err.splitlines()
    assert re.fullmatch(r"mktme: RuntimeError: not thought of \(.*\.py, line \d+\)", said)
    assert hint == "  hint: a fault in mktme; MKTME_TRACEBACK=1 shows more"
    monkeypatch.setenv("MKTME_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in mktme("run").err


def test_picture_that_is_lacking_voids_no_proof(
    mktme: Mktme,
    look: list[RunOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look_at(path: Path, name: str) -> Look:
        raise DumpChangedError(f"{path}: changed while it was read")

    monkeypatch.setattr(cli_report, "look_at", look_at)
    page = tmp_path / "report.html"
    result = mktme("run", "--html", page)
    assert result.code == ExitCode.OK
    assert "note: no picture of DRAM: " in result.err
    assert 'id="dram"' not in page.read_text()


@pytest.mark.parametrize("command", ["run", "demo"])
def test_page_that_cannot_be_written_is_known_before_the_run(
    mktme: Mktme, look: list[RunOptions], tmp_path: Path, command: str
) -> None:
    result = mktme(command, "--html", tmp_path / "none" / "x.html")
    assert result.code == ExitCode.USAGE
    assert "x.html: no file can be written there" in result.err
    result = mktme(command, "--html", tmp_path / "x", "--json", tmp_path / "x")
    assert result.code == ExitCode.USAGE
    assert f"--html {tmp_path}/x: --json has that file" in result.err
    assert look == []


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize(
    "source", ["--dram", "--image", "--key-file", "--ssh-key", "--platform", "--nvdimm"]
)
def test_report_of_a_run_takes_nothings_place(
    mktme: Mktme, look: list[RunOptions], tmp_path: Path, option: str, source: str
) -> None:
    path = tmp_path / "x"
    given = f"{path}:16M" if source == "--nvdimm" else path
    for output in (path, tmp_path / "x.json", tmp_path / "x.mac"):
        result = mktme("run", source, given, option, output)
        assert result.code == ExitCode.USAGE
        assert f"{option} {output}: it would take the place of {output}" in result.err
    assert look == []
