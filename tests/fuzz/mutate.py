# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes that keep an input's structure: of trees (MessagePack, JSON), of records, of lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

NUMBERS: Final = (
    *(0, 1, 2, 3, 4, 15, 16, 63, 64, 255, 256, 511, 512, 4095, 4096, 8192, 32767, 32768, 65536),
    *((1 << bits) + step for bits in (21, 31, 32, 46, 52, 53, 56, 63) for step in (-1, 0, 1)),
    (1 << 64) - 4096,
    (1 << 64) - 1,
)
"""About which limits turn: fields' widths, pages, KeyIDs, addresses."""

_LEAVES: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    -1,
    -(1 << 63),
    0.5,
    -0.0,
    float("inf"),
    float("nan"),
    "",
    "x" * 256,
    "\0",
    "\u2028",
    b"",
    b"\0" * 192,
    [],
    {},
)


def number(rng: Random) -> int:
    """A number of at most 64 bits: one of `NUMBERS`, some page, a single bit, or any."""
    match rng.randrange(4):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.randrange(64) << 12
        case 2:
            return 1 << rng.randrange(64)
    return rng.getrandbits(64)


def mutate_tree(tree: Any, rng: Random, donors: Sequence[Any]) -> Any:
    """A tree of dicts, lists and leaves with one to three of its nodes changed.

    Args:
        tree: changed in place where it can be.
        rng: makes the choices.
        donors: trees of valid inputs, whose parts are put in; they are left alone.
    """
    for _ in range(rng.randint(1, 3)):
        holders = [node for node in _nodes(tree) if isinstance(node, dict | list) and node]
        if not holders or not rng.randrange(16):
            tree = _copy(rng.choice(donors))
            continue
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        donor = _copy(rng.choice(_nodes(rng.choice(donors))))
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict) and isinstance(donor, dict):
                holder.update(donor)
            case 2 if isinstance(holder, dict) and isinstance(donor, dict) and donor:
                holder[rng.choice(list(donor))] = holder.pop(key)
            case 3 if isinstance(holder, list):
                holder.insert(key, _copy(holder[key]))
            case 1 | 2 | 3:
                holder[key] = donor
            case 4:
                holder[key] = rng.choice(_LEAVES)
            case 5:
                holder[key] = [_copy(holder[key])] * rng.randrange(3)
            case _:
                holder[key] = _nudged(holder[key], rng)
    return tree


def mutate_records(
    data: bytes, rng: Random, head_bytes: int, record_bytes: int, make: Callable[[Random], bytes]
) -> bytes:
    """A sequence of records of one size, behind a head, with one put in, taken out or moved.

    Args:
        data: head and records; an incomplete last record goes.
        rng: makes the choices.
        head_bytes: size of the head.
        record_bytes: size of a record.
        make: makes a record.
    """
    head = data[:head_bytes].ljust(head_bytes, b"\0")
    body = data[head_bytes:]
    records = [
        body[at : at + record_bytes] for at in range(0, len(body) - record_bytes + 1, record_bytes)
    ]
    place = rng.randrange(len(records) + 1)
    match rng.randrange(5):
        case 0 if records:
            del records[place % len(records)]
        case 1 if records:
            records.insert(place, rng.choice(records))
        case 2 if records:
            records[place % len(records)] = make(rng)
        case 3:
            byte = rng.randrange(head_bytes)
            head = head[:byte] + bytes([rng.getrandbits(8)]) + head[byte + 1 :]
        case _:
            records.insert(place, make(rng))
    return head + b"".join(records)


def mutate_lines(data: bytes, rng: Random, make: Callable[[Random], bytes]) -> bytes:
    """Text with one line put in, taken out, or replaced by a new one."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            del lines[place]
        case 1:
            lines[place] = make(rng)
        case _:
            lines.insert(place, make(rng))
    return b"\n".join(lines)


def _nodes(tree: Any) -> list[Any]:
    nodes = [tree]
    for node in nodes:  # grows as we go
        if isinstance(node, dict):
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)
    return nodes


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_copy(value) for value in tree]
    return tree


def _nudged(value: Any, rng: Random) -> Any:
    """A value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return rng.choice((value + 1, value - 1, -value, value << 1, number(rng)))
        case str():
            return value[: rng.randrange(len(value) + 1)] + rng.choice(("", "x", "\u00e9", value))
        case bytes():
            return value[: rng.randrange(len(value) + 1)] + rng.randbytes(rng.randrange(4))
    return rng.choice(_LEAVES)
