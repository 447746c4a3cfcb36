# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump search`: what it shows, what it keeps to itself, and how it exits."""

from __future__ import annotations

import io
import os
import random
import shutil
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from mktme import cli_dump_search
from mktme.cli import ExitCode
from mktme.dump.aes_keys import Form
from mktme.dump.image import DumpImage
from mktme.dump.search import FoundKey, Hit, SearchReport
from mktme.engine.dram import Dram
from mktme.engine.sidecar import sidecar_path, write_sidecar

from .command import Mktme, Result, runner
from .dump.conftest import DRAM_BYTES, VM_BASE, describe
from .dump.key_schedules import schedule

KEY = random.Random(1).randbytes(32)
TWEAK = random.Random(2).randbytes(32)
NOTHING_FOUND = 1


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@pytest.fixture
def dram(tmp_path: Path) -> Path:
    """An image that holds two keys side by side, and a string in either encoding."""
    path = tmp_path / "dram.img"
    with Dram.create(path, DRAM_BYTES) as made:
        made.write(VM_BASE, (schedule(KEY) + bytes(8) + schedule(TWEAK)).ljust(512, b"\0"))
        made.write(VM_BASE + 4096, b"Needle".ljust(64, b"\0"))
        made.write(8192, "Needle".encode("utf-16-le").ljust(64, b"\0"))
    write_sidecar(sidecar_path(path), describe())
    return path


@pytest.fixture
def raw(dram: Path, tmp_path: Path) -> Path:
    path = tmp_path / "memory.raw"
    shutil.copy(dram, path)
    return path


def test_what_is_found_and_where(mktme: Mktme, dram: Path) -> None:
    result = mktme("dump", "search", dram, "--text", "Needle", "--utf16", "Needle")
    assert result.code == ExitCode.OK
    lines = [line.split() for line in result.out.splitlines()]
    assert ["address", "KeyID", "VM", "guest-physical", "found"] in lines
    assert ["0x2000", "0", "-", "-", "UTF-16", "'Needle'"] in lines
    assert ["0x41000", "3", "alice", "0x1000", "text", "'Needle'"] in lines
    assert "2 found in" in result.out
    assert "search dram.img ..." in result.err


def test_raw_memory_has_addresses_only(mktme: Mktme, raw: Path) -> None:
    result = mktme("dump", "search", raw, "--raw", "--hex", "4e 65 65 64", "--regex", "e{2}d.e")
    assert result.code == ExitCode.OK
    lines = [line.split() for line in result.out.splitlines()]
    assert ["address", "found"] in lines
    assert ["0x41000", "bytes", "4e", "65", "65", "64"] in lines
    assert ["0x41001", "'eedle'"] in lines


def test_nothing_found_is_an_exit_status(mktme: Mktme, dram: Path) -> None:
    result = mktme("dump", "search", dram, "--text", "needle", "--regex", "Noodle")
    assert result.code == NOTHING_FOUND
    assert result.out.startswith("nothing found in ")
    assert mktme("dump", "search", dram, "--text", "needle", "-i").code == ExitCode.OK


def test_keys_are_not_shown(mktme: Mktme, dram: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    result = mktme("dump", "search", dram, "--aes-keys", "--json", report)
    assert result.code == ExitCode.OK
    assert "0x40000 3 alice 0x0 AES-256 key schedule, XTS pair with 0x400f8" in result.said
    assert "2 found" in result.said
    told = (result.out + result.err + report.read_text()).lower()
    for secret in (KEY, TWEAK):
        for at in range(0, 32, 4):
            assert secret[at : at + 4].hex() not in told
    document = msgspec.json.decode(report.read_bytes(), type=SearchReport)
    assert [hit.excerpt for hit in document.hits] == [None, None]
    assert [hit.key.key for hit in document.hits if hit.key is not None] == [None, None]


def test_keys_are_shown_if_asked_for(mktme: Mktme, dram: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    result = mktme("dump", "search", dram, "--aes-keys", "--show-keys", "--json", report)
    assert result.code == ExitCode.OK
    document = msgspec.json.decode(report.read_bytes(), type=SearchReport)
    keys = [hit.key.key for hit in document.hits if hit.key is not None]
    assert keys == [KEY.hex(), TWEAK.hex()]
    joined = "".join(result.out.split())
    assert KEY.hex()[:16] in joined


def test_decayed_key(mktme: Mktme, raw: Path) -> None:
    with raw.open("r+b") as file:
        spoilt = bytes([KEY[0] ^ 1])
        os.pwrite(file.fileno(), spoilt, VM_BASE)
    found = mktme("dump", "search", raw, "--raw", "--aes-keys", "--max-errors", "1", "--show-keys")
    assert "1 bit wrong" in found.said
    assert "2 found" in found.said
    assert "1 found" in mktme("dump", "search", raw, "--raw", "--aes-keys").said


def test_limit(mktme: Mktme, raw: Path) -> None:
    result = mktme("dump", "search", raw, "--raw", "--regex", "[NeUdl]", "--limit", "2", "-j", "1")
    assert result.code == ExitCode.OK
    assert "of them are shown; --limit shows more" in result.said
    assert result.said.count(" 0x2") == 2


REFUSED = {
    "nothing": ("", "nothing to look for", "--text, --utf16, --hex, --regex or --aes-keys"),
    "empty": ("--text=", "text '': it is empty", "it would be found everywhere"),
    "hexadecimal": ("--hex xyz", "'xyz' are no bytes in hexadecimal", 'such as "de ad be ef"'),
    "matches nothing": (
        "--regex a*",
        "regex 'a*': it matches the empty string, so it would be found everywhere",
        "ask for one byte at least, such as a+ for a*",
    ),
    "longest match": (
        "--regex a --max-match 17M",
        "--max-match 17M: out of range",
        "1 to 16777216 bytes",
    ),
    "no size": ("--regex a --max-match x", "'x' is not a size", "write it as 512M or 4G"),
    "errors of text": (
        "--text a --max-errors 1",
        "--max-errors is for AES keys",
        "look for them with --aes-keys",
    ),
    "keys of text": (
        "--text a --show-keys",
        "--show-keys is for AES keys",
        "look for them with --aes-keys",
    ),
    "raw with a sidecar": (
        "--text a --raw --sidecar x.json",
        "--raw says that there is no sidecar",
        "leave out --raw or --sidecar",
    ),
    "report into nowhere": (
        "--text a --json /nonexistent/out.json",
        "--json /nonexistent/out.json: no file can be written there",
        "name a file in a directory that exists",
    ),
}


@pytest.mark.parametrize(("line", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_value_that_makes_no_sense(
    mktme: Mktme, dram: Path, line: str, message: str, hint: str
) -> None:
    result = mktme("dump", "search", dram, *line.split())
    assert result == Result(ExitCode.USAGE, "", f"mktme: {message}\n  hint: {hint}\n")


def test_bad_expression_says_what_is_wrong(mktme: Mktme, dram: Path) -> None:
    result = mktme("dump", "search", dram, "--regex", r"(?<=\d)a")
    assert result.code == ExitCode.USAGE
    assert r"regex '(?<=\d)a': zero-width assertions are not supported" in result.err
    assert "without back-references and look-around" in result.err


@pytest.mark.parametrize("suffix", ["", ".json", ".mac"])
def test_report_does_not_replace_the_image(mktme: Mktme, dram: Path, suffix: str) -> None:
    output = dram.with_name(dram.name + suffix)
    result = mktme("dump", "search", dram, "--text", "x", "--json", output)
    assert result.code == ExitCode.USAGE
    assert f"--json {output}: it would take the place of {output}" in result.err


def test_missing_sidecar(mktme: Mktme, raw: Path) -> None:
    result = mktme("dump", "search", raw, "--text", "Needle")
    assert (result.code, result.out) == (ExitCode.RUN_FAILED, "")
    assert "nothing says how memory.raw is to be read" in result.err
    assert "or search it as it is, with --raw" in result.err


@pytest.mark.parametrize("options", [[], ["--raw"]])
def test_missing_image(mktme: Mktme, tmp_path: Path, options: list[str]) -> None:
    result = mktme("dump", "search", tmp_path / "none", "--text", "a", *options)
    assert (result.code, result.out) == (ExitCode.RUN_FAILED, "")
    assert "No such file or directory" in result.err
    assert "--raw" not in result.err


def test_image_that_changes(
    mktme: Mktme, raw: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is told of an image that was written meanwhile."""
    opened = DumpImage.open_raw

    def open_and_meddle(path: Path) -> DumpImage:
        image = opened(path)
        with path.open("r+b") as file:
            file.write(b"!")
        return image

    monkeypatch.setattr(DumpImage, "open_raw", open_and_meddle)
    report = tmp_path / "out.json"
    result = mktme("dump", "search", raw, "--raw", "--text", "Needle", "--json", report)
    assert (result.code, result.out) == (ExitCode.RUN_FAILED, "")
    assert "changed while it was read" in result.err
    assert "mktme dump capture" in result.err
    assert not report.exists()


@pytest.mark.parametrize("columns", [80, 120])
def test_table_fits(columns: int) -> None:
    hit = Hit(
        pattern="AES-256 key schedule",
        address=0xF_1234_5678,
        size_bytes=240,
        keyid=63,
        vm="alice",
        guest_physical=0x1_2345_6789,
        excerpt=None,
        key=FoundKey(
            bits=256,
            form=Form.DECRYPTION,
            swapped=True,
            errors=3,
            xts_partner=0xF_1234_5768,
            key=KEY.hex(),
        ),
    )
    report = SearchReport(
        schema="mktme.dump-search",
        version=1,
        image="/somewhere/dram.img",
        size_bytes=1 << 36,
        searched_bytes=1 << 33,
        duration_s=2.5,
        patterns=("AES key schedules",),
        hits=(hit,),
        more=12345,
        counted=True,
    )
    screen = io.StringIO()
    Console(file=screen, width=columns).print(cli_dump_search._table(report))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert "Found in dram.img" in lines[0]
    words = set(screen.getvalue().split())
    assert {"0xf12345678", "63", "alice", "0x123456789", "decryption,", "byte-swapped,"} <= words
