# SPDX-License-Identifier: GPL-2.0-or-later
"""Printable strings, against regular expressions."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from mktme.dump.strings import FEW, MIN_ASCII, MIN_UTF16, Found, String, find_strings

PAGE = 4096
FIRST = 7  # the number of the first page


def as_pages(data: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    data += bytes(-len(data) % PAGE)
    pages = np.frombuffer(data, np.uint8).reshape(-1, PAGE)
    return pages, np.arange(FIRST, FIRST + len(pages))


def by_regex(data: bytes, *, wide: bool) -> list[tuple[int, int]]:
    """Address and length of each string."""
    found = []
    for page in range(0, len(data), PAGE):
        part = data[page : page + PAGE]
        if wide:
            units = np.frombuffer(part.ljust(PAGE, b"\0"), np.uint16)
            part = np.where(units < 256, units, 0).astype(np.uint8).tobytes()
        least = MIN_UTF16 if wide else MIN_ASCII
        found += [
            (FIRST * PAGE + page + match.start() * (2 if wide else 1), len(match[0]))
            for match in re.finditer(rb"[\x20-\x7e]{%d,}" % least, part)
        ]
    return found


def test_known_strings() -> None:
    page = bytearray(3 * PAGE)
    page[5:28] = b"sixteen or more letters"
    page[100:115] = b"fifteen letters"
    page[PAGE - 16 : PAGE] = b"to the very end!"
    page[PAGE : PAGE + 8] = b"and over"
    page[2 * PAGE + 10 : 2 * PAGE + 42] = "in UTF-16, wide!".encode("utf-16le")
    page[2 * PAGE + 101 : 2 * PAGE + 133] = "at an odd place!".encode("utf-16le")
    ascii_found, utf16_found = find_strings(*as_pages(bytes(page)))
    base = FIRST * PAGE
    assert ascii_found == Found(
        2,
        (
            String(base + 5, 23, "sixteen or more letters"),
            String(base + PAGE - 16, 16, "to the very end!"),
        ),
    )
    assert utf16_found == Found(1, (String(base + 2 * PAGE + 10, 16, "in UTF-16, wide!"),))


def test_what_is_just_not_printable() -> None:
    for value in range(256):
        data = bytes([value]) * 64
        ascii_found, _ = find_strings(*as_pages(data))
        assert ascii_found.count == (0x20 <= value <= 0x7E), value
        _, utf16_found = find_strings(*as_pages(data.replace(data[:1], data[:1] + b"\0")))
        assert utf16_found.count == (0x20 <= value <= 0x7E), value
        _, not_ascii = find_strings(*as_pages(bytes([0x41, value]) * 64))
        assert not_ascii.count == (value == 0)


def test_page_of_text_is_one_string() -> None:
    ascii_found, _ = find_strings(*as_pages(b"x" * (2 * PAGE)))
    base = FIRST * PAGE
    assert ascii_found.count == 2
    assert [(one.address, one.chars, len(one.text)) for one in ascii_found.longest] == [
        (base, PAGE, 200),
        (base + PAGE, PAGE, 200),
    ]


pieces = st.lists(
    st.one_of(
        st.text(alphabet=[chr(c) for c in range(0x20, 0x7F)], max_size=60).map(str.encode),
        st.text(alphabet="abc ~", max_size=40).map(lambda text: text.encode("utf-16le")),
        st.binary(max_size=12),
        st.integers(0, 400).map(bytes),
        st.just(b"\x1f\x7f\x80 ~"),
    ),
    max_size=120,
).map(b"".join)


@given(pieces)
def test_all_that_regular_expressions_find(data: bytes) -> None:
    for found, wide in zip(find_strings(*as_pages(data)), (False, True), strict=True):
        expected = by_regex(data, wide=wide)
        assert found.count == len(expected)
        longest = sorted(expected, key=lambda one: (-one[1], one[0]))[:FEW]
        assert [(one.address, one.chars) for one in found.longest] == longest
