# SPDX-License-Identifier: GPL-2.0-or-later
"""What an attester, or who stands between, sends: `mktme.attest`'s token, claims and JWE."""

from __future__ import annotations

import copy
import functools
import json
from random import Random
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from mktme.attest import cbor
from mktme.attest.claims import decode_claims, encode_claims
from mktme.attest.errors import JweError, TokenError
from mktme.attest.identity import Identity
from mktme.attest.jwe import open_jwe
from mktme.attest.result import Verdict
from mktme.attest.token import Token, sign_payload

from ...unit.attest.signing import NOW, Platform
from ...unit.attest.test_claims import VARIANTS
from ...unit.attest.test_jwe import ALGORITHMS, SECRET, flattened, seal
from ..mutate import mutate_tree
from ..target import Target, refusal

# Fixed, so that one input has one outcome in every child.
_KEY: Final = ec.derive_private_key(0x6D6B746D65, ec.SECP256R1())


@functools.cache
def _platform() -> Platform:
    return Platform(recipient=_KEY)


def check_token(data: bytes) -> str:
    """A verifier raises nothing and believes nothing that this platform did not sign."""
    try:
        Token.parse(data)
    except TokenError as error:
        outcome = refusal(str(error))
        assert str(error).isprintable(), error
    else:
        outcome = "token"
    appraisal = _platform().appraise(data)
    assert appraisal.evidence in (None, *_SIGNED)
    assert appraisal.verdict is Verdict.CONTRAINDICATED or appraisal.evidence is not None
    return outcome


def check_claims(data: bytes) -> str:
    """Only `TokenError` comes out; what is accepted has this one encoding, signed or not."""
    try:
        evidence = decode_claims(data)
    except TokenError as error:
        assert str(error).isprintable(), error
        return f"refused: {refusal(str(error))}"
    assert encode_claims(evidence) == data
    appraisal = _platform().appraise(sign_payload(data, _platform().identity))
    assert appraisal.checks
    return f"claims {appraisal.verdict.value}"


def check_jwe(data: bytes) -> str:
    """Only `JweError` comes out; what is opened is the secret, and nothing but that."""
    try:
        with open_jwe(data, _KEY, len(SECRET)) as secret:
            assert secret.view == SECRET
    except JweError as error:
        assert str(error).isprintable(), error
        return f"refused: {refusal(str(error))}"
    return "opened"


def _mutate_claims(data: bytes, rng: Random) -> bytes | None:
    try:
        tree = cbor.decode(data)
    except TokenError:
        return None
    return _encoded(mutate_tree(tree, rng, [cbor.decode(one) for one in _CLAIMS]))


def _mutate_token(data: bytes, rng: Random) -> bytes | None:
    """Another header, or other parts, in a message of the right form."""
    try:
        parts = cbor.decode(data, tag=18)
        parts[0] = cbor.decode(parts[0])
    except (TokenError, TypeError, IndexError):
        return None
    changed = mutate_tree(parts, rng, [copy.deepcopy(parts)])
    if isinstance(changed, list) and changed:
        changed[0] = _encoded(changed[0])
    body = _encoded(changed)
    return None if body is None else b"\xd2" + body


def _encoded(tree: object) -> bytes | None:
    try:
        return cbor.encode(tree)
    except (ValueError, TypeError, OverflowError):
        return None


def _mutate_jwe(data: bytes, rng: Random) -> bytes | None:
    try:
        text = data.decode()
        if not text.startswith("{"):
            parts = mutate_tree(text.split("."), rng, [_SEALED[0].split(".")])
            return ".".join(map(str, parts)).encode()
        tree = json.loads(text)
        return json.dumps(
            mutate_tree(tree, rng, [json.loads(one) for one in _FLATTENED]), default=str
        ).encode()
    except ValueError:
        return None


_CLAIMS: Final = tuple(
    encode_claims(_platform().evidence(_platform().vm(**changes))) for changes in VARIANTS
)
_SIGNED: Final = (_platform().evidence(),)
_OTHER: Final = Identity.create(now=NOW)
_SEALED: Final = tuple(seal(_KEY, algorithm) for algorithm in ALGORITHMS)
_FLATTENED: Final = tuple(map(flattened, _SEALED))

TARGETS: Final = (
    Target(
        name="token",
        check=check_token,
        seeds=(_platform().sign(), sign_payload(_CLAIMS[0], _OTHER)),
        max_bytes=4096,
        mutate=_mutate_token,
    ),
    Target(
        name="claims",
        check=check_claims,
        seeds=_CLAIMS,
        max_bytes=4096,
        mutate=_mutate_claims,
    ),
    Target(
        name="jwe",
        check=check_jwe,
        seeds=(*(one.encode() for one in _SEALED), *_FLATTENED),
        max_bytes=2048,
        mutate=_mutate_jwe,
        tokens=(b"ECDH-ES", b"A256KW", b"A256GCM", b'"crit"', b'"zip"', b"."),
    ),
)
