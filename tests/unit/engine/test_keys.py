# SPDX-License-Identifier: GPL-2.0-or-later
"""The key table and key files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mktme.engine.errors import KeyIdError, KeyMaterialError
from mktme.engine.keys import KeyDescription, KeyMode, KeyTable, read_key_file
from mktme.engine.xts import Algorithm, XtsCipher

KEY = bytes(range(0xC0, 0xE0))


def sample(cipher: XtsCipher | None) -> bytes:
    """What a cipher makes of a line: equal for equal keys."""
    assert cipher is not None
    return cipher.encrypt_lines(np.zeros((1, 8), np.uint64), np.zeros(1, np.uint64)).tobytes()


# --- the table --------------------------------------------------------------------------------


def test_every_keyid_starts_with_the_tme_key() -> None:
    table = KeyTable(keyid_bits=2)
    assert table.keyid_count == 4
    assert len({sample(table.cipher(keyid)) for keyid in range(4)}) == 1
    assert table.describe() == (KeyDescription(0, KeyMode.PLATFORM, Algorithm.AES_XTS_128),)


def test_tme_keys_differ_between_platforms() -> None:
    assert sample(KeyTable().cipher(0)) != sample(KeyTable().cipher(0))


def test_direct_key_is_used() -> None:
    table = KeyTable()
    table.program_direct(3, Algorithm.AES_XTS_128, KEY)
    assert sample(table.cipher(3)) == sample(XtsCipher(Algorithm.AES_XTS_128, KEY))
    assert sample(table.cipher(2)) == sample(table.cipher(0)) != sample(table.cipher(3))


def test_random_keys_differ() -> None:
    table = KeyTable()
    table.program_random(1, Algorithm.AES_XTS_256)
    first = sample(table.cipher(1))
    table.program_random(2, Algorithm.AES_XTS_256)
    assert first != sample(table.cipher(2))
    table.program_random(1, Algorithm.AES_XTS_256)
    assert first != sample(table.cipher(1))


def test_no_encrypt_has_no_cipher() -> None:
    table = KeyTable()
    table.program_no_encrypt(1)
    assert table.cipher(1) is None


def test_describe_tells_modes_in_order() -> None:
    table = KeyTable(tme_algorithm=Algorithm.AES_XTS_256)
    table.program_no_encrypt(9)
    table.program_random(5, Algorithm.AES_XTS_256)
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    assert table.describe() == (
        KeyDescription(0, KeyMode.PLATFORM, Algorithm.AES_XTS_256),
        KeyDescription(1, KeyMode.DIRECT, Algorithm.AES_XTS_128),
        KeyDescription(5, KeyMode.RANDOM, Algorithm.AES_XTS_256),
        KeyDescription(9, KeyMode.NO_ENCRYPT, None),
    )


def test_cleared_keyid_uses_the_tme_key_and_its_own_is_wiped() -> None:
    table = KeyTable()
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    cipher = table.cipher(1)
    table.clear(1)
    assert table.cipher(1) is table.cipher(0)
    assert len(table.describe()) == 1
    with pytest.raises(KeyMaterialError, match="wiped"):
        sample(cipher)


def test_clearing_what_is_clear_leaves_the_tme_key_alone() -> None:
    table = KeyTable()
    before = sample(table.cipher(0))
    table.clear(1)
    assert sample(table.cipher(0)) == before


def test_refused_key_leaves_the_old_one() -> None:
    table = KeyTable()
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    before = sample(table.cipher(1))
    with pytest.raises(KeyMaterialError):
        table.program_direct(1, Algorithm.AES_XTS_128, KEY[:16] * 2)
    assert sample(table.cipher(1)) == before


@pytest.mark.parametrize("keyid", [-1, 64])
def test_keyid_out_of_range_is_refused(keyid: int) -> None:
    table = KeyTable(keyid_bits=6)
    actions: list[Callable[[], object]] = [
        lambda: table.cipher(keyid),
        lambda: table.clear(keyid),
        lambda: table.program_no_encrypt(keyid),
        lambda: table.program_random(keyid, Algorithm.AES_XTS_128),
        lambda: table.program_direct(keyid, Algorithm.AES_XTS_128, KEY),
    ]
    for action in actions:
        with pytest.raises(KeyIdError, match="0 to 63") as caught:
            action()
        assert caught.value.keyid == keyid


def test_keyid_0_cannot_be_programmed() -> None:
    table = KeyTable()
    before = table.cipher(0)
    actions: list[Callable[[], object]] = [
        lambda: table.clear(0),
        lambda: table.program_no_encrypt(0),
        lambda: table.program_random(0, Algorithm.AES_XTS_128),
        lambda: table.program_direct(0, Algorithm.AES_XTS_128, KEY),
    ]
    for action in actions:
        with pytest.raises(KeyIdError, match="TME key"):
            action()
    assert table.cipher(0) is before


def test_tme_only_platform_has_keyid_0_only() -> None:
    table = KeyTable(keyid_bits=0)
    assert table.keyid_count == 1
    with pytest.raises(KeyIdError):
        table.cipher(1)


@pytest.mark.parametrize("keyid_bits", [-1, 16])
def test_keyid_bits_out_of_range_are_refused(keyid_bits: int) -> None:
    with pytest.raises(ValueError, match="0 to 15"):
        KeyTable(keyid_bits=keyid_bits)


def test_table_shows_no_key() -> None:
    table = KeyTable()
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    assert repr(table) == "<KeyTable 6 bits, 1 KeyIDs programmed>"


# --- key files --------------------------------------------------------------------------------


def key_file(directory: Path, content: bytes, mode: int = 0o600) -> Path:
    path = directory / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


HEX = KEY.hex().encode()


@pytest.mark.parametrize(
    "content",
    [
        KEY,
        HEX,
        HEX.upper() + b"\n",
        b" " + HEX[:32] + b"\r\n\t" + HEX[32:] + b"\n",
        b" ".join(HEX[start : start + 1] for start in range(len(HEX))),
        HEX + b" " * (1024 - len(HEX)),
    ],
    ids=["raw", "hex", "upper", "lines", "spaced", "longest"],
)
def test_key_file_is_read(tmp_path: Path, content: bytes) -> None:
    assert read_key_file(key_file(tmp_path, content), Algorithm.AES_XTS_128) == KEY


def test_longer_algorithm_takes_the_longer_key(tmp_path: Path) -> None:
    raw = bytes(range(64))
    assert read_key_file(key_file(tmp_path, raw), Algorithm.AES_XTS_256) == raw
    assert read_key_file(key_file(tmp_path, raw.hex().encode()), Algorithm.AES_XTS_256) == raw


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        KEY[:-1],
        KEY + b"\n",
        HEX[:-1],
        HEX + b"0",
        HEX + b"00",
        HEX[:-1] + b"g",
        b"0x" + HEX,
        HEX + b" " * (1025 - len(HEX)),
        HEX + b" " * 2000 + HEX,
        HEX[:32],
    ],
    ids=[
        "empty", "blank", "short", "raw with newline", "odd", "odd and long", "long", "no digit",
        "prefix", "too much space", "more behind", "hex of half a key, as long as a raw key",
    ],
)  # fmt: skip
def test_bad_key_file_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = key_file(tmp_path, content)
    with pytest.raises(KeyMaterialError) as caught:
        read_key_file(path, Algorithm.AES_XTS_128)
    message = f"{caught.value} {caught.value.hint}"
    assert str(path) in message
    assert "neither 32 raw bytes nor 64 hexadecimal digits" in message
    assert HEX[:8].decode() not in message
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_hex_key_for_the_shorter_algorithm_is_no_raw_key_for_the_longer(tmp_path: Path) -> None:
    assert len(HEX) == Algorithm.AES_XTS_256.key_bytes
    with pytest.raises(KeyMaterialError, match="neither 64 raw bytes"):
        read_key_file(key_file(tmp_path, HEX), Algorithm.AES_XTS_256)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_key_file_that_others_can_access_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, KEY, mode)
    with pytest.raises(KeyMaterialError, match=f"{mode:04o}") as caught:
        read_key_file(path, Algorithm.AES_XTS_128)
    assert caught.value.hint == f"chmod 600 {path}"


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(key_file(tmp_path, KEY))
    with pytest.raises(KeyMaterialError, match="symbolic link"):
        read_key_file(link, Algorithm.AES_XTS_128)


def test_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(KeyMaterialError, match="not a regular file"):
        read_key_file(fifo, Algorithm.AES_XTS_128)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyMaterialError, match="No such file"):
        read_key_file(tmp_path / "none", Algorithm.AES_XTS_128)
    with pytest.raises(KeyMaterialError, match="not a regular file"):
        read_key_file(tmp_path, Algorithm.AES_XTS_128)
