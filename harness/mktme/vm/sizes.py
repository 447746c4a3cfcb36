# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes as users write them."""

from __future__ import annotations

from mktme.engine.xts import PAGE_BYTES
from mktme.service import platform_file
from mktme.vm.host import UsageError


def parse_size(text: str) -> int:
    """Bytes, from sizes as people write them: 512M, 4G, 786432K, or plain bytes.

    Raises:
        UsageError: it is no such size.
    """
    try:
        return platform_file.parse_size(text)
    except ValueError as error:
        raise UsageError(str(error), hint="write it as 512M or 4G") from error


def parse_window(text: str, memory_bytes: int) -> int:
    """Bytes of a window onto a guest's memory: a size, or a share of it such as 25%.

    Raises:
        UsageError: it is neither.
    """
    if not text.endswith("%"):
        try:
            return platform_file.parse_size(text)
        except ValueError as error:
            raise UsageError(str(error), hint="write it as 128M or 25%") from error
    share = text[:-1]
    if not share.isascii() or not share.isdigit() or not 0 < int(share[:4]) <= 100:
        raise UsageError(f"{text!r} is no share of the guest's memory", hint="1% to 100%")
    return memory_bytes * int(share) // 100 // PAGE_BYTES * PAGE_BYTES
