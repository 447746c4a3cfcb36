# SPDX-License-Identifier: GPL-2.0-or-later
"""Claims on the wire: what comes back, what an independent validator says, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pycddl
import pytest

from mktme.attest import cbor
from mktme.attest.claims import (
    Component,
    DebugStatus,
    ExceptionKind,
    KeySource,
    Launch,
    PageException,
    RecipientKey,
    decode_claims,
    encode_claims,
)
from mktme.attest.errors import TokenError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm

from .signing import VM, Platform

CDDL = (Path(__file__).parents[3] / "docs/attestation/evidence.cddl").read_text()

VARIANTS: list[dict[str, Any]] = [
    {},
    {"mode": KeyMode.DIRECT, "source": KeySource.BROKER, "running": True},
    {"algorithm": None, "mode": KeyMode.NO_ENCRYPT, "source": KeySource.NONE, "integrity": False},
    {"algorithm": Algorithm.AES_XTS_256, "datapath": "shadow", "trackers": ("pages", "stores")},
    {"vtpm": b"\x05" * 32, "fault": "its memory went", "debug": DebugStatus.ENABLED},
    {
        "exceptions": tuple(
            PageException(kind=kind, ram_offset=number << 20, size_bytes=4096, keyid=number)
            for number, kind in enumerate(ExceptionKind)
        )
    },
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_what_is_encoded_is_decoded_and_is_as_the_cddl_says(
    platform: Platform, changes: dict[str, Any]
) -> None:
    evidence = platform.evidence(platform.vm(**changes))
    data = encode_claims(evidence)
    assert decode_claims(data) == evidence
    pycddl.Schema(CDDL).validate_cbor(data)


def test_the_cddl_says_no_as_well(platform: Platform) -> None:
    for edit in (EDITS[0], EDITS[1], EDITS[8], EDITS[16], EDITS[26], EDITS[33]):
        with pytest.raises(pycddl.ValidationError):
            pycddl.Schema(CDDL).validate_cbor(edited(platform, edit))


def edited(platform: Platform, edit: Callable[[dict[Any, Any]], None]) -> bytes:
    claims = cbor.decode(encode_claims(platform.evidence()))
    edit(claims)
    return cbor.encode(claims)


def submodule(claims: dict[Any, Any]) -> dict[Any, Any]:
    vm: dict[Any, Any] = claims[266][str(VM)]
    return vm


EDITS: list[Callable[[dict[Any, Any]], None]] = [
    lambda claims: claims.pop(10),
    lambda claims: claims.update({10: b"short"}),
    lambda claims: claims.update({10: bytes(65)}),
    lambda claims: claims.update({10: "text of a length"}),
    lambda claims: claims.update({6: -1}),
    lambda claims: claims.update({6: True}),
    lambda claims: claims.update({6: 1 << 40}),
    lambda claims: claims.update({256: bytes(32)}),
    lambda claims: claims.update({263: 2}),
    lambda claims: claims.update({265: "urn:uuid:another"}),
    lambda claims: claims.update({266: []}),
    lambda claims: claims.update({266: {"not-a-uuid": {}}}),
    lambda claims: claims.update({266: {str(VM).upper(): submodule(claims)}}),
    lambda claims: claims.update({266: {"{" + str(VM) + "}": submodule(claims)}}),
    lambda claims: claims.update({271: "0.1.0"}),
    lambda claims: claims.update({271: ["0.1.0\nforged"]}),
    lambda claims: claims.update({-70000: bytes(31)}),
    lambda claims: claims.update({-70001: {}}),
    lambda claims: claims.update({-70002: 0}),
    lambda claims: submodule(claims).update({8: {1: {1: 2, -1: 1, -2: bytes(32), -3: bytes(32)}}}),
    lambda claims: submodule(claims)[8][1].update({-4: bytes(32)}),
    lambda claims: submodule(claims)[8][1].update({-1: 2}),
    lambda claims: submodule(claims).update({-70012: {}}),
    lambda claims: submodule(claims)[-70012].update({"Upper": bytes(32)}),
    lambda claims: submodule(claims)[-70012].update({"kernel": bytes(20)}),
    lambda claims: submodule(claims).update({-70013: 1 << 15}),
    lambda claims: submodule(claims).update({-70014: "aes-cbc"}),
    lambda claims: submodule(claims).update({-70017: "somehow"}),
    lambda claims: submodule(claims).update({-70018: ["rumour"]}),
    lambda claims: submodule(claims).update({-70019: 1}),
    lambda claims: submodule(claims).update({-70020: [["shared", 0, 4096]]}),
    lambda claims: submodule(claims).update({-70020: [["shared", 0, 0, 0]]}),
    lambda claims: submodule(claims).update({-70020: [["shared", 0, 4096, 0]] * 1025}),
    lambda claims: submodule(claims).update({-70021: bytes(63)}),
    lambda claims: submodule(claims).update({-70023: ""}),
]


@pytest.mark.parametrize("edit", EDITS)
def test_other_claims_are_refused(
    platform: Platform, edit: Callable[[dict[Any, Any]], None]
) -> None:
    with pytest.raises(TokenError) as refused:
        decode_claims(edited(platform, edit))
    assert str(refused.value).isprintable()


def test_pages_of_an_exception_are_whole(platform: Platform) -> None:
    def edit(claims: dict[Any, Any]) -> None:
        submodule(claims)[-70020] = [["shared", 4095, 4096, 0]]

    with pytest.raises(TokenError, match="ram_offset"):
        decode_claims(edited(platform, edit))


def test_a_launch_has_one_digest_over_all(platform: Platform) -> None:
    launch = platform.vm().launch
    other = Launch((*launch.components[:-1], Component("kernel", b"\x24" * 32)))
    assert launch.digest == Launch(launch.components).digest != other.digest
    with pytest.raises(ValueError, match="order"):
        Launch(tuple(reversed(launch.components)))


def test_a_recipient_key_is_on_the_curve(platform: Platform) -> None:
    key = platform.vm().recipient_key
    assert RecipientKey.of(key.public_key()) == key
    with pytest.raises(ValueError, match="curve"):
        dataclasses.replace(key, x=bytes(32))
