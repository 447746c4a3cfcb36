# SPDX-License-Identifier: GPL-2.0-or-later
"""Who signs evidence: the platform attestation key, its certificate, and the CA that vouches.

The engine makes the key (ECDSA, P-256) in its own memory and never gives it away; pyca holds it as
an OpenSSL object, and nothing here takes it apart. Its certificate comes from a platform CA. There
are two kinds:

- by default one that the engine makes at its start, whose key is gone as soon as it has issued the
  one certificate. Whoever wants to trust this platform pins its root certificate;
- one that outlives platforms, ``mktme ca create DIR``: it stands for the manufacturer. The engine
  reads its key itself, issues, and wipes what it read.

The certificate's profile, and what a verifier demands of a chain (RFC 5280):

============================ ===================================================================
platform attestation key     CA false; key usage digitalSignature alone; extended key usage
                             `ATTESTATION` alone, critical; the subject's serialNumber is the ueid
CAs                          CA true, path length 0 for who issues the former; keyCertSign
chain                        at most one CA between the certificate and the pinned one
============================ ===================================================================
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeGuard

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from mktme.attest.claims import UEID_BYTES
from mktme.attest.errors import CertificateError
from mktme.engine.errors import KeyMaterialError
from mktme.engine.keys import read_private_file
from mktme.engine.xts import wipe

# An arc that is anybody's by a UUID (ITU-T X.667).
ATTESTATION: Final = x509.ObjectIdentifier("2.25.123960204196811371041868160218226151073")
"""Extended key usage: signs evidence of a platform, and nothing else."""
CA_CERTIFICATE: Final = "ca.pem"
CA_KEY: Final = "ca-key.pem"
CHAIN_MAX: Final = 2
"""Certificates in a token: the platform's, and one CA that is not pinned itself."""

_RANDOM_UEID: Final = b"\x01"  # RFC 9711, table 1: RAND
_PEM_MAX_BYTES: Final = 64 << 10
_LEAF_DAYS: Final = 30
_CA_DAYS: Final = 3650
# A verifier's clock may be behind this one's.
_BACKDATED: Final = dt.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Trust:
    """The CAs that a verifier has pinned."""

    roots: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """A platform's, for as long as its engine runs.

    Attributes:
        key: the platform attestation key.
        chain: its certificate, then CAs up to the root, which is not in it.
        root: what a verifier pins.
        ueid: the platform's name: 01H and 32 random bytes.
    """

    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]
    root: x509.Certificate
    ueid: bytes

    @classmethod
    def create(cls, ca_dir: Path | None = None, *, now: dt.datetime | None = None) -> Self:
        """Make a key and have it certified.

        Args:
            ca_dir: of a CA that ``mktme ca create`` made; None for one of its own.
            now: when the certificate begins, with a time zone.

        Raises:
            CertificateError: the CA cannot be used.
        """
        if ca_dir is None:
            ca = CertificateAuthority.make("mktme platform", days=_LEAF_DAYS + 1, now=now)
        else:
            ca = CertificateAuthority.load(ca_dir)
        ueid = _RANDOM_UEID + secrets.token_bytes(UEID_BYTES - 1)
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(key, (ca.issue(key.public_key(), ueid, now=now),), ca.certificate, ueid)

    def root_pem(self) -> bytes:
        """The root certificate as a PEM file has it."""
        return self.root.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True, repr=False)
class CertificateAuthority:
    """A platform CA: the manufacturer's part.

    Attributes:
        certificate: self-signed.
    """

    _key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, name: str, *, days: int = _CA_DAYS, now: dt.datetime | None = None) -> Self:
        """Make a CA's key and certificate, in memory alone.

        Args:
            name: its common name, 1 to 64 characters.
            days: how long it is valid.
            now: when it begins.

        Raises:
            CertificateError: not a common name.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} CA")])
        except ValueError as error:
            raise CertificateError("a CA's name has 1 to 60 characters") from error
        usage = key_usage(key_cert_sign=True)
        certificate = (
            _builder(subject, subject, key.public_key(), days, now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what `save` wrote; the key's bytes in memory are overwritten at once.

        Raises:
            CertificateError: they cannot be read, or are not a CA's.
        """
        certificate = load_certificates([directory / CA_CERTIFICATE])[0]
        pem = bytearray(_PEM_MAX_BYTES)
        try:
            length = read_private_file(directory / CA_KEY, pem)
            key = serialization.load_pem_private_key(memoryview(pem)[:length], None)
        except KeyMaterialError as error:
            raise CertificateError(str(error), hint=error.hint) from error
        except (ValueError, TypeError) as error:
            raise CertificateError(f"{CA_KEY} is no PEM file of a private key") from error
        finally:
            wipe(pem)
        if not _is_p256(key) or key.public_key() != certificate.public_key():
            raise CertificateError(f"{CA_KEY} is not {CA_CERTIFICATE}'s key")
        return cls(key, certificate)

    def save(self, directory: Path) -> None:
        """Write the key, readable by this user alone, and the certificate.

        Args:
            directory: it must not exist yet.

        Raises:
            CertificateError: it cannot be written; nothing of it is left then.
        """
        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise CertificateError(
                f"{directory}: {error.strerror}", hint="a CA gets a new directory"
            ) from error
        try:
            for name, data, mode in (
                (CA_KEY, pem, 0o600),
                (CA_CERTIFICATE, self.certificate.public_bytes(serialization.Encoding.PEM), 0o644),
            ):
                with os.fdopen(
                    os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb"
                ) as file:
                    file.write(data)
        except OSError as error:
            for name in (CA_KEY, CA_CERTIFICATE):
                (directory / name).unlink(missing_ok=True)
            directory.rmdir()
            raise CertificateError(f"{directory}: {error.strerror}") from error

    def issue(
        self,
        key: ec.EllipticCurvePublicKey,
        ueid: bytes,
        *,
        days: int = _LEAF_DAYS,
        now: dt.datetime | None = None,
    ) -> x509.Certificate:
        """Certify a platform attestation key; arguments as elsewhere here."""
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, "mktme platform attestation key"),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, ueid.hex()),
            ]
        )
        return (
            _builder(subject, self.certificate.subject, key, days, now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ATTESTATION]), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )


def verify_chain(chain: Sequence[x509.Certificate], trust: Trust, now: dt.datetime) -> bytes:
    """Check that a chain is a platform's and ends in a pinned CA.

    Args:
        chain: a platform's certificate, then CAs; a root in it counts for nothing.
        trust: what is pinned.
        now: when, with a time zone.

    Returns:
        The ueid of the platform that it certifies.

    Raises:
        CertificateError: why it is not.
    """
    if not trust.roots:
        raise CertificateError("no CA is pinned")
    verifier = (
        PolicyBuilder()
        .store(Store(list(trust.roots)))
        .time(now)
        .max_chain_depth(CHAIN_MAX - 1)
        .extension_policies(ca_policy=_CA_PROFILE, ee_policy=_LEAF_PROFILE)
        .build_client_verifier()
    )
    leaf = chain[0]
    try:
        verifier.verify(leaf, list(chain[1:]))
        names = leaf.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)
        ueid = bytes.fromhex(str(names[0].value)) if len(names) == 1 else b""
    except VerificationError as error:
        raise CertificateError(_why(error)) from error
    except (ValueError, TypeError) as error:  # a name that is no text, or not hexadecimal
        raise CertificateError("the certificate names no platform") from error
    if len(ueid) != UEID_BYTES or ueid[:1] != _RANDOM_UEID:
        raise CertificateError("the certificate names no platform")
    return ueid


def load_certificates(paths: Iterable[Path]) -> tuple[x509.Certificate, ...]:
    """Read certificates from PEM files.

    Raises:
        CertificateError: a file has none, or cannot be read.
    """
    certificates: list[x509.Certificate] = []
    for path in paths:
        try:
            certificates += x509.load_pem_x509_certificates(_read(path))
        except ValueError as error:
            raise CertificateError(
                f"{path} is no PEM file of certificates",
                hint=f"mktme ca create DIR makes DIR/{CA_CERTIFICATE}",
            ) from error
    return tuple(certificates)


def load_trust(paths: Iterable[Path]) -> Trust:
    """Pin CAs: read their certificates from PEM files.

    Raises:
        CertificateError: a file has none, cannot be read, or has one that is no CA's.
    """
    roots = load_certificates(paths)
    for root in roots:
        try:
            constraints = root.extensions.get_extension_for_class(x509.BasicConstraints).value
        except (x509.ExtensionNotFound, ValueError):
            constraints = None
        if constraints is None or not constraints.ca:
            raise CertificateError(
                f"{root.subject.rfc4514_string()} is no CA",
                hint="pin the root, not a platform's certificate",
            )
    return Trust(roots)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_PEM_MAX_BYTES + 1)
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}") from error
    if len(data) > _PEM_MAX_BYTES:
        raise CertificateError(f"{path} is longer than {_PEM_MAX_BYTES} bytes")
    return data


def _is_p256(key: object) -> TypeGuard[ec.EllipticCurvePrivateKey]:
    return isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    now: dt.datetime | None,
) -> x509.CertificateBuilder:
    start = dt.datetime.now(dt.UTC) if now is None else now
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(start + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    """A certificate's key usage: these, and nothing else (RFC 5280, section 4.2.1.3)."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _check_leaf_constraints(
    _policy: Policy, _one: x509.Certificate, constraints: x509.BasicConstraints
) -> None:
    if constraints.ca:
        raise ValueError("a CA's certificate signs no evidence")


def _check_leaf_usage(_policy: Policy, _one: x509.Certificate, usage: x509.KeyUsage) -> None:
    if usage != key_usage(digital_signature=True):
        raise ValueError("the certificate's key usage is not digitalSignature alone")


def _check_leaf_purpose(
    _policy: Policy, _one: x509.Certificate, usage: x509.ExtendedKeyUsage
) -> None:
    if list(usage) != [ATTESTATION]:
        raise ValueError("the certificate is not for a platform attestation key")


def _check_ca_usage(_policy: Policy, _one: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.key_cert_sign:
        raise ValueError("a CA in the chain may not sign certificates")


_LEAF_PROFILE: Final = (
    ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, Criticality.CRITICAL, _check_leaf_constraints)
    .require_present(x509.KeyUsage, Criticality.CRITICAL, _check_leaf_usage)
    .require_present(x509.ExtendedKeyUsage, Criticality.CRITICAL, _check_leaf_purpose)
)
# That a CA is one, and the length of the path below it, pyca checks whatever the policy.
_CA_PROFILE: Final = (
    ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, Criticality.CRITICAL, None)
    .require_present(x509.KeyUsage, Criticality.CRITICAL, _check_ca_usage)
)


_OURS: Final = "Python extension validator failed: ValueError: "


def _why(error: VerificationError) -> str:
    """What pyca found, without the certificate that it quotes."""
    text = str(error)
    for prefix in ("validation failed: ", "candidates exhausted: ", _OURS):
        text = text.removeprefix(prefix)
    text = text.partition(" (encountered processing")[0]
    if text.startswith("all candidates exhausted"):
        return "the chain ends in no pinned CA"
    return "the certificate cannot be read" if text.startswith("error parsing") else text
