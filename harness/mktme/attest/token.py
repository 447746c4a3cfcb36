# SPDX-License-Identifier: GPL-2.0-or-later
"""Evidence as it travels: a CWT (RFC 8392), signed as COSE_Sign1 (RFC 9052) with ES256.

The protected header has the algorithm, the type (RFC 9596) and the certificates (x5chain, RFC 9360)
and the unprotected one nothing: all that counts is signed. Opening is in two steps. `Token.parse`
believes nothing and checks form alone; `Token.verify` checks the signature with a key that
somebody vouches for, and only then are there claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.utils import CryptographyDeprecationWarning
from cwt import COSE, VerifyError
from cwt.algs.ec2 import EC2Key
from cwt.cose_key_interface import COSEKeyInterface

from mktme.attest import cbor
from mktme.attest.claims import Evidence, decode_claims, encode_claims
from mktme.attest.errors import TokenError
from mktme.attest.identity import CHAIN_MAX, Identity

MEDIA_TYPE: Final = "application/eat+cwt"
"""RFC 9782."""

_SIGN1: Final = 18
_ALG, _CRIT, _TYP, _X5CHAIN = 1, 2, 16, 33
_ITEMS_MAX: Final = 64  # of a message, and of its header: CBOR's values
_ES256: Final = -7
_COORDINATE_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the right form, which nobody vouches for yet.

    Attributes:
        data: all of it.
        chain: its certificates, 1 to `CHAIN_MAX`.
    """

    data: bytes
    chain: tuple[x509.Certificate, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Take a token apart.

        Raises:
            TokenError: it is none.
        """
        message = cbor.decode(data, tag=_SIGN1, most_items=_ITEMS_MAX)
        match message:
            case [bytes(protected), dict(unprotected), bytes(), bytes()]:
                header = cbor.decode(protected, most_items=_ITEMS_MAX)
            case _:
                raise TokenError("it is no COSE_Sign1 message with a payload")
        if unprotected:
            raise TokenError("a header that is not signed")
        if not isinstance(header, dict):
            raise TokenError("its header is not a map")
        if _CRIT in header:
            raise TokenError("a critical header that this verifier does not know")
        if any(type(one) is not int or one not in (_ALG, _TYP, _X5CHAIN) for one in header):
            raise TokenError("a header that is not of this profile")
        if header.get(_ALG) != _ES256:
            raise TokenError("not signed with ES256")
        if header.get(_TYP) != MEDIA_TYPE:
            raise TokenError(f"not of type {MEDIA_TYPE}")
        return cls(data, _certificates(header.get(_X5CHAIN)))

    def key(self) -> ec.EllipticCurvePublicKey:
        """The key of its first certificate, whoever made that.

        Raises:
            TokenError: it is not one of P-256.
        """
        try:
            key = self.chain[0].public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise TokenError("its certificate has no key that can be read") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise TokenError("its certificate's key is not on P-256")
        return key

    def verify(self, key: ec.EllipticCurvePublicKey) -> bytes:
        """Check the signature, and return the claims set.

        Raises:
            TokenError: it is not of this key.
        """
        try:
            payload: bytes = COSE.new().decode(self.data, _verifying(key))
        except (VerifyError, ValueError) as error:
            raise TokenError("the signature is not of the certificate's key") from error
        return payload


def sign(evidence: Evidence, identity: Identity) -> bytes:
    """Sign claims with a platform's attestation key."""
    return sign_payload(encode_claims(evidence), identity)


def sign_payload(payload: bytes, identity: Identity) -> bytes:
    """Sign a claims set that is encoded already."""
    header: dict[int, Any] = {
        _ALG: _ES256,
        _TYP: MEDIA_TYPE,
        _X5CHAIN: _x5chain(identity.chain),
    }
    # cwt writes a header as it finds it: these labels are in order.
    token: bytes = COSE.new().encode_and_sign(payload, _Signer(identity.key), protected=header)
    return token


def open_token(data: bytes, key: ec.EllipticCurvePublicKey) -> Evidence:
    """Open a token with a key that is known to be the platform's.

    Raises:
        TokenError: it is none, or not of this key.
    """
    return decode_claims(Token.parse(data).verify(key))


class _Signer(COSEKeyInterface):
    """A private key for cwt that stays an object of pyca's; cwt's own takes it apart."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        super().__init__({1: 2, 3: _ES256, 4: [1]})
        self._private = key

    def sign(self, msg: bytes) -> bytes:
        r, s = decode_dss_signature(self._private.sign(msg, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(_COORDINATE_BYTES, "big") + s.to_bytes(_COORDINATE_BYTES, "big")


def _verifying(key: ec.EllipticCurvePublicKey) -> EC2Key:
    return EC2Key({**EC2Key.to_cose_key(key), 3: _ES256})


def _x5chain(chain: Sequence[x509.Certificate]) -> bytes | list[bytes]:
    """One certificate is a byte string, several are an array (RFC 9360, section 2)."""
    encoded = [one.public_bytes(serialization.Encoding.DER) for one in chain]
    return encoded[0] if len(encoded) == 1 else encoded


def _certificates(value: object) -> tuple[x509.Certificate, ...]:
    chain = [value] if isinstance(value, bytes) else value
    if not isinstance(chain, list) or not 1 <= len(chain) <= CHAIN_MAX:
        raise TokenError(f"1 to {CHAIN_MAX} certificates belong into its header")
    if isinstance(value, list) and len(value) == 1:
        raise TokenError("an array of one certificate")
    certificates = []
    for one in chain:
        if not isinstance(one, bytes):
            raise TokenError("a certificate is a byte string")
        try:
            certificates.append(x509.load_der_x509_certificate(one))
        # pyca warns of what it is going to refuse, as a serial number that is not positive.
        except (ValueError, x509.InvalidVersion, CryptographyDeprecationWarning) as error:
            raise TokenError("a certificate that is none") from error
    return tuple(certificates)
