# SPDX-License-Identifier: GPL-2.0-or-later
"""CBOR as evidence has it: deterministically encoded, and nothing else (RFC 8949, section 4.2.1).

One value has one encoding: definite lengths, every number in its shortest form, keys of a map in
the order of their encodings. So no two keys are the same and nothing is read in two ways. There are
integers, byte and text strings, arrays, maps, false, true and null; no floats, and no tags but
one around the whole where its reader expects it.

A first pass over the bytes sees to all that, with a stack of its own and without making anything;
cbor2 then decodes what is known to be well-formed and shallow.
"""

from __future__ import annotations

from typing import Any, Final

import cbor2

from mktme.attest.errors import TokenError

MAX_BYTES: Final = 256 << 10
"""The most that is looked at. Evidence of 63 VMs, of a few components each, has half of it."""
MAX_DEPTH: Final = 16

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_CONSTANTS: Final = (20, 21, 22)  # false, true, null


def encode(value: object) -> bytes:
    """Encode integers, strings, sequences, dicts, booleans and None; the order of keys is ours."""
    return cbor2.dumps(_sorted(value))


def decode(data: bytes, *, tag: int | None = None, most_items: int = MAX_BYTES) -> Any:
    """Decode one value.

    Args:
        data: all of it.
        tag: the tag that is around it, if one must be.
        most_items: how many values it may have in it. Looking at each takes time, so whoever does
            not know yet who sent them takes few.

    Raises:
        TokenError: it is not deterministically encoded CBOR, or too long or too deep.
    """
    if len(data) > MAX_BYTES:
        raise TokenError(f"longer than {MAX_BYTES} bytes")
    _check(data, tag, most_items)
    try:
        value = cbor2.loads(data)
    except (ValueError, cbor2.CBORDecodeError) as error:  # text that is not UTF-8
        raise TokenError("text that is not UTF-8") from error
    return value if tag is None else value.value


def _sorted(value: object) -> object:
    if isinstance(value, dict):
        items = [(cbor2.dumps(key), key, _sorted(one)) for key, one in value.items()]
        return {key: one for _encoded, key, one in sorted(items, key=lambda item: item[0])}
    if isinstance(value, list | tuple):
        return [_sorted(one) for one in value]
    return value


class _Container:
    """An array or a map that is being read.

    Attributes:
        left: how many items are to come, of a map keys and values.
        is_map: what it is.
        key: the encoding of a map's last key.
    """

    __slots__ = ("is_map", "key", "left")

    def __init__(self, left: int, is_map: bool) -> None:
        self.left = left
        self.is_map = is_map
        self.key = b""


def _check(data: bytes, tag: int | None, most_items: int) -> None:
    """Raise TokenError unless `data` is one value of this module's kind."""
    position = 0
    if tag is not None:
        kind, number, position = _head(data, 0)
        if (kind, number) != (_TAG, tag):
            raise TokenError(f"it is not in CBOR tag {tag}")
    stack = [_Container(1, is_map=False)]
    while stack:
        top = stack[-1]
        if top.left == 0:
            stack.pop()
            continue
        is_key = top.is_map and top.left % 2 == 0
        top.left -= 1
        most_items -= 1
        if most_items < 0:
            raise TokenError("it has more values than there is use for")
        start = position
        kind, number, position = _head(data, position)
        match kind:
            case 2 | 3:  # byte and text strings
                position += number
                if position > len(data):
                    raise TokenError("it ends in the middle")
            case 4 | 5 if not is_key:  # arrays and maps
                items = number * (kind - 3)
                if items > len(data) - position:  # an item has a byte at least
                    raise TokenError("it ends in the middle")
                if len(stack) > MAX_DEPTH:
                    raise TokenError(f"nested deeper than {MAX_DEPTH}")
                stack.append(_Container(items, kind == _MAP))
            case 4 | 5:
                raise TokenError("a key that is an array or a map")
            case 6:
                raise TokenError("a tag where none belongs")
            case 7 if number not in _CONSTANTS:
                raise TokenError("a float, or a simple value of no meaning")
        if is_key:
            key = data[start:position]
            if key <= top.key:
                raise TokenError("a map's keys are not in order, or one is there twice")
            top.key = key
    if position != len(data):
        raise TokenError("there is more behind its end")


def _head(data: bytes, position: int) -> tuple[int, int, int]:
    """The major type and the number at a position, and where what follows begins."""
    if position >= len(data):
        raise TokenError("it ends in the middle")
    kind, low = data[position] >> 5, data[position] & 0x1F
    position += 1
    if low < 24:
        return kind, low, position
    if low > 27 or kind == _SIMPLE:
        raise TokenError("an indefinite length, a float, or what CBOR does not have")
    size = 1 << (low - 24)
    number = int.from_bytes(data[position : position + size], "big")
    position += size
    if position > len(data):
        raise TokenError("it ends in the middle")
    # The shortest form: what does not fit half the size, or the head itself.
    if number < (24 if size == 1 else 1 << (4 * size)):
        raise TokenError("a number that is not in its shortest form")
    return kind, number, position
