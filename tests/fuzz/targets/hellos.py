# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin's hello and calls: `mktme.datapath.link`, `mktme.datapath.registers`."""

from __future__ import annotations

import struct
from random import Random
from typing import Final

from mktme.datapath import link
from mktme.datapath.registers import CALL_BYTES, Operation, decode_call

from ...unit.datapath.test_hello import SPLIT, TWO_BLOCKS, decode_or_refuse
from ...unit.fake_qemu import LINE, MAP_HEADER, PAGE, STORES, HelloFields
from ..mutate import number
from ..target import Target

_HEAD_BYTES: Final = 64
_SEEDS: Final = (
    HelloFields(),
    SPLIT,
    TWO_BLOCKS,
    HelloFields(capabilities=0),
    HelloFields(
        blocks=tuple((0x10000 * (1 + index), PAGE) for index in range(link.MAX_BLOCKS)),
        segments=tuple((PAGE * index, PAGE * index, PAGE) for index in range(link.MAX_BLOCKS)),
    ),
)


def check(data: bytes) -> str:
    """Only `LinkError` comes out, and the ranges of what is accepted fit together."""
    return "refused" if decode_or_refuse(data) is None else "hello"


def mutate(data: bytes, rng: Random) -> bytes | None:
    """Other ranges in a hello whose counts and sizes are right."""
    if len(data) < _HEAD_BYTES:
        return None
    block_count, segment_count = struct.unpack_from("<HH", data, 14)
    segments_at = _HEAD_BYTES + 16 * block_count
    if len(data) != segments_at + 24 * segment_count or not block_count or not segment_count:
        return None
    blocks = list(struct.iter_unpack("<QQ", data[_HEAD_BYTES:segments_at]))
    segments = list(struct.iter_unpack("<QQQ", data[segments_at:]))
    for _ in range(rng.randint(1, 2)):
        ranges = rng.choice((blocks, segments))
        place = rng.randrange(len(ranges))
        match rng.randrange(4):
            case 0 if len(ranges) > 1:
                del ranges[place]
            case 1 if len(ranges) < link.MAX_SEGMENTS:
                ranges.insert(place, ranges[rng.randrange(len(ranges))])
            case _:
                fields = list(ranges[place])
                fields[rng.randrange(len(fields))] = number(rng)
                ranges[place] = tuple(fields)
    capabilities = rng.randrange(16)
    ram_bytes = sum(size for _address, size in blocks)
    map_bytes = MAP_HEADER + ram_bytes // LINE if capabilities & STORES else 0
    return HelloFields(
        capabilities=capabilities,
        blocks=tuple(blocks),
        segments=tuple(segments),
        store_map_bytes=map_bytes % (1 << 64),
    ).encode()


def check_call(data: bytes) -> str:
    """Only `LinkError` comes out, and what is accepted is one of the two instructions."""
    try:
        call = decode_call(memoryview(data))
    except link.LinkError:
        return "refused"
    assert len(data) == CALL_BYTES
    assert call.number < 1 << 32
    assert call.value < 1 << 64
    assert call.program == data[-192:]
    return call.operation.name


TARGETS: Final = (
    Target(
        name="call",
        check=check_call,
        seeds=tuple(struct.pack("<IIQ", one, 0x982, 3) + bytes(192) for one in (*Operation, 0, 3)),
        max_bytes=CALL_BYTES + 8,
    ),
    Target(
        name="hello",
        check=check,
        seeds=tuple(fields.encode() for fields in _SEEDS),
        max_bytes=link.HELLO_MAX_BYTES + 64,
        mutate=mutate,
    ),
)
