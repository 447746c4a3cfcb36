# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that people and other processes write: platform.toml, a DRAM image's sidecar, a key."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec

from mktme.engine import firmware
from mktme.engine.errors import DramError, KeyMaterialError
from mktme.engine.firmware import PlatformConfig, PlatformConfigError
from mktme.engine.keys import KeyTable, read_key_file
from mktme.engine.sidecar import ExclusionRecord, read_sidecar
from mktme.engine.tme import Tme
from mktme.engine.xts import Algorithm
from mktme.service.platform_file import read_platform

from ...unit.engine.fake_rng import FakeRng
from ...unit.engine.test_dram import SIDECAR
from ..mutate import mutate_lines, mutate_tree
from ..target import Target, refusal


class _Scratch:
    """One private file, written again for each input."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.path = Path(self._directory.name) / "file"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> Path:
        # In this order, since file systems are slow to free a block only to allocate it again.
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))
        return self.path


@functools.cache
def _scratch() -> _Scratch:
    return _Scratch()


# --- platform.toml ----------------------------------------------------------------------------


def check_platform(data: bytes) -> str:
    """Only `PlatformConfigError` comes out, of one line; every platform that is read boots."""
    try:
        config = read_platform(_scratch().write(data))
    except PlatformConfigError as error:
        assert str(error).isprintable(), error
        assert error.hint is not None
        assert error.hint.isprintable(), error.hint
        return "refused"
    assert msgspec.convert(msgspec.to_builtins(config), PlatformConfig) == config
    keys = KeyTable(FakeRng())
    tme = Tme(keys, maxphyaddr=config.physical_address_bits, revision=config.revision)
    firmware.boot(tme, config)
    assert tme.activate.lock
    assert tme.active == config.tme
    assert keys.keyid_bits == config.keyid_bits
    assert (tme.exclusion is None) == (config.exclusion is None)
    keys.reset()
    return "platform"


_PLATFORMS: Final = (
    b"",
    b"""\
dram = "2G"
physical-address-bits = 40
tme = true
policy = "aes-xts-256"
bypass = true
save-key-for-standby = true
exclusion = { base = "16M", size = "1M" }
keyid-bits = 4
algorithms = ["aes-xts-256"]
revision = "spec-1.4"
""",
    b"""\
tme = false
keyid-bits = 0
algorithms = []
[exclusion]
base = 0x1000000
size = '1024K'
""",
    b'exclusion.size = "1MiB" # a comment\nexclusion."base" = "16m"\r\ndram = 4_096\n',
)
_KEYS: Final = (
    *(field.encode_name for field in msgspec.structs.fields(PlatformConfig)),
    *("exclusion.base", "exclusion.size", "base", "size", '"tme"', "x", '"a\\nb"', "''"),
)
_VALUES: Final = (
    *("true", "false", "0", "-1", "0.5", "nan", "1979-05-27", "07:32:00", "[]", "{}", '""', "''"),
    *("15", "16", "31", "32", "40", "52", "53", "4096", "4095", "0x1000", "0o17", "0b1", "1_000"),
    *('"512M"', '"2G"', '"4K"', '"1m"', '"0"', '"1KiB"', "4503599627370496", "4503599627370497"),
    *(f'"{one.value}"' for one in Algorithm),
    *(f'["aes-xts-128", "{one.value}"]' for one in Algorithm),
    *('"sdm"', '"spec-1.4"', '{ base = "16M", size = "1M" }', "{ base = 0 }", '"""\nx"""'),
    *('"\\u001b[31m"', "'''\n'''", "[[[[]]]]", "9" * 30),
)


def _make_setting(rng: Random) -> bytes:
    if not rng.randrange(8):
        return rng.choice((b"[exclusion]", b"[[exclusion]]", b"[x.y]", b"# comment", b"", b"\r"))
    return f"{rng.choice(_KEYS)} = {rng.choice(_VALUES)}".encode()


def _mutate_platform(data: bytes, rng: Random) -> bytes:
    return mutate_lines(data, rng, _make_setting)


# --- the sidecar ------------------------------------------------------------------------------


def check_sidecar(data: bytes) -> str:
    """Only `DramError` comes out, and what is read is the same after it was written."""
    try:
        sidecar = read_sidecar(_scratch().write(data))
    except DramError as error:
        return refusal(str(error).removeprefix(str(_scratch().path)))
    assert read_sidecar(_scratch().write(msgspec.json.encode(sidecar))) == sidecar
    return "sidecar"


_SIDECARS: Final = (
    SIDECAR,
    msgspec.structs.replace(SIDECAR, exclusion=ExclusionRecord(mask=1 << 46, base=1 << 20)),
    msgspec.structs.replace(SIDECAR, keys=(), vms=(), pages=()),
)
_SIDECAR_TREES: Final[tuple[Any, ...]] = tuple(msgspec.to_builtins(one) for one in _SIDECARS)


def _mutate_sidecar(data: bytes, rng: Random) -> bytes | None:
    try:
        return msgspec.json.encode(mutate_tree(msgspec.json.decode(data), rng, _SIDECAR_TREES))
    # msgspec's, of what is not JSON; the others, of what it decodes and cannot encode.
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
        return None


# --- a key file -------------------------------------------------------------------------------

_HEXADECIMAL: Final = b"0123456789abcdefABCDEF"


def check_key_file(data: bytes) -> str:
    """Only `KeyMaterialError` comes out, and nothing of the file with it.

    The first byte chooses the algorithm.
    """
    algorithm = list(Algorithm)[data[0] % len(Algorithm) if data else 0]
    content = data[1:]
    expected = _key_in(content, algorithm.key_bytes)
    told_of_nothing = _told_of_nothing(algorithm)
    try:
        key = read_key_file(_scratch().write(content), algorithm)
    except KeyMaterialError as error:
        # The same whatever the content, so it has nothing of it.
        assert _told(error) == told_of_nothing
        assert expected is None
        return "refused"
    assert type(key) is bytearray
    equal = expected is not None and bytes(key) == expected
    assert equal
    return "key"


def _key_in(content: bytes, size: int) -> bytes | None:
    """The key in a file's content, read in another way than the engine does."""
    digits = b"".join(content.split())
    if len(content) > 1024:
        return None
    if not digits.strip(_HEXADECIMAL):
        return bytes.fromhex(digits.decode()) if len(digits) == 2 * size else None
    return content if len(content) == size else None


def _told(error: KeyMaterialError) -> tuple[object, ...]:
    return error.args, error.hint, error.__cause__, error.__context__


@functools.cache
def _told_of_nothing(algorithm: Algorithm) -> tuple[object, ...]:
    try:
        read_key_file(_scratch().write(b""), algorithm)
    except KeyMaterialError as error:
        return _told(error)
    raise AssertionError("an empty file is a key")


def _key_seeds() -> Iterator[bytes]:
    for choice, algorithm in enumerate(Algorithm):
        key = bytes(range(0xA0, 0xA0 + algorithm.key_bytes))
        for content in (key, f"{key.hex(' ').upper()}\r\n".encode(), key.hex("\n", 16).encode()):
            yield bytes([choice]) + content
    yield bytes(1) + b"0" * 1024


TARGETS: Final = (
    Target(
        name="platform",
        check=check_platform,
        seeds=(*_PLATFORMS, b"x = " + b"[" * 1000),
        max_bytes=2048,
        mutate=_mutate_platform,
        tokens=tuple(token.encode() for token in (*_KEYS, *_VALUES, " = ", "[", "]", "\n", "#")),
    ),
    Target(
        name="sidecar",
        check=check_sidecar,
        seeds=(*map(msgspec.json.encode, _SIDECARS), b'{"x": ' + b"[" * 1500),
        max_bytes=4096,
        mutate=_mutate_sidecar,
    ),
    Target(
        name="key-file",
        check=check_key_file,
        seeds=tuple(_key_seeds()),
        max_bytes=1100,
        tokens=tuple(bytes([one]) for one in b" \t\r\n\v\f0aF\x1c\x85\xa0"),
    ),
)
