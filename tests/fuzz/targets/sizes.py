# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes and ranges of pages as users type them: `mktme.vm.sizes` and `mktme.vm.pages`."""

from __future__ import annotations

from typing import Final

from mktme.engine.xts import PAGE_BYTES
from mktme.vm.host import UsageError
from mktme.vm.pages import PageUse, parse_pages
from mktme.vm.sizes import parse_size

from ..target import Target

_MEMORIES: Final = (512 << 20, 2 << 30, 4 << 30, 64 << 30)


def check(data: bytes) -> str:
    """Only `UsageError` comes out; a range that has an offset is inside the guest's RAM.

    The first byte chooses how much RAM; the rest is an argument, as the interpreter decodes argv.
    """
    memory_bytes = _MEMORIES[data[0] % len(_MEMORIES) if data else 0]
    text = data[1:].decode(errors="surrogateescape")
    try:
        size = parse_size(text)
    except UsageError as error:
        assert error.hint is not None
    else:
        assert 0 <= size < 10**18 << 30
        assert text.strip().isascii()
        return "size"
    try:
        pages = parse_pages(text)
    except UsageError as error:
        assert error.hint is not None
        return "neither"
    try:
        offset = pages.ram_offset(memory_bytes)
    except UsageError as error:
        return str(error).removeprefix(str(pages))
    assert offset % PAGE_BYTES == pages.guest_physical % PAGE_BYTES == 0
    assert 0 <= offset < offset + pages.size_bytes <= memory_bytes
    return pages.use.value


_SEEDS: Final = (
    *("512M", "4G", "786432K", "4096", " 1 GiB", "0", "999999999999999999G", "1kb"),
    *(f"16M@64M={use.value}" for use in PageUse),
    *("4K@0=shared", "1G@4G=private", "4096@4294967296=no-encrypt", "2G@0=shared", "1@0=shared"),
)

TARGETS: Final = (
    Target(
        name="sizes",
        check=check,
        seeds=tuple(bytes([index % 4]) + seed.encode() for index, seed in enumerate(_SEEDS)),
        max_bytes=64,
        tokens=(
            *(use.value.encode() for use in PageUse),
            *(b"@", b"=", b"KiB", b"G", b"4096", b" ", "\N{ARABIC-INDIC DIGIT THREE}".encode()),
            *("\N{KELVIN SIGN}".encode(), "\N{EM SPACE}".encode()),
        ),
    ),
)
