# SPDX-License-Identifier: GPL-2.0-or-later
"""Ranges of pages: as people write them, where they are in RAM, and what they come to be under."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mktme.datapath.shadow import Track
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service.client import EngineProcess, EngineRefusedError
from mktme.service.wire import VmStatus
from mktme.vm.host import UsageError
from mktme.vm.pages import GuestPages, PageUse, assign_pages, parse_pages

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4 * KIB


# --- as people write them ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("16M@64M=shared", GuestPages(64 * MIB, 16 * MIB, PageUse.SHARED)),
        ("4K@0=no-encrypt", GuestPages(0, PAGE, PageUse.NO_ENCRYPT)),
        ("8192@4096=other-key", GuestPages(PAGE, 2 * PAGE, PageUse.OTHER_KEY)),
        ("1G@4G=private", GuestPages(4 * GIB, GIB, PageUse.PRIVATE)),
        (" 1 @ 2 =shared ", GuestPages(2, 1, PageUse.SHARED)),
        ("1mib@2kb=shared", GuestPages(2 * KIB, MIB, PageUse.SHARED)),
    ],
)
def test_range_as_people_write_it(text: str, pages: GuestPages) -> None:
    assert parse_pages(text) == pages


HINT = (
    "write it as SIZE@ADDRESS=USE, such as 16M@64M=shared;"
    " uses: private, shared, no-encrypt, other-key"
)


NO_RANGES: dict[str, tuple[str, str]] = {
    "nothing": ("", ""),
    "no address": ("16M=shared", ""),
    "no use": ("16M@64M", ""),
    "empty use": ("16M@64M=", ""),
    "empty size": ("@64M=shared", ""),
    "empty address": ("16M@=shared", ""),
    "use first": ("shared=16M@64M", ""),
    "other order": ("64M=shared@16M", ""),
    "two addresses": ("16M@64M@96M=shared", ""),
    "two uses": ("16M@64M=shared=private", ""),
    "two ranges": ("16M@64M=shared,16M@96M=shared", ""),
    "two lines": ("16M@64M=shared\n16M@96M=shared", ""),
    "unknown use": ("16M@64M=public", ""),
    "use by its name in Python": ("16M@64M=NO_ENCRYPT", ""),
    "use in capitals": ("16M@64M=SHARED", ""),
    "no size": ("16X@64M=shared", ": '16X' is not a size"),
    "negative size": ("-16M@64M=shared", ": '-16M' is not a size"),
    "fraction": ("0.5M@64M=shared", ": '0.5M' is not a size"),
    "address is no number": ("16M@top=shared", ": 'top' is not a size"),
    "hexadecimal": ("16M@0x4000000=shared", ": '0x4000000' is not a size"),
    "digits of another script": ("\u0661\u0666M@64M=shared", ": '\u0661\u0666M' is not a size"),
}


@pytest.mark.parametrize(("text", "also"), NO_RANGES.values(), ids=NO_RANGES)
def test_what_is_no_range_is_refused(text: str, also: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pages(text)
    assert str(caught.value) == f"{text!r} is no range of pages{also}"
    assert caught.value.hint == HINT


@given(st.text(alphabet="0123456789KMG@=shared-noencrypt .x\n"))
def test_text_is_a_range_or_refused(text: str) -> None:
    try:
        pages = parse_pages(text)
    except UsageError:
        return
    assert parse_pages(str(pages)) == pages


SIZES = st.integers(0, 1 << 40)


@given(SIZES, SIZES, st.sampled_from(PageUse))
def test_range_is_told_as_it_is_written(base: int, size: int, use: PageUse) -> None:
    pages = GuestPages(base, size, use)
    assert parse_pages(str(pages)) == pages


@pytest.mark.parametrize("text", ["16M@64M=shared", "4K@0=private", "1025M@5G=other-key"])
def test_units_are_the_largest_that_fit(text: str) -> None:
    assert str(parse_pages(text)) == text


def test_uses_that_take_a_keyid() -> None:
    assert {use for use in PageUse if use.has_own_keyid} == {PageUse.NO_ENCRYPT, PageUse.OTHER_KEY}


# --- where they are in RAM --------------------------------------------------------------------

# q35 moves what does not fit below its PCI hole to 4 GiB (QEMU hw/i386/pc_q35.c).
WHOLE = 2815 * MIB  # the largest in one piece, 1 MiB short of the limit
SPLIT = 2816 * MIB  # the smallest that is split


def shared(base: int, size: int) -> GuestPages:
    return GuestPages(base, size, PageUse.SHARED)


IN_RAM: dict[str, tuple[int, int, int, int]] = {
    "first page": (192 * MIB, 0, PAGE, 0),
    "last page": (192 * MIB, 192 * MIB - PAGE, PAGE, 192 * MIB - PAGE),
    "all": (192 * MIB, 0, 192 * MIB, 0),
    "all in one piece": (WHOLE, 0, WHOLE, 0),
    "up to the hole": (SPLIT, 0, 2 * GIB, 0),
    "page below the hole": (SPLIT, 2 * GIB - PAGE, PAGE, 2 * GIB - PAGE),
    "page above the hole": (SPLIT, 4 * GIB, PAGE, 2 * GIB),
    "all above the hole": (SPLIT, 4 * GIB, 768 * MIB, 2 * GIB),
    "last page above the hole": (6 * GIB, 8 * GIB - PAGE, PAGE, 6 * GIB - PAGE),
}


@pytest.mark.parametrize(("memory", "base", "size", "offset"), IN_RAM.values(), ids=IN_RAM)
def test_offset_in_ram(memory: int, base: int, size: int, offset: int) -> None:
    assert shared(base, size).ram_offset(memory) == offset


ONE_PIECE = "RAM is 0 to 192M"
TWO_PIECES = "RAM is 0 to 2G and 4G to 5G"


NOT_RAM: dict[str, tuple[int, int, int, str]] = {
    "past the end": (192 * MIB, 192 * MIB, PAGE, ONE_PIECE),
    "over the end": (192 * MIB, 192 * MIB - PAGE, 2 * PAGE, ONE_PIECE),
    "above what is not split": (192 * MIB, 4 * GIB, PAGE, ONE_PIECE),
    "before the beginning": (192 * MIB, -PAGE, 2 * PAGE, ONE_PIECE),
    "into the hole": (3 * GIB, 2 * GIB - PAGE, 2 * PAGE, TWO_PIECES),
    "in the hole": (3 * GIB, 3 * GIB, PAGE, TWO_PIECES),
    "out of the hole": (3 * GIB, 4 * GIB - PAGE, 2 * PAGE, TWO_PIECES),
    "across the hole": (3 * GIB, 2 * GIB - PAGE, 2 * GIB + 2 * PAGE, TWO_PIECES),
    "over the end above": (3 * GIB, 5 * GIB - PAGE, 2 * PAGE, TWO_PIECES),
    "past the end above": (3 * GIB, 5 * GIB, PAGE, TWO_PIECES),
    "odd end": (SPLIT + MIB, 5 * GIB, PAGE, "RAM is 0 to 2G and 4G to 4865M"),
}


@pytest.mark.parametrize(("memory", "base", "size", "hint"), NOT_RAM.values(), ids=NOT_RAM)
def test_what_is_not_all_ram_is_refused(memory: int, base: int, size: int, hint: str) -> None:
    pages = shared(base, size)
    with pytest.raises(UsageError) as caught:
        pages.ram_offset(memory)
    assert str(caught.value) == f"{pages}: not all RAM"
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("base", "size"), [(1, PAGE), (PAGE, 1), (PAGE, 0), (0, PAGE + 64), (KIB, PAGE), (0, -PAGE)]
)
def test_what_is_not_whole_pages_is_refused(base: int, size: int) -> None:
    pages = shared(base, size)
    with pytest.raises(UsageError) as caught:
        pages.ram_offset(192 * MIB)
    assert str(caught.value) == f"{pages}: KeyIDs are for whole pages of 4096 bytes"
    assert caught.value.hint == "give multiples of 4K"


def guest_physical(offset: int, memory: int) -> int:
    """Where the guest sees a byte of its RAM: the other way round."""
    if memory < SPLIT or offset < 2 * GIB:
        return offset
    return offset - 2 * GIB + 4 * GIB


MEMORY = st.integers(192, 6 << 10).map(lambda size: size * MIB)


@given(MEMORY, st.data())
def test_range_of_ram_is_found_unless_the_hole_divides_it(memory: int, data: st.DataObject) -> None:
    pages = memory // PAGE
    first = data.draw(st.integers(0, pages - 1)) * PAGE
    last = data.draw(st.integers(first // PAGE, pages - 1)) * PAGE
    base, size = guest_physical(first, memory), last + PAGE - first
    in_one_piece = guest_physical(last, memory) - base == last - first
    if in_one_piece:
        assert shared(base, size).ram_offset(memory) == first
    else:
        with pytest.raises(UsageError, match="not all RAM"):
            shared(base, guest_physical(last, memory) + PAGE - base).ram_offset(memory)


@given(MEMORY, st.integers(-4, 12 << 18), st.integers(1, 1 << 18))
def test_offset_is_that_of_each_page(memory: int, page: int, count: int) -> None:
    base = page * PAGE
    try:
        offset = shared(base, count * PAGE).ram_offset(memory)
    except UsageError:
        assume(False)
    assert 0 <= offset <= memory - count * PAGE
    for one in {0, 1, count // 2, count - 1}:
        assert guest_physical(offset + one * PAGE, memory) == base + one * PAGE


# --- what they come to be under ---------------------------------------------------------------


def announced(engine: EngineProcess, memory_bytes: int) -> uuid.UUID:
    vm = uuid.uuid4()
    engine.client.add_vm(
        vm,
        name="alice",
        memory_bytes=memory_bytes,
        track=Track.PAGES,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.RANDOM,
    )
    return vm


def assign(engine: EngineProcess, vm: uuid.UUID, text: str) -> int | None:
    pages = parse_pages(text)
    offset = pages.ram_offset(64 * MIB)
    return assign_pages(engine.client, vm, pages, offset, Algorithm.AES_XTS_256)


def status(engine: EngineProcess, vm: uuid.UUID) -> VmStatus:
    (found,) = (one for one in engine.client.status().vms if one.vm == vm)
    return found


@pytest.mark.parametrize(
    ("use", "mode", "algorithm"),
    [
        (PageUse.SHARED, KeyMode.PLATFORM, Algorithm.AES_XTS_128),
        (PageUse.NO_ENCRYPT, KeyMode.NO_ENCRYPT, None),
        (PageUse.OTHER_KEY, KeyMode.RANDOM, Algorithm.AES_XTS_256),
    ],
)
def test_pages_are_given_to_what_they_are_for(
    engine: EngineProcess, use: PageUse, mode: KeyMode, algorithm: Algorithm | None
) -> None:
    vm = announced(engine, 64 * MIB)
    keyid = assign(engine, vm, f"16M@32M={use.value}")
    assert keyid is not None
    found = status(engine, vm)
    assert [(one.base - found.base, one.size_bytes, one.keyid) for one in found.pages] == [
        (0, 32 * MIB, found.keyid),
        (32 * MIB, 16 * MIB, keyid),
        (48 * MIB, 16 * MIB, found.keyid),
    ]
    assert found.further_keyids == ((keyid,) if use.has_own_keyid else ())
    (key,) = (one for one in engine.client.status().keys if one.keyid == keyid)
    assert (key.mode, key.algorithm) == (mode, algorithm)
    assert assign(engine, vm, "16M@32M=private") is None
    assert [one.keyid for one in status(engine, vm).pages] == [found.keyid]
    engine.client.remove_vm(vm)


def test_two_ranges_have_two_keys(engine: EngineProcess) -> None:
    vm = announced(engine, 64 * MIB)
    keyids = {assign(engine, vm, f"4K@{page * 4}K=other-key") for page in range(2)}
    assert len(keyids) == 2
    assert set(status(engine, vm).further_keyids) == keyids
    engine.client.remove_vm(vm)


REFUSALS: dict[str, tuple[str, Callable[[uuid.UUID], uuid.UUID], type[Exception]]] = {
    "not RAM": ("16M@64M=no-encrypt", lambda vm: vm, UsageError),
    "no such VM": ("16M@0=no-encrypt", lambda _vm: uuid.uuid4(), EngineRefusedError),
}


@pytest.mark.parametrize(("text", "whose", "error"), REFUSALS.values(), ids=REFUSALS)
def test_no_keyid_is_taken_for_what_is_refused(
    engine: EngineProcess,
    text: str,
    whose: Callable[[uuid.UUID], uuid.UUID],
    error: type[Exception],
) -> None:
    vm = announced(engine, 64 * MIB)
    free = engine.client.status().keyids_free
    with pytest.raises(error):
        assign(engine, whose(vm), text)
    assert engine.client.status().keyids_free == free
    engine.client.remove_vm(vm)
