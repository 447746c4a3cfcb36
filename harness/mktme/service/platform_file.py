# SPDX-License-Identifier: GPL-2.0-or-later
"""platform.toml: a platform as its user writes it down (docs/platform.toml shows every key).

Its keys are those of `PlatformConfig`. Each is optional; what is left out has its default.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from mktme.engine.firmware import (
    MAX_PHYSICAL_ADDRESS_BITS,
    MIN_PHYSICAL_ADDRESS_BITS,
    PlatformConfig,
    PlatformConfigError,
)
from mktme.engine.keys import MAX_KEYID_BITS
from mktme.engine.tme import Revision
from mktme.engine.xts import Algorithm

MAX_FILE_BYTES: Final = 64 << 10

_KEYS: Final = tuple(field.encode_name for field in msgspec.structs.fields(PlatformConfig))
_EXCLUSION_KEYS: Final = ("base", "size")
# `PlatformConfig` checks ranges itself. Here it keeps numbers of any length out of its messages.
_MAX_SIZE: Final = 1 << MAX_PHYSICAL_ADDRESS_BITS

_FILE_HINT: Final = f"give a TOML file of at most {MAX_FILE_BYTES >> 10} KiB, in UTF-8"
_SIZE_HINT: Final = f'allowed: bytes, 0 to {_MAX_SIZE}, or "512M", "2G" and the like'
_EXCLUSION_HINT: Final = 'allowed: { base = "16M", size = "1M" } and the like'
_ALGORITHM_NAMES: Final = tuple(one.value for one in Algorithm)

_SIZE: Final = re.compile(r"(\d{1,18})([KMG]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30}
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,40}")


def read_platform(path: Path) -> PlatformConfig:
    """Read a platform from its file.

    Args:
        path: the file, TOML 1.0.

    Raises:
        PlatformConfigError: with the file, the line where it is certain, the key, what is wrong
            with it, and what is allowed. For the file as a whole, the error's key is its path.
    """
    text = read_text(path)
    try:
        table = tomllib.loads(text)
    # ValueError: Python limits how many digits a number may have.
    except (ValueError, RecursionError) as error:
        raise PlatformConfigError(str(path), f"not TOML: {error}", hint=_FILE_HINT) from error
    try:
        return msgspec.convert(_settings(table), PlatformConfig)
    except PlatformConfigError as error:
        line = line_of(error.key, text)
        place = path if line is None else f"{path}:{line}"
        error.args = (f"{place}: {error}",)
        raise


def parse_size(text: str) -> int:
    """Bytes, from sizes as people write them: 512M, 4G, 786432K, or plain bytes.

    Raises:
        ValueError: it is no such size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size")
    return int(match[1]) << _UNITS[match[2].upper()]


def read_text(path: Path) -> str:
    """The text of a file that somebody wrote by hand.

    Raises:
        PlatformConfigError: it cannot be read, is too large, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PlatformConfigError(
            str(path), f"cannot be read: {error.strerror}", hint=_FILE_HINT
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise PlatformConfigError(
            str(path), f"larger than {MAX_FILE_BYTES >> 10} KiB", hint=_FILE_HINT
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PlatformConfigError(
            str(path), f"not UTF-8: byte {data[error.start]:#04x} on line {line}", hint=_FILE_HINT
        ) from error


def _settings(table: dict[str, Any]) -> dict[str, object]:
    """The file's settings, checked one by one in its order, with sizes in bytes."""
    return {key: _setting(key, value) for key, value in table.items()}


def _setting(key: str, value: object) -> object:
    match key:
        case "dram":
            return _size(key, value)
        case "physical-address-bits":
            return _number(key, value, MIN_PHYSICAL_ADDRESS_BITS, MAX_PHYSICAL_ADDRESS_BITS)
        case "keyid-bits":
            return _number(key, value, 0, MAX_KEYID_BITS)
        case "tme" | "bypass" | "save-key-for-standby":
            if not isinstance(value, bool):
                raise _not_allowed(key, value, ("true", "false"))
            return value
        case "policy":
            return _name(key, value, _ALGORITHM_NAMES)
        case "revision":
            return _name(key, value, tuple(one.value for one in Revision))
        case "algorithms":
            return _algorithms(key, value)
        case "exclusion":
            return _exclusion(key, value)
    raise _unknown(key, key, _KEYS)


def _number(key: str, value: object, least: int, most: int) -> int:
    hint = f"allowed: {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlatformConfigError(key, f"{_shown(value)} is not a whole number", hint=hint)
    if not least <= value <= most:
        raise PlatformConfigError(key, f"{_shown(value)} is out of range", hint=hint)
    return value


def _size(key: str, value: object) -> int:
    size = value
    if isinstance(value, str):
        try:
            size = parse_size(value)
        except ValueError:
            size = None
    if not isinstance(size, int) or isinstance(size, bool):
        raise PlatformConfigError(key, f"{_shown(value)} is not a size", hint=_SIZE_HINT)
    if not 0 <= size <= _MAX_SIZE:
        raise PlatformConfigError(key, f"{_shown(value)} is out of range", hint=_SIZE_HINT)
    return size


def _name(key: str, value: object, names: tuple[str, ...]) -> object:
    if value not in names:
        raise _not_allowed(key, value, names)
    return value


def _algorithms(key: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise PlatformConfigError(
            key,
            f"{_shown(value)} is not an array",
            hint=f"allowed: an array of {', '.join(_ALGORITHM_NAMES)}",
        )
    for index, one in enumerate(value):
        _name(key, one, _ALGORITHM_NAMES)
        if one in value[:index]:
            raise PlatformConfigError(
                key,
                f"{one} is there twice",
                hint=f"allowed, once each: {', '.join(_ALGORITHM_NAMES)}",
            )
    return value


def _exclusion(key: str, value: object) -> dict[str, int]:
    if not isinstance(value, dict):
        raise PlatformConfigError(key, f"{_shown(value)} is not a table", hint=_EXCLUSION_HINT)
    for name in value:
        if name not in _EXCLUSION_KEYS:
            raise _unknown(f"{key}.{name}", name, _EXCLUSION_KEYS)
    for name in _EXCLUSION_KEYS:
        if name not in value:
            raise PlatformConfigError(key, f"has no {name}", hint=_EXCLUSION_HINT)
    return {
        "base": _size(f"{key}.base", value["base"]),
        "size_bytes": _size(f"{key}.size", value["size"]),
    }


def _not_allowed(key: str, value: object, allowed: Iterable[str]) -> PlatformConfigError:
    return PlatformConfigError(
        key, f"{_shown(value)} is not allowed", hint=f"allowed: {', '.join(allowed)}"
    )


def _unknown(key: str, name: str, known: Iterable[str]) -> PlatformConfigError:
    nearest = difflib.get_close_matches(name[:40].lower(), known, 1)
    guess = f"did you mean {nearest[0]}? " if nearest else ""
    return PlatformConfigError(
        key if _BARE_KEY.fullmatch(name) else reprlib.repr(key),
        "unknown key",
        hint=f"{guess}allowed: {', '.join(known)}",
    )


def _shown(value: object) -> str:
    """A value for an error's one line, whatever it holds and however long it is."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return reprlib.repr(value)
        case int() if value.bit_length() > 64:
            return "a number of more than 64 bits"
        case list():
            return "an array"
        case dict():
            return "a table"
    return str(value)


def line_of(key: str, text: str) -> int | None:
    """The line that sets a key, or its table; None where a plain search cannot be certain.

    tomllib gives no lines. A line that starts with the key's name is certain if all before it is
    TOML in itself (so that it is no part of a string or an array) and does not set the key, and
    with it, and what its value has of further lines, it does.

    Args:
        key: its names, with dots between them.
        text: the file.
    """
    path = key.split(".")
    # TOML has no other line ends, where str.splitlines has many.
    lines = [f"{line}\n" for line in text.split("\n")]
    for depth in range(len(path), 0, -1):
        *tables, name = map(re.escape, path[:depth])
        prefix = "".join(rf"{table}\s*+\.\s*+" for table in tables)
        start = re.compile(rf"\s*+(?:\[\[?\s*+)?(?:{prefix})?{name}\s*+[=.\]]")
        for number, line in enumerate(lines):
            if start.match(line):
                if not _lacks("".join(lines[:number]), path[:depth]):
                    break
                if _sets(lines, number, path[:depth]):
                    return number + 1
    return None


def _sets(lines: list[str], number: int, path: list[str]) -> bool:
    """Whether the text up to a line, and as many more as make it TOML, sets a key."""
    for end in range(number + 1, len(lines) + 1):
        text = "".join(lines[:end])
        try:
            tomllib.loads(text)
        except (ValueError, RecursionError):
            continue
        return not _lacks(text, path)
    return False


def _lacks(text: str, path: list[str]) -> bool:
    """Whether text is TOML that does not set a key."""
    try:
        value: object = tomllib.loads(text)
    # RecursionError: the file was read with a little more stack left than there is here.
    except (ValueError, RecursionError):
        return False
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return True
        value = value[name]
    return False
