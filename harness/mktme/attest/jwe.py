# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening a JWE (RFC 7516) of one recipient into memory for secrets.

ECDH-ES or ECDH-ES+A256KW over P-256, with A256GCM (RFC 7518, sections 4.6 and 5.3); compact, or in
the flattened JSON form that Trustee's key broker answers with. Nothing else is read: what a sender
may choose is what this table of two has.

The plaintext goes where `mktme.engine.secret` keeps secrets, and nowhere else. Two secrets on the
way come from pyca as objects that cannot be written to: the agreed secret, and a wrapped content
key. They are overwritten all the same (`mktme.engine.secret.scrub`).
"""

from __future__ import annotations

import base64
import binascii
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Self, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from mktme.attest.errors import JweError
from mktme.engine.secret import SecretBuffer, allocate, scrub

MAX_BYTES: Final = 16 << 10

_ALGORITHMS: Final = ("ECDH-ES", "ECDH-ES+A256KW")
_ENCRYPTION: Final = "A256GCM"
_KEY_BYTES: Final = 32
_WRAPPED_BYTES: Final = _KEY_BYTES + 8  # RFC 3394
_COORDINATE_BYTES: Final = 32
_IV_BYTES: Final = 12
_TAG_BYTES: Final = 16
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*")
_T = TypeVar("_T")


class _EphemeralKey(msgspec.Struct, frozen=True):
    kty: str
    crv: str
    x: str
    y: str


class _Header(msgspec.Struct, frozen=True):
    """The protected header. What is not named here does not change how it is opened."""

    alg: str
    enc: str
    epk: _EphemeralKey
    apu: str = ""
    apv: str = ""
    crit: object = None
    zip: object = None


class _Flattened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    protected: str
    iv: str
    ciphertext: str
    tag: str
    encrypted_key: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class _Jwe:
    header: _Header
    agreed_with: ec.EllipticCurvePublicKey
    aad: bytes
    encrypted_key: bytes
    iv: bytes
    ciphertext: bytes  # with its tag

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) > MAX_BYTES:
            raise JweError(f"a JWE has at most {MAX_BYTES} bytes here")
        if data.lstrip().startswith(b"{"):
            parts = _decode(data, _Flattened)
            texts = [parts.protected, parts.encrypted_key, parts.iv, parts.ciphertext, parts.tag]
        else:
            match data.decode("ascii", "replace").split("."):
                case [_, _, _, _, _] as texts:
                    pass
                case _:
                    raise JweError("it is no JWE")
        header = _decode(_base64url(texts[0]), _Header)
        key, iv, ciphertext, tag = map(_base64url, texts[1:])
        if header.crit is not None or header.zip is not None:
            raise JweError("it is critical or compressed in a way that is not known here")
        if header.alg not in _ALGORITHMS or header.enc != _ENCRYPTION:
            raise JweError(f"it is not {' or '.join(_ALGORITHMS)} with {_ENCRYPTION}")
        wanted = _WRAPPED_BYTES if header.alg == "ECDH-ES+A256KW" else 0
        if len(key) != wanted or len(iv) != _IV_BYTES or len(tag) != _TAG_BYTES:
            raise JweError("a part of it has not its length")
        aad = texts[0].encode("ascii")
        return cls(header, _point(header.epk), aad, key, iv, ciphertext + tag)


def open_jwe(data: bytes, key: ec.EllipticCurvePrivateKey, size_bytes: int) -> SecretBuffer:
    """Open a JWE whose plaintext has a known size.

    Args:
        data: as it came; it may be anything.
        key: the recipient's, on P-256.
        size_bytes: how long the plaintext must be, at least 1.

    Returns:
        The plaintext; the caller wipes it.

    Raises:
        JweError: it is no such JWE, not for this key, or of another size.
    """
    jwe = _Jwe.parse(data)
    if len(jwe.ciphertext) != size_bytes + _TAG_BYTES:
        raise JweError(f"what it holds has not {size_bytes} bytes")
    with ExitStack() as undo, allocate(_KEY_BYTES) as content_key:
        agreed = key.exchange(ec.ECDH(), jwe.agreed_with)
        try:
            _agree(jwe, agreed, content_key.view)
        finally:
            scrub(agreed)
        plaintext = allocate(size_bytes)
        undo.callback(plaintext.wipe)
        try:
            AESGCM(content_key.view).decrypt_into(jwe.iv, jwe.ciphertext, jwe.aad, plaintext.view)
        except InvalidTag as error:
            raise JweError("it is not for this key, or was changed") from error
        undo.pop_all()
    return plaintext


def concat_kdf(
    agreed: bytes, algorithm: str, party_u: bytes, party_v: bytes, out: memoryview
) -> None:
    """Derive a key as ECDH-ES does (NIST SP 800-56A, 5.8.1; RFC 7518, section 4.6.2).

    Args:
        agreed: the ECDH shared secret.
        algorithm: what the key is for: "enc" where it is the content key, else "alg".
        party_u: PartyUInfo.
        party_v: PartyVInfo.
        out: gets the key.
    """
    fields = (algorithm.encode(), party_u, party_v)
    info = b"".join(len(one).to_bytes(4, "big") + one for one in fields)
    info += (len(out) * 8).to_bytes(4, "big")
    ConcatKDFHash(hashes.SHA256(), len(out), info).derive_into(agreed, out)


def _agree(jwe: _Jwe, agreed: bytes, out: memoryview) -> None:
    """Bring the content key into `out`."""
    header = jwe.header
    algorithm = header.enc if header.alg == "ECDH-ES" else header.alg
    concat_kdf(agreed, algorithm, _base64url(header.apu), _base64url(header.apv), out)
    if not jwe.encrypted_key:
        return
    try:
        unwrapped = aes_key_unwrap(out, jwe.encrypted_key)
    except InvalidUnwrap as error:
        raise JweError("it is not for this key, or was changed") from error
    try:
        out[:] = unwrapped
    finally:
        scrub(unwrapped)


def _point(key: _EphemeralKey) -> ec.EllipticCurvePublicKey:
    """The sender's ephemeral key, which is on the curve: else it would betray ours bit by bit."""
    x, y = _base64url(key.x), _base64url(key.y)
    if (key.kty, key.crv) != ("EC", "P-256") or {len(x), len(y)} != {_COORDINATE_BYTES}:
        raise JweError("its ephemeral key is not on P-256")
    point = ec.EllipticCurvePublicNumbers(
        int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1()
    )
    try:
        return point.public_key()
    except ValueError as error:
        raise JweError("its ephemeral key is not on P-256") from error


def _decode(data: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise JweError("it is no JWE") from error


def _base64url(text: str) -> bytes:
    """Decode base64url without padding (RFC 7515, appendix C), in its one form only."""
    if not _BASE64URL.fullmatch(text):
        raise JweError("it is no JWE")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise JweError("it is no JWE") from error
    if base64.urlsafe_b64encode(data).rstrip(b"=") != text.encode():
        raise JweError("it is no JWE")
    return data
