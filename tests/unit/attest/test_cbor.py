# SPDX-License-Identifier: GPL-2.0-or-later
"""CBOR: one encoding a value, and everything else refused."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.attest import cbor
from mktme.attest.errors import TokenError

scalars = (
    st.integers(-(1 << 64), (1 << 64) - 1)
    | st.binary(max_size=300)
    | st.text(max_size=40)
    | st.booleans()
    | st.none()
)
keys = st.integers(-70100, 70100) | st.text(max_size=10)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=5)
)


@given(values)
def test_what_is_encoded_is_decoded(value: object) -> None:
    data = cbor.encode(value)
    assert cbor.decode(data) == value
    assert cbor2.loads(data) == value


@given(values, st.data())
def test_no_other_bytes_are_the_same_value(value: object, data: st.DataObject) -> None:
    encoded = cbor.encode(value)
    position = data.draw(st.integers(0, len(encoded) - 1))
    changed = bytearray(encoded)
    changed[position] = data.draw(st.integers(0, 255))
    try:
        decoded = cbor.decode(bytes(changed))
    except TokenError:
        return
    assert cbor.encode(decoded) == changed


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "middle"),
        ("18", "middle"),
        ("41", "middle"),
        ("8201", "middle"),
        ("a101", "middle"),
        ("9b7fffffffffffffff", "middle"),
        ("5b7fffffffffffffff", "middle"),
        ("0000", "more behind"),
        ("1817", "shortest"),
        ("190017", "shortest"),
        ("1a0000ffff", "shortest"),
        ("1b00000000ffffffff", "shortest"),
        ("580100", "shortest"),
        ("a201020103", "twice"),
        ("a202000100", "order"),
        ("a2200019010000", "order"),
        ("9f01ff", "indefinite"),
        ("bf0102ff", "indefinite"),
        ("5f4101ff", "indefinite"),
        ("1c", "indefinite"),
        ("f97e00", "float"),
        ("fb3ff0000000000000", "float"),
        ("f7", "float"),
        ("f820", "float"),
        ("c100", "tag"),
        ("d2820000", "tag"),
        ("a1800000", "array"),
        ("61ff", "UTF-8"),
        ("81" * 20 + "00", "deeper"),
    ],
)
def test_what_is_not_deterministic_is_refused(data: str, why: str) -> None:
    with pytest.raises(TokenError, match=why):
        cbor.decode(bytes.fromhex(data))


def test_depth_costs_nothing() -> None:
    with pytest.raises(TokenError, match="deeper"):
        cbor.decode(b"\x81" * 200_000 + b"\x00")


def test_too_long_is_refused() -> None:
    with pytest.raises(TokenError, match="longer"):
        cbor.decode(bytes(cbor.MAX_BYTES + 1))


def test_a_tag_is_only_where_it_is_expected() -> None:
    tagged = cbor2.dumps(cbor2.CBORTag(18, [1, 2]))
    assert cbor.decode(tagged, tag=18) == [1, 2]
    with pytest.raises(TokenError, match="tag 17"):
        cbor.decode(tagged, tag=17)
    with pytest.raises(TokenError, match="tag 18"):
        cbor.decode(tagged[1:], tag=18)
