# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump stats`, `diff` and `map`: what they print, write and refuse."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mktme.cli import ExitCode
from mktme.dump.cluster import Source
from mktme.dump.diff import DiffReport, dump_diff
from mktme.dump.image import DumpImage
from mktme.dump.stats import StatsReport, dump_stats
from mktme.engine.sidecar import SIDECAR_VERSION, sidecar_path, write_sidecar

from .command import Mktme, runner
from .dump.conftest import PAGE, VM_BASE, MakeImage, describe, make_image
from .dump.contents import encrypt, prose

__all__ = ["make_image"]

TEXT = prose(32 * PAGE)
RSS_LIMIT_BYTES = 512 << 20


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@pytest.fixture
def encrypted(make_image: MakeImage) -> Path:
    return make_image({VM_BASE: encrypt(TEXT, VM_BASE)})


def test_stats(mktme: Mktme, encrypted: Path, tmp_path: Path) -> None:
    written = tmp_path / "stats.json"
    found = mktme("dump", "stats", encrypted, "--json", written)
    assert found.code == ExitCode.OK
    assert "KeyID 3 looks encrypted" in found.said
    assert "KeyID 0 never written" in found.said
    report = msgspec.json.decode(written.read_bytes(), type=StatsReport)
    assert report == dump_stats(Source(encrypted))
    assert all(len(line) <= 80 for line in found.out.splitlines())


def test_stats_of_plaintext_that_is_to_be_encrypted_fail(
    mktme: Mktme, make_image: MakeImage
) -> None:
    path = make_image({VM_BASE: TEXT})
    found = mktme("dump", "stats", path, "--threads", "1")
    assert found.code == ExitCode.PROOF_FAILED
    assert "KeyID 3 structured, and is to be encrypted" in found.said
    assert "32 of 32 pages have too little entropy" in found.said
    assert "ASCII strings of 16+ characters (0 by chance)" in found.said
    assert f"{VM_BASE:#x} 4,096: {TEXT[:20].decode()}" in found.out
    assert all(len(line) <= 80 for line in found.out.splitlines())
    assert mktme("dump", "stats", path, "--raw").code == ExitCode.OK


def test_strings_that_look_like_markup_are_strings(mktme: Mktme, tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"[red]not markup[/] [link=x]" * 300)
    assert "[red]not markup[/] [link=x]" in mktme("dump", "stats", path, "--raw").out


def test_diff(mktme: Mktme, encrypted: Path, make_image: MakeImage, tmp_path: Path) -> None:
    later = make_image({VM_BASE: encrypt(TEXT[:-PAGE] + TEXT[:PAGE], VM_BASE)}, name="later")
    written = tmp_path / "diff.json"
    found = mktme("dump", "diff", encrypted, later, encrypted, "--json", written)
    assert found.code == ExitCode.OK
    assert "lines 1,984 64 0 0" in found.said
    report = msgspec.json.decode(written.read_bytes(), type=DiffReport)
    assert report == dump_diff(Source(encrypted), Source(later), Source(encrypted))
    (zone,) = report.keyids
    assert zone.returned is not None
    assert zone.returned.back == 64
    assert "no freshness" in found.said
    nothing = mktme("dump", "diff", encrypted, encrypted)
    assert "lines 2,048 0 0 0" in nothing.said
    assert "Changed lines" not in nothing.said


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_map(mktme: Mktme, encrypted: Path, tmp_path: Path, suffix: str) -> None:
    drawn = tmp_path / f"map.{suffix}"
    for options in (
        (),
        ("--what", "keyid", "--order", "row"),
        ("--what", "written", "--vm", "alice"),
        ("--what", "difference", "--with", str(encrypted)),
    ):
        found = mktme("dump", "map", encrypted, "-o", drawn, *options)
        assert found.code == ExitCode.OK, found.said
        start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
        assert drawn.read_bytes().startswith(start)
        drawn.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dram", "dram.json", "dram.mac"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("stats", "DRAM", "--raw", "--sidecar", "x"), "--raw has no use for --sidecar"),
        (("stats", "DRAM", "--scheduler", "tcp://x:1", "--threads", "2"), "no use for --threads"),
        (("stats", "DRAM", "--json", "/none/x"), "no file can be written there"),
        (("map", "DRAM", "-o", "x.jpg"), "a picture is .png or .svg"),
        (("map", "DRAM", "-o", "x"), "a picture is .png or .svg"),
        (("map", "DRAM", "-o", "/none/x.png"), "no file can be written there"),
        (("map", "DRAM", "-o", "DRAM.png"), "it would take the place of"),
        (("map", "DRAM.json", "--with", "DRAM", "-o", "DRAM.png"), "it would take the place of"),
        (("stats", "DRAM", "--json", "DRAM"), "it would take the place of"),
        (("stats", "DRAM", "--json", "DRAM.json"), "it would take the place of"),
        (("stats", "DRAM", "--json", "DRAM.mac"), "it would take the place of"),
        (("stats", "DRAM", "--json", "DRAM.png"), "it would take the place of"),
        (("stats", "DRAM", "--sidecar", "./x", "--json", "x"), "it would take the place of x"),
        (("stats", "DRAM", "--json", "/dev/null"), "no file can be written there"),
        (("diff", "x", "DRAM", "--json", "DRAM.json"), "it would take the place of"),
        (("diff", "x", "x", "DRAM", "--json", "DRAM.json"), "it would take the place of"),
        (("map", "DRAM", "-o", "x.png", "--what", "difference"), "go together"),
        (("map", "DRAM", "-o", "x.png", "--with", "DRAM"), "go together"),
        (
            ("map", "DRAM", "-o", "x.svg", "--what=difference", "--with=DRAM", "--plaintext=DRAM"),
            "has no --plaintext",
        ),
    ],
)
def test_options_that_make_no_sense(
    mktme: Mktme, encrypted: Path, arguments: tuple[str, ...], said: str
) -> None:
    os.symlink(encrypted, f"{encrypted}.png")
    before = {path: path.read_bytes() for path in encrypted.parent.iterdir()}
    found = mktme("dump", *(one.replace("DRAM", str(encrypted)) for one in arguments))
    assert found.code == ExitCode.USAGE
    assert said in found.said
    assert "hint:" in found.said
    assert {path: path.read_bytes() for path in encrypted.parent.iterdir()} == before


@pytest.mark.parametrize("command", [("stats",), ("map", "-o", "x.png")])
def test_what_cannot_be_read(
    mktme: Mktme, encrypted: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encrypted.parent)
    described = sidecar_path(encrypted)
    content = described.read_bytes()
    described.unlink()
    assert "nothing says how" in mktme("dump", *command, encrypted).said
    version = f'"version": {SIDECAR_VERSION}'.encode()
    described.write_bytes(content.replace(version, b'"version": 3'))
    assert "sidecar version 3" in mktme("dump", *command, encrypted).said
    described.write_bytes(content)
    os.truncate(encrypted, PAGE)
    found = mktme("dump", *command, encrypted)
    assert "truncated" in found.said
    assert found.code not in (ExitCode.OK, ExitCode.PROOF_FAILED)
    assert not Path("x.png").exists()


@contextmanager
def no_file_larger_than(size_bytes: int) -> Iterator[None]:
    """Writing more fails with EFBIG: the same path through the code as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_that_is_full(mktme: Mktme, encrypted: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "map.png"
    drawn.write_bytes(b"an older one")
    before = sorted(tmp_path.iterdir())
    with no_file_larger_than(2000):
        found = mktme("dump", "map", encrypted, "-o", drawn)
    assert found.code == ExitCode.RUN_FAILED
    assert "map.png: cannot write the picture" in found.said
    assert "choose another place with -o FILE" in found.said
    assert drawn.read_bytes() == b"an older one"
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 GiB, of which 160 MiB are there: runs of 4 MiB, and 8192 single pages, all over it."""
    path = tmp_path_factory.mktemp("large") / "dram"
    size_bytes = 64 << 30
    rng = random.Random(1)
    chunk = rng.randbytes(4 << 20)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for at in range(32):
            file.seek(at * (2 << 30))
            file.write(chunk)
        for at in range(8192):
            file.seek((at * 8 << 20) + (6 << 20) + rng.randrange(256) * PAGE)
            file.write(TEXT[at * 16 % len(TEXT) :][:PAGE].ljust(PAGE, b"."))
    write_sidecar(sidecar_path(path), describe(size_bytes))
    with DumpImage.open(path) as image:
        written = sum(one.size_bytes for one in image.data_ranges())
    assert written == 32 * len(chunk) + 8192 * PAGE
    return path


# Its own, as a child's ru_maxrss begins with what its parent had.
COMMAND_AND_PEAK = """
import re, sys
from pathlib import Path
from mktme.cli import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("stats", "DRAM"), ExitCode.PROOF_FAILED),
        (("map", "DRAM", "-o", "DRAM.png"), ExitCode.OK),
        (("diff", "DRAM", "DRAM", "DRAM"), ExitCode.OK),
    ],
    ids=["stats", "map", "diff"],
)
def test_64_gib_fit_into_512_mib(large: Path, command: tuple[str, ...], code: ExitCode) -> None:
    arguments = [one.replace("DRAM", str(large)) for one in command]
    found = subprocess.run(
        [sys.executable, "-c", COMMAND_AND_PEAK, "dump", *arguments],
        stdout=subprocess.PIPE,
        check=False,
    )
    assert found.returncode == code
    peak_bytes = int(found.stdout.split()[-1]) << 10
    print(f"{command[0]}: {peak_bytes >> 20} MiB")
    assert peak_bytes < RSS_LIMIT_BYTES
