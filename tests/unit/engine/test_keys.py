# SPDX-License-Identifier: GPL-2.0-or-later
"""The key table and key files."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mktme.engine.errors import KeyIdError, KeyMaterialError
from mktme.engine.keys import KeyDescription, KeyMode, KeyTable, read_key_file
from mktme.engine.rng import EntropyError
from mktme.engine.xts import Algorithm, XtsCipher

from .conftest import activated
from .fake_rng import FakeRng

KEY = bytes(range(0xC0, 0xE0))


def sample(cipher: XtsCipher | None) -> bytes:
    """What a cipher makes of a line: equal for equal keys."""
    assert cipher is not None
    return cipher.encrypt_lines(np.zeros((1, 8), np.uint64), np.zeros(1, np.uint64)).tobytes()


# --- the TME key ------------------------------------------------------------------------------


def test_before_activation_there_is_keyid_0_alone_and_it_does_not_encrypt() -> None:
    table = KeyTable()
    assert (table.keyid_bits, table.keyid_count) == (0, 1)
    assert table.cipher(0) is None
    table.draw_tme_key(Algorithm.AES_XTS_128)
    assert table.cipher(0) is None
    with pytest.raises(KeyIdError):
        table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    assert table.describe() == (KeyDescription(0, KeyMode.PLATFORM, None),)


def test_every_keyid_starts_with_the_tme_key() -> None:
    table = activated(keyid_bits=2)
    assert table.keyid_count == 4
    assert len({sample(table.cipher(keyid)) for keyid in range(4)}) == 1
    assert table.describe() == (KeyDescription(0, KeyMode.PLATFORM, Algorithm.AES_XTS_128),)


def test_tme_keys_differ_between_platforms() -> None:
    assert sample(activated().cipher(0)) != sample(activated().cipher(0))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_tme_key_is_what_was_drawn(algorithm: Algorithm) -> None:
    rng = FakeRng()
    table = activated(algorithm=algorithm, rng=rng)
    (key,) = rng.given
    assert sample(table.cipher(0)) == sample(XtsCipher(algorithm, key))


def test_no_key_is_activated_when_none_could_be_drawn() -> None:
    rng = FakeRng()
    rng.broken = True
    table = KeyTable(rng)
    with pytest.raises(EntropyError):
        table.draw_tme_key(Algorithm.AES_XTS_128)
    with pytest.raises(KeyMaterialError, match="no TME key"):
        table.activate(6)
    assert table.keyid_count == 1


def test_failed_draw_leaves_no_older_key_to_activate() -> None:
    rng = FakeRng()
    table = KeyTable(rng)
    table.draw_tme_key(Algorithm.AES_XTS_128)
    rng.broken = True
    with pytest.raises(EntropyError):
        table.draw_tme_key(Algorithm.AES_XTS_128)
    with pytest.raises(KeyMaterialError, match="no TME key"):
        table.activate(6)


def test_failed_restore_leaves_no_older_key_to_activate() -> None:
    table = KeyTable()
    table.draw_tme_key(Algorithm.AES_XTS_128)
    assert not table.restore_tme_key(Algorithm.AES_XTS_128)
    with pytest.raises(KeyMaterialError, match="no TME key"):
        table.activate(6)


def test_bypass_leaves_keyid_0_and_what_is_as_it_in_plaintext() -> None:
    table = KeyTable()
    table.draw_tme_key(Algorithm.AES_XTS_128)
    table.activate(2, bypass=True)
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    assert [table.cipher(keyid) is None for keyid in range(4)] == [True, False, True, True]
    assert table.describe()[0] == KeyDescription(0, KeyMode.PLATFORM, None)


@pytest.mark.parametrize("keyid_bits", [-1, 16])
def test_keyid_bits_out_of_range_are_refused(keyid_bits: int) -> None:
    table = KeyTable()
    table.draw_tme_key(Algorithm.AES_XTS_128)
    with pytest.raises(ValueError, match="0 to 15"):
        table.activate(keyid_bits)


def test_reset_destroys_every_key() -> None:
    table = activated()
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    ciphers = [table.cipher(0), table.cipher(1)]
    table.reset()
    assert table.describe() == (KeyDescription(0, KeyMode.PLATFORM, None),)
    assert table.keyid_count == 1
    for cipher in ciphers:
        with pytest.raises(KeyMaterialError, match="wiped"):
            sample(cipher)
    assert not table.restore_tme_key(Algorithm.AES_XTS_128)


def test_saved_key_outlives_a_reset_and_is_restored() -> None:
    table = activated()
    table.save_tme_key()
    before = sample(table.cipher(0))
    for _ in range(2):
        table.reset()
        assert table.cipher(0) is None
        assert table.restore_tme_key(Algorithm.AES_XTS_128)
        table.activate(6)
        assert sample(table.cipher(0)) == before


def test_saved_key_does_not_outlive_a_loss_of_power() -> None:
    table = activated()
    table.save_tme_key()
    cipher = table.cipher(0)
    table.reset(keep_saved_key=False)
    assert not table.restore_tme_key(Algorithm.AES_XTS_128)
    with pytest.raises(KeyMaterialError, match="wiped"):
        sample(cipher)
    with pytest.raises(KeyMaterialError, match="no TME key"):
        table.activate(6)


def test_key_of_another_algorithm_is_not_restored() -> None:
    table = activated()
    table.save_tme_key()
    table.reset()
    assert not table.restore_tme_key(Algorithm.AES_XTS_256)
    assert table.restore_tme_key(Algorithm.AES_XTS_128)


def test_saving_another_key_destroys_the_one_saved_before() -> None:
    table = activated()
    table.save_tme_key()
    first = table.cipher(0)
    table.save_tme_key()  # the same again: it stays
    sample(first)
    table.reset()
    table.draw_tme_key(Algorithm.AES_XTS_128)
    table.activate(6)
    table.save_tme_key()
    with pytest.raises(KeyMaterialError, match="wiped"):
        sample(first)
    sample(table.cipher(0))


def test_key_drawn_anew_is_another_one_and_the_saved_one_is_still_there() -> None:
    table = activated()
    table.save_tme_key()
    before = sample(table.cipher(0))
    table.reset()
    table.draw_tme_key(Algorithm.AES_XTS_128)
    table.activate(6)
    assert sample(table.cipher(0)) != before
    table.reset()
    assert table.restore_tme_key(Algorithm.AES_XTS_128)
    table.activate(6)
    assert sample(table.cipher(0)) == before


# --- the other KeyIDs -------------------------------------------------------------------------


def test_direct_key_is_used() -> None:
    table = activated()
    table.program_direct(3, Algorithm.AES_XTS_128, KEY)
    assert sample(table.cipher(3)) == sample(XtsCipher(Algorithm.AES_XTS_128, KEY))
    assert sample(table.cipher(2)) == sample(table.cipher(0)) != sample(table.cipher(3))


def test_random_keys_differ() -> None:
    table = activated()
    table.program_random(1, Algorithm.AES_XTS_256)
    first = sample(table.cipher(1))
    table.program_random(2, Algorithm.AES_XTS_256)
    assert first != sample(table.cipher(2))
    table.program_random(1, Algorithm.AES_XTS_256)
    assert first != sample(table.cipher(1))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_entropy_is_mixed_into_a_random_key(algorithm: Algorithm) -> None:
    rng = FakeRng()
    table = activated(rng=rng)
    entropy = bytes(range(1, algorithm.key_bytes + 1))
    table.program_random(1, algorithm, entropy)
    drawn = rng.given[-1]
    mixed = bytes(left ^ right for left, right in zip(drawn, entropy, strict=True))
    assert sample(table.cipher(1)) == sample(XtsCipher(algorithm, mixed))
    assert sample(table.cipher(1)) != sample(XtsCipher(algorithm, drawn))


def test_no_encrypt_has_no_cipher() -> None:
    table = activated()
    table.program_no_encrypt(1)
    assert table.cipher(1) is None


def test_describe_tells_modes_in_order() -> None:
    table = activated(algorithm=Algorithm.AES_XTS_256)
    table.program_no_encrypt(9)
    table.program_random(5, Algorithm.AES_XTS_256)
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    assert table.describe() == (
        KeyDescription(0, KeyMode.PLATFORM, Algorithm.AES_XTS_256),
        KeyDescription(1, KeyMode.DIRECT, Algorithm.AES_XTS_128),
        KeyDescription(5, KeyMode.RANDOM, Algorithm.AES_XTS_256),
        KeyDescription(9, KeyMode.NO_ENCRYPT, None),
    )
    assert [table.is_programmed(keyid) for keyid in (0, 1, 2, 9)] == [False, True, False, True]


def test_cleared_keyid_uses_the_tme_key_and_its_own_is_wiped() -> None:
    table = activated()
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    cipher = table.cipher(1)
    table.clear(1)
    assert table.cipher(1) is table.cipher(0)
    assert not table.is_programmed(1)
    assert len(table.describe()) == 1
    with pytest.raises(KeyMaterialError, match="wiped"):
        sample(cipher)


def test_reprogramming_wipes_the_key_that_was_there() -> None:
    table = activated()
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    cipher = table.cipher(1)
    table.program_random(1, Algorithm.AES_XTS_128)
    with pytest.raises(KeyMaterialError, match="wiped"):
        sample(cipher)


def test_clearing_what_is_clear_leaves_the_tme_key_alone() -> None:
    table = activated()
    before = sample(table.cipher(0))
    table.clear(1)
    assert sample(table.cipher(0)) == before


def test_refused_key_leaves_the_old_one() -> None:
    table = activated()
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    before = sample(table.cipher(1))
    with pytest.raises(KeyMaterialError):
        table.program_direct(1, Algorithm.AES_XTS_128, KEY[:16] * 2)
    assert sample(table.cipher(1)) == before


def test_random_key_that_cannot_be_drawn_leaves_the_old_one() -> None:
    rng = FakeRng()
    table = activated(rng=rng)
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    rng.broken = True
    with pytest.raises(EntropyError):
        table.program_random(1, Algorithm.AES_XTS_128)
    assert sample(table.cipher(1)) == sample(XtsCipher(Algorithm.AES_XTS_128, KEY))


@pytest.mark.parametrize("keyid", [-1, 64])
def test_keyid_out_of_range_is_refused(keyid: int) -> None:
    table = activated(keyid_bits=6)
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
    table = activated()
    before = table.cipher(0)
    actions: list[Callable[[], object]] = [
        lambda: table.clear(0),
        lambda: table.program_no_encrypt(0),
        lambda: table.program_random(0, Algorithm.AES_XTS_128),
        lambda: table.program_direct(0, Algorithm.AES_XTS_128, KEY),
    ]
    for action in actions:
        with pytest.raises(KeyIdError, match="TME key") as caught:
            action()
        assert caught.value.keyid == 0
    assert table.cipher(0) is before


def test_tme_only_platform_has_keyid_0_only() -> None:
    table = activated(keyid_bits=0)
    assert table.keyid_count == 1
    with pytest.raises(KeyIdError):
        table.cipher(1)


def test_table_shows_no_key() -> None:
    table = activated()
    table.program_direct(1, Algorithm.AES_XTS_128, KEY)
    assert repr(table) == "<KeyTable 6 bits, 1 KeyIDs programmed>"


def test_table_cannot_be_pickled_or_copied() -> None:
    table = activated()
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="holds keys"):
            duplicate(table)


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
