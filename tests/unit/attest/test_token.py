# SPDX-License-Identifier: GPL-2.0-or-later
"""Tokens: read by other code, and refused in every other form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pycddl
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from mktme.attest.claims import encode_claims
from mktme.attest.errors import TokenError
from mktme.attest.token import Token, open_token

from .signing import Platform

CDDL = (Path(__file__).parents[3] / "docs/attestation/evidence.cddl").read_text()


def test_a_token_is_what_the_standards_say(platform: Platform) -> None:
    """RFC 9052, section 4.4, checked by hand with cbor2 and pyca alone."""
    token = platform.sign()
    message = cbor2.loads(token)
    assert isinstance(message, cbor2.CBORTag)
    assert message.tag == 18
    protected, unprotected, payload, signature = message.value
    leaf = platform.identity.chain[0]
    assert cbor2.loads(protected) == {
        1: -7,
        16: "application/eat+cwt",
        33: leaf.public_bytes(Encoding.DER),
    }
    assert unprotected == {}
    pycddl.Schema("start = header\n" + CDDL).validate_cbor(protected)
    signed = cbor2.dumps(["Signature1", protected, b"", payload])
    r, s = (int.from_bytes(signature[at : at + 32], "big") for at in (0, 32))
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
    assert open_token(token, key) == platform.evidence()


def test_another_key_did_not_sign(platform: Platform) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(TokenError, match="signature"):
        Token.parse(platform.sign()).verify(other)


def rebuilt(token: bytes, change: Callable[[dict[Any, Any], list[Any]], None]) -> bytes:
    """The token with another header or other parts; its signature is what it was."""
    parts = list(cbor2.loads(token).value)
    header = cbor2.loads(parts[0])
    change(header, parts)
    if isinstance(parts[0], bytes) and parts[0] != b"?":
        parts[0] = cbor2.dumps(header)
    return cbor2.dumps(cbor2.CBORTag(18, parts))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda header, _: header.update({1: -8}), "ES256"),
        (lambda header, _: header.update({1: -35}), "ES256"),
        (lambda header, _: header.pop(1), "ES256"),
        (lambda header, _: header.update({16: "application/cwt"}), "type"),
        (lambda header, _: header.pop(33), "certificates"),
        (lambda header, _: header.update({33: []}), "certificates"),
        (lambda header, _: header.update({33: [header[33]]}), "array of one"),
        (lambda header, _: header.update({33: [header[33]] * 3}), "certificates"),
        (lambda header, _: header.update({33: b"not a certificate"}), "none"),
        (lambda header, _: header.update({33: [b"x", 1]}), "none"),
        (lambda _, parts: parts.__setitem__(1, {4: b"kid"}), "not signed"),
        (lambda _, parts: parts.__setitem__(2, None), "payload"),
        (lambda _, parts: parts.append(b""), "COSE_Sign1"),
        (lambda _, parts: parts.__setitem__(0, b"?"), "float|middle|map|behind"),
    ],
)
def test_another_form_is_refused(
    platform: Platform, change: Callable[[dict[Any, Any], list[Any]], None], why: str
) -> None:
    with pytest.raises(TokenError, match=why):
        Token.parse(rebuilt(platform.sign(), change))


def test_what_is_critical_and_not_known_is_refused(platform: Platform) -> None:
    """RFC 9052, section 3.1: whoever does not process a critical header must fail."""
    parts = cbor2.loads(platform.sign()).value
    header = cbor2.loads(parts[0])
    ordered = {1: header[1], 2: [-70100], 16: header[16], 33: header[33], -70100: 0}
    token = cbor2.dumps(cbor2.CBORTag(18, [cbor2.dumps(ordered), *parts[1:]]))
    with pytest.raises(TokenError, match="critical"):
        Token.parse(token)


def test_a_signature_is_64_bytes(platform: Platform) -> None:
    token = platform.sign()
    assert Token.parse(token)
    for length in (0, 63, 65):
        forged = rebuilt(token, lambda _, parts, n=length: parts.__setitem__(3, bytes(n)))  # type: ignore[misc]
        with pytest.raises(TokenError, match="signature"):
            Token.parse(forged).verify(Token.parse(forged).key())


def test_claims_are_what_is_signed(platform: Platform) -> None:
    payload = Token.parse(platform.sign()).verify(Token.parse(platform.sign()).key())
    assert payload == encode_claims(platform.evidence())
