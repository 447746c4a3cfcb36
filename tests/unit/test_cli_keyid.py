# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme keyid`: the KeyIDs of a running platform, shown and changed from another process."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

from mktme.cli import ExitCode
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.platform_report import KeyIdChange, KeyIdReport, KeyIdRow
from mktme.proof.schema import DOCUMENTS

from .command import Mktme, Result, runner
from .running_platforms import DRAM_BYTES, Platforms, RunningPlatform, make_platforms

MIB = 1 << 20
XTS_128, XTS_256 = Algorithm.AES_XTS_128, Algorithm.AES_XTS_256
KEYS = {
    XTS_128: random.Random(3).randbytes(32),
    XTS_256: random.Random(4).randbytes(64),
}
SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


@pytest.fixture
def platforms(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platforms]:
    with make_platforms(monkeypatch, tmp_path_factory) as platforms:
        yield platforms


@pytest.fixture
def one(platforms: Platforms) -> RunningPlatform:
    """The only platform that runs; others may own it."""
    return platforms.start()


def private(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return private(tmp_path / "key", KEYS[XTS_128])


def failed(result: Result, message: str, hint: str | None = None) -> bool:
    """Whether a command refused with these words, no more and no less."""
    told = f"mktme: {message}\n" + ("" if hint is None else f"  hint: {hint}\n")
    return result == Result(ExitCode.USAGE, "", told)


# --- which platform ---------------------------------------------------------------------------

COMMANDS = {
    "list": ("keyid", "list"),
    "list as JSON": ("keyid", "list", "--json"),
    "program": ("keyid", "program"),
    "clear": ("keyid", "clear", "1"),
    "show": ("platform", "show", "--running"),
}
EACH_COMMAND = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
WHERE_TO_FIND_ONE = "mktme run --keep keeps one running; --engine SOCKET names one elsewhere"


@EACH_COMMAND
def test_none_runs(mktme: Mktme, platforms: Platforms, command: tuple[str, ...]) -> None:
    assert failed(mktme(*command), "no platform is running", WHERE_TO_FIND_ONE)


@EACH_COMMAND
def test_several_run(mktme: Mktme, platforms: Platforms, command: tuple[str, ...]) -> None:
    first, second = sorted(platforms.start().control_socket for _ in range(2))
    hint = f"choose one: --engine {first} or --engine {second}"
    assert failed(mktme(*command), "2 platforms are running", hint)


def test_one_of_several(mktme: Mktme, platforms: Platforms) -> None:
    first, second = platforms.start(), platforms.start()
    for keyid in ("3", "4"):
        assert mktme("keyid", "program", keyid, "--engine", second.control_socket).code == 0
    assert mktme("keyid", "clear", "4", "--engine", second.control_socket).code == 0
    assert set(second.keyids()) == {3}
    assert first.keyids() == {}
    listed = mktme("keyid", "list", "--json", "--engine", second.control_socket)
    assert [row["keyid"] for row in json.loads(listed.out)["keyids"]] == [0, 3]


@EACH_COMMAND
def test_engine_that_is_none(mktme: Mktme, platforms: Platforms, command: tuple[str, ...]) -> None:
    result = mktme(*command, "--engine", platforms.tmpdir / "x.sock")
    message = f"no engine answers at {platforms.tmpdir}/x.sock"
    assert failed(result, message, WHERE_TO_FIND_ONE)


def test_engine_in_a_directory_of_another_name(
    mktme: Mktme, one: RunningPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(one.control_socket.parent)
    assert mktme("keyid", "list", "--engine", "control.sock").code == ExitCode.OK


def test_observers_look_and_do_not_touch(mktme: Mktme, platforms: Platforms) -> None:
    one = platforms.start(shared_ownership=False)
    for command in (("program",), ("program", "--engine", one.control_socket), ("clear", "1")):
        assert failed(
            mktme("keyid", *command),
            "only the process that started this platform may change it",
            "mktme run --keep starts one that others may change",
        )
    assert one.keyids() == {}
    assert mktme("keyid", "list").code == ExitCode.OK


def test_without_arguments_there_is_help(mktme: Mktme) -> None:
    result = mktme("keyid")
    assert result.code == ExitCode.USAGE
    for command in ("list", "program", "clear"):
        assert re.search(rf"\b{command}\b", result.said)


# --- list -------------------------------------------------------------------------------------


@pytest.fixture
def used(one: RunningPlatform) -> RunningPlatform:
    """A platform with a VM whose pages are under its own KeyID and others."""
    vm, _ = one.add_vm("alice")
    clear = one.client.program_key(KeyMode.NO_ENCRYPT, vm=vm)
    one.client.assign_pages(vm, 0, 4096, 0)
    one.client.assign_pages(vm, MIB, 2 * MIB, clear)
    other = one.client.program_key(KeyMode.RANDOM, XTS_256, keyid=40)
    one.client.assign_pages(vm, 4 * MIB, 12 << 10, other)
    one.client.program_key(KeyMode.RANDOM, XTS_128, keyid=41)
    return one


ROWS = (
    KeyIdRow(0, KeyMode.PLATFORM, XTS_128, None, DRAM_BYTES - 8 * MIB + 4096),
    KeyIdRow(1, KeyMode.RANDOM, XTS_128, "alice", 6 * MIB - (16 << 10)),
    KeyIdRow(2, KeyMode.NO_ENCRYPT, None, "alice", 2 * MIB),
    KeyIdRow(40, KeyMode.RANDOM, XTS_256, None, 12 << 10),
    KeyIdRow(41, KeyMode.RANDOM, XTS_128, None, 0),
)


def test_list_as_a_table(mktme: Mktme, used: RunningPlatform) -> None:
    result = mktme("keyid", "list")
    assert (result.code, result.err) == (ExitCode.OK, "")
    for part in (
        "KeyID mode cipher VM memory",
        " 0 platform aes-xts-128 - 56.0 MiB ",
        " 1 random aes-xts-128 alice 6.0 MiB ",
        " 2 no-encrypt plaintext alice 2.0 MiB ",
        " 40 random aes-xts-256 - 12 KiB ",
        " 41 random aes-xts-128 - - ",
    ):
        assert part in result.said
    assert (
        result.out.splitlines()[-1] == "59 more can be programmed; until then they are as KeyID 0"
    )


def test_list_as_json(mktme: Mktme, used: RunningPlatform) -> None:
    result = mktme("keyid", "list", "--json")
    assert (result.code, result.err) == (ExitCode.OK, "")
    report = msgspec.json.decode(result.out, type=KeyIdReport)
    assert report == KeyIdReport("mktme.keyid", 1, ROWS, 59)


def properties(schema: dict[str, object], name: str) -> set[str]:
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    return set(definitions[name]["properties"])


def test_json_is_what_the_schema_says(mktme: Mktme, used: RunningPlatform) -> None:
    """No key material least of all: the schema has no place for it."""
    assert DOCUMENTS["keyid-1.json"] is KeyIdReport
    schema = json.loads((SCHEMAS / "keyid-1.json").read_text())
    document = json.loads(mktme("keyid", "list", "--json").out)
    assert set(document) == properties(schema, "KeyIdReport")
    for row in document["keyids"]:
        assert set(row) == properties(schema, "KeyIdRow")


def test_list_of_a_platform_that_nobody_uses(mktme: Mktme, one: RunningPlatform) -> None:
    said = mktme("keyid", "list").said
    assert " 0 platform aes-xts-128 - 64.0 MiB 63 more can be programmed" in said


def test_list_of_a_platform_whose_keyids_are_all_taken(mktme: Mktme, platforms: Platforms) -> None:
    one = platforms.start(PlatformConfig(keyid_bits=1))
    one.client.program_key(KeyMode.RANDOM)
    assert mktme("keyid", "list").out.splitlines()[-1] == "no more can be programmed"


def test_list_of_a_platform_without_encryption(mktme: Mktme, platforms: Platforms) -> None:
    platforms.start(PlatformConfig(tme=False, keyid_bits=0))
    assert (
        " 0 platform plaintext - 64.0 MiB no more can be programmed" in mktme("keyid", "list").said
    )


def test_vm_with_a_name_like_markup(mktme: Mktme, one: RunningPlatform) -> None:
    one.add_vm("[red]x[/]")
    assert "[red]x[/]" in mktme("keyid", "list").out


# --- program ----------------------------------------------------------------------------------


def test_first_free_keyid_gets_a_random_key(mktme: Mktme, one: RunningPlatform) -> None:
    one.add_vm()
    result = mktme("keyid", "program")
    assert result == Result(ExitCode.OK, "KeyID 2: random aes-xts-128\n", "")
    assert one.keyids()[2] == (KeyMode.RANDOM, XTS_128)


@pytest.mark.parametrize("keyid", [1, 17, 63])
def test_keyid_by_its_number(mktme: Mktme, one: RunningPlatform, keyid: int) -> None:
    result = mktme("keyid", "program", str(keyid), "--algorithm", "aes-xts-256")
    assert result == Result(ExitCode.OK, f"KeyID {keyid}: random aes-xts-256\n", "")
    assert one.keyids() == {keyid: (KeyMode.RANDOM, XTS_256)}


def test_no_encryption(mktme: Mktme, one: RunningPlatform) -> None:
    result = mktme("keyid", "program", "--mode", "no-encrypt")
    assert result == Result(ExitCode.OK, "KeyID 1: no-encrypt\n", "")
    assert one.keyids() == {1: (KeyMode.NO_ENCRYPT, None)}


def test_keyid_that_nobody_uses_is_programmed_again(mktme: Mktme, one: RunningPlatform) -> None:
    assert mktme("keyid", "program", "5", "--mode", "no-encrypt").code == ExitCode.OK
    assert mktme("keyid", "program", "5", "--algorithm", "aes-xts-256").code == ExitCode.OK
    assert one.keyids() == {5: (KeyMode.RANDOM, XTS_256)}


def test_changes_as_json(mktme: Mktme, one: RunningPlatform) -> None:
    """Documents for programs, which have to know what was chosen for them."""
    schema = json.loads((SCHEMAS / "keyid-change-1.json").read_text())

    def change(*command: str) -> KeyIdChange:
        result = mktme("keyid", *command, "--json")
        assert (result.code, result.err) == (ExitCode.OK, "")
        assert set(json.loads(result.out)) == properties(schema, "KeyIdChange")
        return msgspec.json.decode(result.out, type=KeyIdChange)

    kind: Final = "mktme.keyid-change"
    assert change("program") == KeyIdChange(kind, 1, 1, KeyMode.RANDOM, XTS_128)
    assert change("program", "9", "--mode", "no-encrypt") == KeyIdChange(
        kind, 1, 9, KeyMode.NO_ENCRYPT, None
    )
    assert change("clear", "1") == KeyIdChange(kind, 1, 1, None, None)
    assert one.keyids() == {9: (KeyMode.NO_ENCRYPT, None)}
    assert failed(
        mktme("keyid", "clear", "64", "--json"), "KeyID 64 cannot be programmed: 1 to 63 can"
    )


@pytest.mark.parametrize("text", [False, True], ids=["raw", "hex"])
@pytest.mark.parametrize("algorithm", KEYS)
def test_known_key(
    mktme: Mktme,
    one: RunningPlatform,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Algorithm,
    text: bool,
) -> None:
    key = KEYS[algorithm]
    private(tmp_path / "key", key.hex().encode() + b"\n" if text else key)
    monkeypatch.chdir(tmp_path)  # which is not the engine's directory
    command = ("program", "--mode", "direct", "--algorithm", algorithm.value, "--key-file", "key")
    result = mktme("keyid", *command)
    assert result == Result(ExitCode.OK, f"KeyID 1: direct {algorithm.value}\n", "")
    assert one.keyids() == {1: (KeyMode.DIRECT, algorithm)}


def test_algorithm_is_the_platforms_first_unless_it_is_named(
    mktme: Mktme, platforms: Platforms
) -> None:
    one = platforms.start(PlatformConfig(algorithms=(XTS_256,)))
    assert mktme("keyid", "program").out == "KeyID 1: random aes-xts-256\n"
    assert mktme("keyid", "program", "--mode", "no-encrypt").code == ExitCode.OK
    assert failed(
        mktme("keyid", "program", "--algorithm", "aes-xts-128"),
        "the platform's algorithms do not include aes-xts-128",
        "--algorithm aes-xts-256",
    )
    assert one.keyids() == {1: (KeyMode.RANDOM, XTS_256), 2: (KeyMode.NO_ENCRYPT, None)}


def test_keyid_of_a_vm_is_not_programmed(mktme: Mktme, one: RunningPlatform) -> None:
    _, keyid = one.add_vm("bob")
    before = one.keyids()
    for command in ("program", "clear"):
        assert failed(
            mktme("keyid", command, str(keyid)),
            f"KeyID {keyid} is in use by bob: its memory would be lost",
            "give its pages another KeyID first, or remove the VM",
        )
    assert one.keyids() == before


def test_all_are_taken(mktme: Mktme, platforms: Platforms) -> None:
    platforms.start(PlatformConfig(keyid_bits=1))
    assert mktme("keyid", "program").code == ExitCode.OK
    result = mktme("keyid", "program")
    assert failed(result, "every KeyID is taken", "remove a VM or clear one")


def test_platform_without_keyids(mktme: Mktme, platforms: Platforms) -> None:
    platforms.start(PlatformConfig(keyid_bits=0, algorithms=()))
    result = mktme("keyid", "program")
    hint = "set keyid-bits in platform.toml"
    assert failed(result, "the platform has no KeyIDs", hint)


@pytest.mark.parametrize("command", ["program", "clear"])
def test_keyid_that_the_platform_does_not_have(
    mktme: Mktme, one: RunningPlatform, command: str
) -> None:
    for keyid in (64, 32767):
        result = mktme("keyid", command, str(keyid))
        assert failed(result, f"KeyID {keyid} cannot be programmed: 1 to 63 can")
    assert one.keyids() == {}


REFUSED_BY_PARSING = {
    "the TME key's": ("program 0", ["KEYID", "greater than or equal to 1"]),
    "none that any platform has": ("program 32768", ["KEYID", "less than or equal to 32767"]),
    "more than 64 bits": (f"program {1 << 70}", ["KEYID", "less than or equal to 32767"]),
    "no number": ("program two", ["KEYID", "integer"]),
    "too many": ("program 1 2", ["unexpected extra argument"]),
    "no such mode": ("program --mode secret", ["--mode", "'secret'", "no-encrypt"]),
    "the platform's own mode": ("program --mode platform", ["--mode", "'platform'"]),
    "no such algorithm": ("program --algorithm rot13", ["--algorithm", "'rot13'"]),
    "none to clear": ("clear", ["Missing argument", "KEYID"]),
    "the TME key's, to clear": ("clear 0", ["KEYID", "greater than or equal to 1"]),
    "more than 64 bits, to clear": (f"clear {1 << 70}", ["KEYID", "less than or equal to"]),
    "no such command": ("forget 1", ["No such command 'forget'"]),
}


@pytest.mark.parametrize(
    ("line", "told"), REFUSED_BY_PARSING.values(), ids=REFUSED_BY_PARSING.keys()
)
def test_argument_that_makes_no_sense(
    mktme: Mktme, one: RunningPlatform, line: str, told: list[str]
) -> None:
    result = mktme("keyid", *line.split())
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    for part in told:
        assert part in result.said
    assert one.keyids() == {}


def test_mode_and_key_file_go_together(mktme: Mktme, platforms: Platforms, key_file: Path) -> None:
    """And that is said before any platform is looked for."""
    result = mktme("keyid", "program", "--mode", "direct")
    hint = "name its file with --key-file FILE"
    assert failed(result, "--mode direct needs a key", hint)
    for mode in ("random", "no-encrypt"):
        result = mktme("keyid", "program", "--mode", mode, "--key-file", key_file)
        assert failed(result, f"--mode {mode} has no use for --key-file", "--mode direct has")


def fifo(path: Path) -> Path:
    os.mkfifo(path, 0o600)
    return path


def link(path: Path) -> Path:
    path.symlink_to(private(path.with_name("target"), KEYS[XTS_128]))
    return path


def directory(path: Path) -> Path:
    path.mkdir()
    return path


CREATE = "create one with: (umask 077; head -c 32 /dev/urandom > FILE)"
NO_KEY = "no aes-xts-128 key: neither 32 raw bytes nor 64 hexadecimal digits"
KEY_128, KEY_256 = KEYS[XTS_128], KEYS[XTS_256]
KEY_FILES: dict[str, tuple[Callable[[Path], Path], str, str | None]] = {
    "not there": (lambda path: path, "{}: No such file or directory", None),
    "directory": (directory, "{}: not a regular file", None),
    "FIFO": (fifo, "{}: not a regular file", None),
    "link": (link, "{}: Too many levels of symbolic links", "give the file itself"),
    "for all to read": (
        lambda path: private(path, KEY_128, 0o644),
        "{}: others have access to this key file (mode 0644)",
        "chmod 600 {}",
    ),
    "empty": (lambda path: private(path, b""), f"{{}}: {NO_KEY}", CREATE),
    "short": (lambda path: private(path, KEY_128[1:]), f"{{}}: {NO_KEY}", CREATE),
    "of another algorithm": (lambda path: private(path, KEY_256), f"{{}}: {NO_KEY}", CREATE),
    "hex, a digit short": (
        lambda path: private(path, KEY_128.hex().encode()[1:]),
        f"{{}}: {NO_KEY}",
        CREATE,
    ),
    "no hex": (
        lambda path: private(path, KEY_128.hex().encode()[1:] + b"x"),
        f"{{}}: {NO_KEY}",
        CREATE,
    ),
}


@pytest.mark.parametrize(("make", "message", "hint"), KEY_FILES.values(), ids=KEY_FILES)
def test_key_file_that_is_none(
    mktme: Mktme,
    one: RunningPlatform,
    tmp_path: Path,
    make: Callable[[Path], Path],
    message: str,
    hint: str | None,
) -> None:
    path = make(tmp_path / "key")
    result = mktme("keyid", "program", "--mode", "direct", "--key-file", path)
    assert failed(result, message.format(path), hint and hint.format(path))
    assert one.keyids() == {}


# --- clear ------------------------------------------------------------------------------------


def test_key_is_cleared(mktme: Mktme, one: RunningPlatform) -> None:
    assert mktme("keyid", "program", "9").code == ExitCode.OK
    assert mktme("keyid", "program", "10").code == ExitCode.OK
    result = mktme("keyid", "clear", "9")
    assert result == Result(ExitCode.OK, "KeyID 9: cleared, it is as KeyID 0 again\n", "")
    assert set(one.keyids()) == {10}


def test_keyid_without_a_key_is_not_cleared(mktme: Mktme, one: RunningPlatform) -> None:
    assert failed(mktme("keyid", "clear", "9"), "KeyID 9 has no key of its own")


# --- no key is shown --------------------------------------------------------------------------


def shows(text: str, key: bytes) -> bool:
    """Whether any 4 bytes in a row of a key are in a text, as they are or in hexadecimal."""
    parts = [key[at : at + 4] for at in range(len(key) - 3)]
    data, lowered = text.encode("latin-1", "replace"), text.lower()
    return any(part in data or part.hex() in lowered for part in parts)


def test_a_key_that_is_shown_would_be_noticed() -> None:
    """The control for the test below."""
    for leak in (KEY_128.decode("latin-1"), KEY_128.hex(), KEY_128.hex().upper()[10:18]):
        assert shows(f"key is {leak}!", KEY_128)
    assert not shows("KeyID 1: direct aes-xts-128", KEY_128)


def test_no_output_shows_a_key(mktme: Mktme, one: RunningPlatform, tmp_path: Path) -> None:
    weak = KEY_128[:16] * 2
    contents = {
        "raw": KEY_128,
        "hex": KEY_128.hex().encode(),
        "long": KEY_128 + b"x",
        "digits": KEY_128.hex().encode() + b"0",
        "weak": weak,
        "weak-hex": weak.hex().encode(),
    }
    said = ""
    codes = []
    for name, content in contents.items():
        path = private(tmp_path / name, content)
        result = mktme("keyid", "program", "--mode", "direct", "--key-file", path)
        codes.append(result.code)
        said += result.out + result.err
    for command in COMMANDS.values():
        result = mktme(*command)
        assert result.code == ExitCode.OK
        said += result.out + result.err
    said += one.engine.log_path.read_text()
    assert codes == [ExitCode.OK] * 2 + [ExitCode.USAGE] * 4
    assert said.count("data key and tweak key are equal") == 2  # it did look at what is in them
    assert not shows(said, KEY_128)


# --- as a user runs it ------------------------------------------------------------------------


def command(columns: int, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "mktme.cli", "keyid", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"COLUMNS": str(columns)},
    )
    return ended.stdout


def test_table_fits_80_columns(used: RunningPlatform) -> None:
    engine = ("--engine", str(used.control_socket))
    shown = command(80, "list", *engine)
    assert max(map(len, shown.splitlines())) <= 80
    for row in ROWS:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{row.keyid:>6} "))
        assert row.mode.value in line
        assert line.rstrip().endswith(("MiB", "KiB", "-"))
    assert command(20, "list", *engine).count("\n") > shown.count("\n")  # control
