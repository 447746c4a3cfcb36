# SPDX-License-Identifier: GPL-2.0-or-later
"""What a tenant demands of a VM before it is trusted: `policy.toml`, a table of settings.

Every setting has a default, and each default is the strict one. Key size is the exception: no
algorithm of the specification has both 256-bit keys and integrity, so it is the lesser there is.
"""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, Self

from mktme.attest.claims import ExceptionKind, KeySource
from mktme.attest.errors import PolicyError
from mktme.engine.keys import KeyMode

_MAX_BYTES: Final = 64 << 10
_MAX_SECONDS: Final = 366 * 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy; attributes are policy.toml's settings, with "-" for "_".

    Attributes:
        name: what results call it.
        key_size: the least bits of each of a VM's two AES keys, 128 or 256. AES-XTS has two, for
            data and tweaks: aes-xts-256 has 2 x 256 bits of key, and counts as 256.
        key_modes: how its KeyID may be programmed.
        key_sources: where its key may come from.
        data_paths: how its memory may get into DRAM.
        integrity: whether each line must have a MAC.
        exceptions: which pages there may be that are not under its own KeyID.
        exceptions_max: how many bytes of them.
        exclusion_range: whether KeyID 0 may leave a range, or all it has, unencrypted.
        debug: whether the engine or QEMU may be open to debuggers.
        vtpm: whether there must be a vTPM.
        quote: whether it must have quoted the VM's boot.
        lifetime_s: how old evidence may be, seconds.
        clock_skew_s: how far clocks may be apart, seconds.
    """

    name: str = "policy"
    key_size: Literal[128, 256] = 128
    key_modes: frozenset[KeyMode] = frozenset({KeyMode.RANDOM, KeyMode.DIRECT})
    key_sources: frozenset[KeySource] = frozenset({KeySource.RANDOM, KeySource.BROKER})
    data_paths: frozenset[str] = frozenset({"inline"})
    integrity: bool = True
    exceptions: frozenset[ExceptionKind] = frozenset()
    exceptions_max: int = 0
    exclusion_range: bool = False
    debug: bool = False
    vtpm: bool = False
    quote: bool = False
    lifetime_s: int = 300
    clock_skew_s: int = 30

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            PolicyError: it cannot be read, or a setting makes no sense.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise PolicyError("", f"{path}: {error.strerror}") from error
        return cls.decode(data)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """What a file's contents say.

        Raises:
            PolicyError: they are no policy.
        """
        if len(data) > _MAX_BYTES:
            raise PolicyError("", f"a policy has at most {_MAX_BYTES} bytes")
        try:
            table = tomllib.loads(data.decode())
        except (ValueError, RecursionError) as error:
            text = str(error) if str(error).isprintable() else "not TOML"
            raise PolicyError("", f"not a TOML file: {text}") from error
        return cls(**{key.replace("-", "_"): _READERS[key](key, one) for key, one in _known(table)})


def _known(table: dict[str, Any]) -> list[tuple[str, Any]]:
    for key in table:
        if key not in _READERS:
            nearest = difflib.get_close_matches(key[:40].lower(), _READERS, 1)
            guess = f"did you mean {nearest[0]}? " if nearest else ""
            raise PolicyError(
                key if key.isprintable() and len(key) < 40 else reprlib.repr(key),
                "unknown setting",
                hint=f"{guess}allowed: {', '.join(_READERS)}",
            )
    return list(table.items())


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise PolicyError(key, "neither true nor false", hint="allowed: true, false")
    return value


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 64:
        raise PolicyError(key, "not a name", hint="allowed: printable text, 1 to 64 characters")
    return value


def _key_size(key: str, value: object) -> int:
    if not isinstance(value, int) or value not in (128, 256):
        raise PolicyError(key, "not a size of AES keys here", hint="allowed: 128, 256")
    return value


def _number(most: int) -> Callable[[str, object], int]:
    def read(key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise PolicyError(key, "not a number in range", hint=f"allowed: 0 to {most}")
        return value

    return read


def _subset(allowed: dict[str, Any]) -> Callable[[str, object], frozenset[Any]]:
    def read(key: str, value: object) -> frozenset[Any]:
        hint = f"allowed: an array of {', '.join(allowed)}"
        if not isinstance(value, list):
            raise PolicyError(key, "not an array", hint=hint)
        for one in value:
            if not isinstance(one, str) or one not in allowed:
                shown = reprlib.repr(one) if isinstance(one, str) else "what is no text"
                nearest = difflib.get_close_matches(str(one)[:40].lower(), allowed, 1)
                guess = f"did you mean {nearest[0]}? " if nearest else ""
                raise PolicyError(key, f"{shown} is not allowed", hint=guess + hint)
        return frozenset(allowed[one] for one in value)

    return read


_READERS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "name": _text,
    "key-size": _key_size,
    "key-modes": _subset({one.value: one for one in (KeyMode.RANDOM, KeyMode.DIRECT)}),
    "key-sources": _subset({one.value: one for one in KeySource if one is not KeySource.NONE}),
    "data-paths": _subset({"inline": "inline", "shadow": "shadow"}),
    "integrity": _flag,
    "exceptions": _subset({one.value: one for one in ExceptionKind}),
    "exceptions-max": _number((1 << 63) - 1),
    "exclusion-range": _flag,
    "debug": _flag,
    "vtpm": _flag,
    "quote": _flag,
    "lifetime-s": _number(_MAX_SECONDS),
    "clock-skew-s": _number(_MAX_SECONDS),
}
assert {key.replace("-", "_") for key in _READERS} == {one.name for one in fields(Policy)}
