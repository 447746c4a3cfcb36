# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys of a TPM as it describes them, and a challenge that only the TPM which has them can answer.

An endorsement key (EK) is made with its TPM and does nothing but decrypt; an attestation key (AK)
signs what its TPM says of itself. A verifier that knows the EK learns by `make_credential` that an
AK is in the same TPM: the secret is encrypted for the EK and bound to the AK's name, and
TPM2_ActivateCredential gives it away only where both are loaded.

Sources: TPM 2.0 Library, rev. 1.59, Part 1, 24 (credential protection), 11.4.10.2 (KDFa) and
B.10.4 (RSA); Part 2, 8.3 (TPMA_OBJECT) and 12.2 (TPMT_PUBLIC). TCG EK Credential Profile 2.5, B.3
(template L-1).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Final, TypeAlias

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from mktme.attest.marshal import ALG_NULL, SHA256, Reader, TpmFormatError, sized

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

_PUBLIC_MAX_BYTES: Final = 1024
_RSA, _ECC, _AES, _CFB, _P256 = 0x0001, 0x0023, 0x0006, 0x0043, 0x0003
_RSA_BITS: Final = 2048
_DEFAULT_EXPONENT: Final = 65537
_RSAES, _ECDAA = 0x0015, 0x001A
"""Schemes that have no hash, and a counter beside it; all others have a hash."""
# TPMA_OBJECT.
_FIXED: Final = 1 << 1 | 1 << 4 | 1 << 5
"""fixedTPM, fixedParent, sensitiveDataOrigin: made in its TPM, and never anywhere else."""
_RESTRICTED, _DECRYPT, _SIGN = 1 << 16, 1 << 17, 1 << 18

_SEED_BYTES: Final = 32
_SECRET_BYTES: Final = 32  # at most the size of a digest of the EK's hash
# What tpm2-tools put before a credential (lib/files.c, files_write_header).
_CREDENTIAL_HEADER: Final = bytes.fromhex("badcc0de 00000001")


@dataclass(frozen=True, slots=True)
class TpmKey:
    """The public part of a key in a TPM.

    Attributes:
        area: TPMT_PUBLIC, as the TPM marshalled it.
        attributes: TPMA_OBJECT.
        symmetric: algorithm, bits and mode of what it protects its children with, None without.
        key: what it is.
    """

    area: bytes
    attributes: int
    symmetric: tuple[int, int, int] | None
    key: PublicKey

    @classmethod
    def parse(cls, public: bytes) -> TpmKey:
        """Read a TPM2B_PUBLIC, which is what tpm2-tools write as ``-f tss``.

        Raises:
            TpmFormatError: it is none, or neither RSA-2048 nor P-256 with names of SHA-256.
        """
        outer = Reader(public, "big", "a TPM's public key")
        area = outer.sized(_PUBLIC_MAX_BYTES)
        outer.end()
        reader = Reader(area, "big", "a TPM's public key")
        kind, name_hash, attributes = reader.number(2), reader.number(2), reader.number(4)
        if name_hash != SHA256:
            raise reader.wrong("has a name that is not by SHA-256")
        reader.sized(64)  # authPolicy
        symmetric = None
        if (algorithm := reader.number(2)) != ALG_NULL:
            symmetric = (algorithm, reader.number(2), reader.number(2))
        _skip_scheme(reader)
        key: PublicKey
        if kind == _RSA:
            key = _rsa_key(reader)
        elif kind == _ECC:
            key = _ecc_key(reader)
        else:
            raise reader.wrong("is neither of RSA nor of ECC")
        reader.end()
        return cls(area, attributes, symmetric, key)

    @property
    def name(self) -> bytes:
        """What the TPM knows it by: the hash of all that there is to it (Part 1, 16)."""
        return SHA256.to_bytes(2, "big") + hashlib.sha256(self.area).digest()

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the key's SubjectPublicKeyInfo (DER): what evidence has of an EK."""
        spki = self.key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(spki).digest()

    def require_attestation_key(self) -> None:
        """Check that it signs nothing but what its TPM says, and is in no other TPM.

        Raises:
            TpmFormatError: it is not such a key.
        """
        kind = _FIXED | _RESTRICTED | _DECRYPT | _SIGN
        if self.attributes & kind != _FIXED | _RESTRICTED | _SIGN:
            raise TpmFormatError("the key that signed is no attestation key: it may sign anything")


@dataclass(frozen=True, slots=True)
class Challenge:
    """What is asked of the TPM that is said to have an EK and an AK.

    Attributes:
        secret: what it has to find out, 32 bytes, and to quote with the AK.
        credential: what to give it, as tpm2_activatecredential reads it (``-i``).
    """

    secret: bytes
    credential: bytes


def make_credential(endorsement: TpmKey, attestation: TpmKey) -> Challenge:
    """Encrypt a fresh secret for a TPM that has both keys, as TPM2_MakeCredential does.

    Raises:
        TpmFormatError: the first is no EK of the usual template, or the second no AK.
    """
    attestation.require_attestation_key()
    kind = _FIXED | _RESTRICTED | _DECRYPT | _SIGN
    if (
        not isinstance(endorsement.key, rsa.RSAPublicKey)
        or endorsement.attributes & kind != _FIXED | _RESTRICTED | _DECRYPT
        or endorsement.symmetric != (_AES, 128, _CFB)
    ):
        raise TpmFormatError(
            "the endorsement key is not of the usual template, RSA-2048 with AES-128",
            hint="tpm2_readpublic -c 0x81010001 -o ek.pub",
        )
    secret, seed = secrets.token_bytes(_SECRET_BYTES), secrets.token_bytes(_SEED_BYTES)
    sha256 = hashes.SHA256()
    try:
        encrypted_seed = endorsement.key.encrypt(seed, OAEP(MGF1(sha256), sha256, b"IDENTITY\0"))
    except ValueError as error:  # a modulus that is no product of two primes
        raise TpmFormatError("the endorsement key cannot be encrypted to") from error
    storage_key = _kdfa(seed, b"STORAGE", attestation.name, 128)
    # A fresh key for each message, hence an initialisation vector of zeros (Part 1, 24.4).
    encryptor = Cipher(algorithms.AES(storage_key), CFB(bytes(16))).encryptor()
    identity = encryptor.update(sized(secret)) + encryptor.finalize()
    integrity_key = _kdfa(seed, b"INTEGRITY", b"", 256)
    integrity = hmac.digest(integrity_key, identity + attestation.name, "sha256")
    blob = sized(sized(integrity) + identity) + sized(encrypted_seed)
    return Challenge(secret, _CREDENTIAL_HEADER + blob)


def _kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """SP 800-108 in counter mode with HMAC-SHA-256."""
    kdf = KBKDFHMAC(
        hashes.SHA256(),
        Mode.CounterMode,
        length=bits // 8,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=label,
        context=context,
        fixed=None,
    )
    return kdf.derive(key)


def _skip_scheme(reader: Reader) -> None:
    """TPMT_RSA_SCHEME or TPMT_ECC_SCHEME: a signature says by itself what it is."""
    scheme = reader.number(2)
    if scheme not in (ALG_NULL, _RSAES):
        reader.take(4 if scheme == _ECDAA else 2)


def _rsa_key(reader: Reader) -> rsa.RSAPublicKey:
    bits, exponent = reader.number(2), reader.number(4) or _DEFAULT_EXPONENT
    modulus = int.from_bytes(reader.sized(_RSA_BITS // 8), "big")
    if bits != _RSA_BITS or modulus.bit_length() != bits or exponent != _DEFAULT_EXPONENT:
        raise reader.wrong(f"is no RSA key of {_RSA_BITS} bits with the usual exponent")
    return rsa.RSAPublicNumbers(exponent, modulus).public_key()


def _ecc_key(reader: Reader) -> ec.EllipticCurvePublicKey:
    if reader.number(2) != _P256:
        raise reader.wrong("is not on the curve P-256")
    _skip_scheme(reader)  # TPMT_KDF_SCHEME, which looks the same
    x, y = (int.from_bytes(reader.sized(32), "big") for _ in "xy")
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError as error:
        raise reader.wrong("is no point on its curve") from error
