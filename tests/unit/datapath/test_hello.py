# SPDX-License-Identifier: GPL-2.0-or-later
"""Hellos: what a plugin may say, and that nothing else gets past `decode_hello`."""

from __future__ import annotations

import dataclasses
import re
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mktme.datapath import link
from mktme.datapath.link import Hello, LinkError, RamBlock, Segment, decode_hello, encode_answer

from ..fake_qemu import (
    FAULTS,
    GIB,
    PAGE,
    PAGES,
    REGISTERS,
    STORES,
    Answer,
    HelloFields,
    parse_answer,
    small_hello,
)

# 4 GiB of RAM on q35: 2 GiB at 0, the rest above the PCI hole.
SPLIT = HelloFields(
    plugin_api=7,
    vcpus=4,
    vm=uuid.UUID("6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11"),
    blocks=((0x7F00_0000_0000, 4 * GIB),),
    segments=((0, 0, 2 * GIB), (4 * GIB, 2 * GIB, 2 * GIB)),
)
TWO_BLOCKS = HelloFields(
    # Not in the order of their addresses: RAM offsets follow the order of the message.
    blocks=((0x7F00_0020_0000, 2 * PAGE), (0x7F00_0010_0000, 3 * PAGE)),
    segments=((0, 0, PAGE), (PAGE, PAGE, 3 * PAGE), (4 * GIB, 4 * PAGE, PAGE)),
)
INLINE = HelloFields(capabilities=STORES | FAULTS)
LINK_PROTOCOL_H = Path(__file__).parents[3] / "qemu-plugin" / "link_protocol.h"


def test_hello_says_what_the_plugin_said() -> None:
    hello = decode_hello(SPLIT.encode())
    assert hello == Hello(
        vm_uuid=uuid.UUID("6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11"),
        plugin_api=7,
        vcpus=4,
        capabilities=STORES | PAGES,
        store_map_bytes=4096 + 4 * GIB // 64,
        blocks=(RamBlock(0x7F00_0000_0000, 4 * GIB, 0),),
        segments=(Segment(0, 0, 2 * GIB), Segment(4 * GIB, 2 * GIB, 2 * GIB)),
    )
    assert hello.ram_bytes == 4 * GIB
    assert hello.descriptor_count == 4


def test_blocks_follow_each_other_in_ram_offsets() -> None:
    hello = decode_hello(TWO_BLOCKS.encode())
    assert [block.ram_offset for block in hello.blocks] == [0, 2 * PAGE]
    assert hello.ram_bytes == 5 * PAGE
    assert hello.descriptor_count == 5


@pytest.mark.parametrize(
    ("capabilities", "descriptors"),
    [
        (STORES, 2),
        (PAGES, 3),
        (STORES | PAGES, 4),
        (FAULTS, 2),
        (STORES | FAULTS, 3),
        (0, 1),
        (REGISTERS, 2),
        (STORES | PAGES | REGISTERS, 5),
    ],
)
def test_each_tracker_brings_its_descriptors(capabilities: int, descriptors: int) -> None:
    hello = decode_hello(small_hello(capabilities=capabilities))
    assert hello.descriptor_count == descriptors
    assert bool(hello.store_map_bytes) == bool(capabilities & STORES)


def test_segments_may_come_in_any_order() -> None:
    assert SPLIT.segments is not None
    reversed_ = dataclasses.replace(SPLIT, segments=SPLIT.segments[::-1])
    assert sorted(map(dataclasses.astuple, decode_hello(reversed_.encode()).segments)) == sorted(
        SPLIT.segments
    )


def test_the_largest_hello_is_as_large_as_announced() -> None:
    largest = HelloFields(
        blocks=tuple((0x10000 * (1 + index), PAGE) for index in range(link.MAX_BLOCKS)),
        segments=(
            *((PAGE * index, PAGE * index, PAGE) for index in range(link.MAX_SEGMENTS - 2)),
            (1 << 40, PAGE * 15, PAGE),
        ),
    )
    assert len(decode_hello(largest.encode()).blocks) == 16
    assert len(largest.encode()) == link.HELLO_MAX_BYTES - 24  # a segment a page: 16 of 17


BIG = 1 << 52
BLOCK = 0x7F00_0000_0000

MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "another magic": ({"magic": b"MKTMELNX"}, "not a hello"),
    "older version": ({"version": 0}, "link protocol 0, this engine 1"),
    "newer version": ({"version": 2}, "link protocol 2, this engine 1"),
    "no block": ({"block_count": 0, "total_bytes": 64 + 24}, "0 RAM blocks"),
    "too many blocks": ({"block_count": 17}, "17 RAM blocks"),
    "more blocks than there are": ({"block_count": 2}, "bytes, 120 expected"),
    "no segment": ({"segments": ()}, "0 segments"),
    "too many segments": ({"segment_count": 18}, "18 segments"),
    "more segments than there are": ({"segment_count": 2}, "128 expected"),
    "total too small": ({"total_bytes": 64}, "104 expected"),
    "total too large": ({"total_bytes": 2**32 - 1}, "104 expected"),
    "large pages": ({"page_bytes": 16384}, "page size"),
    "reserved": ({"reserved": 1}, "reserved"),
    "unknown capability": ({"capabilities": 16}, "unknown capabilities"),
    "pages tracked and faults served": (
        {"capabilities": STORES | PAGES | FAULTS},
        "tracked and faults served, both at once",
    ),
    "pagemap beside faults": (
        {"capabilities": FAULTS, "descriptor_count": 3},
        "3 descriptors, 2 expected",
    ),
    "no vCPU": ({"vcpus": 0}, "0 vCPUs"),
    "too many vCPUs": ({"vcpus": 4097}, "4097 vCPUs"),
    "no descriptors": ({"descriptor_count": 0}, "0 descriptors, 4 expected"),
    "too many descriptors": ({"descriptor_count": 5}, "5 descriptors, 4 expected"),
    "no store map": ({"store_map_bytes": 0}, "store map of 0 bytes"),
    "store map without its header": ({"store_map_bytes": 64}, "4160 expected"),
    "huge store map": ({"store_map_bytes": 2**64 - 1}, "4160 expected"),
    "store map not announced": (
        {"capabilities": PAGES, "store_map_bytes": 4160},
        "4160 bytes, 0 expected",
    ),
    "empty block": ({"blocks": ((BLOCK, 0),)}, "block 0 is not made of whole pages"),
    "half a page": ({"blocks": ((BLOCK, 2048),)}, "block 0 is not made of whole pages"),
    "block off its page": ({"blocks": ((BLOCK + 1, PAGE),)}, "not made of whole pages"),
    "block at null": ({"blocks": ((0, PAGE),)}, "not made of whole pages"),
    "block in the kernel": ({"blocks": ((2**63, PAGE),)}, "outside any address space"),
    "block that wraps": ({"blocks": ((2**64 - PAGE, 2 * PAGE),)}, "outside any address space"),
    "more RAM than addresses": (
        {"blocks": ((PAGE, BIG), (2 * BIG, PAGE)), "segments": ((0, 0, BIG),)},
        "block 1 lies outside",
    ),
    "blocks that overlap": (
        {"blocks": ((BLOCK + PAGE, PAGE), (BLOCK, 2 * PAGE))},
        "RAM blocks overlap",
    ),
    "the same block twice": ({"blocks": ((BLOCK, PAGE), (BLOCK, PAGE))}, "RAM blocks overlap"),
    "empty segment": ({"segments": ((0, 0, 0),)}, "segment 0 is not made of whole pages"),
    "segment off its page": ({"segments": ((64, 0, PAGE),)}, "segment 0 is not made of whole"),
    "segment from within a page": ({"segments": ((0, 64, PAGE),)}, "segment 0 is not made of"),
    "segment past all addresses": ({"segments": ((BIG, 0, PAGE),)}, "segment 0 lies outside"),
    "segment that wraps": (
        {"segments": ((2**64 - PAGE, 0, 2 * PAGE),)},
        "segment 0 lies outside",
    ),
    "RAM left out at its end": (
        {"blocks": ((BLOCK, 2 * PAGE),), "segments": ((0, 0, PAGE),)},
        "exactly once",
    ),
    "RAM left out at its start": (
        {"blocks": ((BLOCK, 2 * PAGE),), "segments": ((0, PAGE, PAGE),)},
        "exactly once",
    ),
    "RAM twice": (
        {"segments": ((0, 0, PAGE), (PAGE, 0, PAGE))},
        "exactly once",
    ),
    "another VM's RAM": ({"segments": ((0, 0, PAGE), (PAGE, PAGE, PAGE))}, "exactly once"),
    "one address for two pages": (
        {"blocks": ((BLOCK, 2 * PAGE),), "segments": ((0, 0, PAGE), (0, PAGE, PAGE))},
        "segments overlap",
    ),
}


@pytest.mark.parametrize(("fields", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_hello_is_refused(fields: dict[str, Any], message: str) -> None:
    decode_hello(small_hello())  # it is the field that makes the difference
    with pytest.raises(LinkError, match=message):
        decode_hello(small_hello(**fields))


def test_version_is_told_before_anything_else_is_looked_at() -> None:
    with pytest.raises(LinkError, match="link protocol 9") as caught:
        decode_hello(small_hello(version=9, page_bytes=1, block_count=99))
    assert "make setup" in str(caught.value.hint)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 103])
def test_short_hello_is_refused(size: int) -> None:
    with pytest.raises(LinkError, match=f"hello of {size} bytes"):
        decode_hello(small_hello()[:size])


def test_long_hello_is_refused() -> None:
    with pytest.raises(LinkError, match="hello of 105 bytes, 104 expected"):
        decode_hello(small_hello() + b"\0")


# --- anything at all --------------------------------------------------------------------------


def decode_or_refuse(message: bytes) -> Hello | None:
    """Whatever else is raised fails the test; and what is accepted must be consistent."""
    try:
        hello = decode_hello(message)
    except LinkError:
        return None
    ram_bytes = sum(block.size_bytes for block in hello.blocks)
    assert 0 < hello.ram_bytes == ram_bytes == sum(part.size_bytes for part in hello.segments)
    for size in (*(b.size_bytes for b in hello.blocks), *(s.size_bytes for s in hello.segments)):
        assert size > 0
        assert size % PAGE == 0
    spans = sorted((one.guest_physical, one.size_bytes) for one in hello.segments)
    assert all(low + size <= high for (low, size), (high, _) in pairwise(spans))
    spans = sorted((one.host_address, one.size_bytes) for one in hello.blocks)
    assert all(low + size <= high for (low, size), (high, _) in pairwise(spans))
    assert 1 <= hello.descriptor_count <= link.MAX_DESCRIPTORS
    assert hello.capabilities & (PAGES | FAULTS) != PAGES | FAULTS
    return hello


@given(st.binary(max_size=link.HELLO_MAX_BYTES + 64))
@example(b"MKTMELNK")
def test_any_bytes_are_a_hello_or_refused(message: bytes) -> None:
    decode_or_refuse(message)


@given(
    good=st.sampled_from([HelloFields(), SPLIT, TWO_BLOCKS, INLINE]),
    edits=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 24),
    more=st.binary(max_size=24),
)
def test_damaged_hello_is_a_hello_or_refused(
    good: HelloFields, edits: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    message = bytearray(good.encode())
    for at, value in edits:
        message[at % len(message)] = value
    decode_or_refuse(bytes(message[: len(message) - cut]) + more)


# Numbers about which ranges turn: pages, limits of addresses, wrap-around.
NUMBERS = st.one_of(
    st.sampled_from([0, 1, PAGE, 2 * PAGE, GIB, 1 << 32, BIG, 1 << 56, 2**63, 2**64 - PAGE]),
    st.integers(0, 16).map(lambda pages: pages * PAGE),
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=300)
@given(
    blocks=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=4),
    segments=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=4),
    capabilities=st.integers(0, 16),
)
def test_any_ranges_are_a_hello_or_refused(
    blocks: list[tuple[int, int]], segments: list[tuple[int, int, int]], capabilities: int
) -> None:
    fields = HelloFields(
        blocks=tuple(blocks),
        segments=tuple(segments),
        capabilities=capabilities,
        store_map_bytes=(4096 + sum(size for _, size in blocks) // 64) % 2**64,
    )
    decode_or_refuse(fields.encode())


# --- answers, and the C side ------------------------------------------------------------------


def test_acceptance() -> None:
    assert parse_answer(encode_answer()) == Answer(True, "")


def test_refusal_says_why() -> None:
    assert parse_answer(encode_answer("no ♥ for you")) == Answer(False, "no ♥ for you")
    assert parse_answer(encode_answer("")) == Answer(False, "")


def test_long_reason_is_cut_between_characters() -> None:
    # 480 bytes are what the plugin has room for; the 160th heart would end at 481.
    answer = parse_answer(encode_answer("x" + "♥" * 200))
    assert answer == Answer(False, "x" + "♥" * 159)


def test_limits_are_those_of_the_plugin() -> None:
    header = LINK_PROTOCOL_H.read_text()
    defined = dict(re.findall(r"^#define (MKTME_\w+)\s+(.+)$", header, re.M))
    assert int(defined["MKTME_LINK_VERSION"]) == link.PROTOCOL_VERSION
    assert int(defined["MKTME_MAX_BLOCKS"]) == link.MAX_BLOCKS
    assert int(defined["MKTME_MAX_SEGMENTS"]) == link.MAX_SEGMENTS
    assert defined["MKTME_CAPABILITY_STORES"] == "(1u << 0)"
    assert link.CAPABILITY_STORES == STORES == 1
    assert defined["MKTME_CAPABILITY_PAGES"] == "(1u << 1)"
    assert link.CAPABILITY_PAGES == PAGES == 2
    assert defined["MKTME_CAPABILITY_FAULTS"] == "(1u << 2)"
    assert link.CAPABILITY_FAULTS == FAULTS == 4
    assert len(encode_answer("x" * 1000)) == 16 + int(defined["MKTME_MAX_REASON_BYTES"])
