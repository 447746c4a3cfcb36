# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds a key shows it to nobody: no text, copy, pickle, JSON, log record or exception."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import random
import traceback
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mktme.engine.dram import Dram
from mktme.engine.errors import EngineError, KeyMaterialError
from mktme.engine.firmware import PlatformConfig
from mktme.engine.integrity import LineMacs
from mktme.engine.keys import KeyTable
from mktme.engine.package import Package, PowerEvent
from mktme.engine.pconfig import Command, encode
from mktme.engine.rng import Rng
from mktme.engine.secret import SecretBuffer, allocate
from mktme.engine.tme import GeneralProtection
from mktme.engine.xts import Algorithm, XtsCipher

KEY = random.Random(3).randbytes(32)


def shows(text: str | bytes, key: bytes = KEY) -> bool:
    """Whether 6 bytes in a row of a key are in some text: as they are, in hexadecimal, as repr."""
    data = text.encode("latin-1", "backslashreplace") if isinstance(text, str) else text
    parts = [key[at : at + 6] for at in range(len(key) - 5)]
    lowered = data.lower()
    return any(
        part in data
        or part.hex().encode() in lowered
        or repr(part)[2:-1].encode() in data
        or ", ".join(map(str, part)).encode() in data
        for part in parts
    )


def test_a_leak_would_be_noticed() -> None:
    """The control of all below."""
    for leak in (KEY, KEY.hex(), KEY.hex().upper(), repr(KEY), str(list(KEY)), bytearray(KEY)):
        assert shows(leak if isinstance(leak, str | bytes) else repr(leak))
    assert not shows("nothing")


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Package]:
    with Dram.create(tmp_path / "dram.img", 64 << 12) as dram:
        package = Package(dram, PlatformConfig(save_key_for_standby=True))
        package.program(1, Command.SET_KEY_DIRECT, Algorithm.AES_XTS_128, bytearray(KEY))
        yield package


def secret() -> SecretBuffer:
    buffer = allocate(len(KEY))
    buffer.view[:] = KEY
    return buffer


def holders(package: Package) -> dict[str, object]:
    """Everything that has a key, or has something that has one."""
    return {
        "SecretBuffer": secret(),
        "XtsCipher": package.keys.cipher(1),
        "LineMacs": LineMacs(KEY),
        "KeyTable": package.keys,
        "Rng": Rng(),
        "Tme": package.tme,
        "MemoryController": package.controller,
        "Package": package,
    }


HOLDERS = (
    "SecretBuffer",
    "XtsCipher",
    "LineMacs",
    "KeyTable",
    "Rng",
    "Tme",
    "MemoryController",
    "Package",
)


@pytest.mark.parametrize("name", HOLDERS)
def test_holder_of_a_key_shows_none(package: Package, name: str) -> None:
    holder = holders(package)[name]
    for text in (repr(holder), str(holder), f"{holder}"):
        assert not shows(text)


@pytest.mark.parametrize("name", HOLDERS)
def test_holder_of_a_key_is_not_copied_out(package: Package, name: str) -> None:
    holder = holders(package)[name]
    for export in (
        pickle.dumps,
        copy.deepcopy,
        json.dumps,
        msgspec.json.encode,
        msgspec.msgpack.encode,
    ):
        with pytest.raises(TypeError) as caught:
            export(holder)
        assert not shows("".join(traceback.format_exception(caught.value)))


def test_nothing_is_logged_or_raised_with_a_key(
    package: Package, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[EngineError] = []
    with caplog.at_level(logging.DEBUG):
        for keyid, command, key in (
            (0, Command.SET_KEY_DIRECT, KEY),
            (64, Command.SET_KEY_DIRECT, KEY),
            (2, Command.SET_KEY_DIRECT, KEY[:16] * 2),
            (2, Command.SET_KEY_DIRECT, KEY[:31]),
            (2, Command.SET_KEY_RANDOM, KEY),
            (2, Command.SET_KEY_DIRECT, KEY),
        ):
            try:
                package.program(keyid, command, Algorithm.AES_XTS_128, bytearray(key))
            except EngineError as error:
                raised.append(error)
        program = encode(3, Command.SET_KEY_DIRECT, Algorithm.AES_XTS_128, KEY)
        for leaf, address in ((1, 0), (0, 1)):
            try:
                package.pconfig(leaf, address, program)
            except GeneralProtection as error:
                raised.append(error)
        cipher = package.keys.cipher(2)
        assert cipher is not None
        for event in PowerEvent:
            package.power(event)
        with pytest.raises(KeyMaterialError, match="wiped") as wiped:
            cipher.encrypt_lines(np.zeros((1, 8), np.uint64), np.zeros(1, np.uint64))
        raised.append(wiped.value)
    assert len(raised) >= 6
    for one in raised:
        assert not shows("".join(traceback.format_exception(one)))
        assert not shows(repr(vars(one)))
    assert not any(shows(record.getMessage() + repr(record.args)) for record in caplog.records)


def test_direct_copies_are_refused_too() -> None:
    for holder in (
        XtsCipher(Algorithm.AES_XTS_128, KEY),
        LineMacs(KEY),
        KeyTable(),
        secret(),
        Rng(),
    ):
        with pytest.raises(TypeError):
            copy.copy(holder)
