# SPDX-License-Identifier: GPL-2.0-or-later
"""Certificates: which chains are a platform's, and which are not; the CA's files."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mktme.attest.errors import CertificateError, TokenError
from mktme.attest.identity import (
    ATTESTATION,
    CertificateAuthority,
    Identity,
    Trust,
    load_trust,
    verify_chain,
)
from mktme.attest.token import Token, _certificates

from .signing import NOW

UEID = "01" + "ab" * 32
DAY = dt.timedelta(days=1)


def usage(**which: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**({name: False for name in names} | which))


class Authority:
    """One that certifies whatever a test wants."""

    def __init__(self, name: str = "root", path_length: int | None = 0) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self.ca(self, path_length=path_length)

    @property
    def trust(self) -> Trust:
        return Trust((self.certificate,))

    def sign(
        self, subject: x509.Name, key: Any, extensions: list[tuple[Any, bool]], days: int = 10
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - DAY)
            .not_valid_after(NOW + days * DAY)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, hashes.SHA256())

    def ca(self, other: Authority, path_length: int | None = 0) -> x509.Certificate:
        extensions = [
            (x509.BasicConstraints(True, path_length), True),
            (usage(key_cert_sign=True), True),
        ]
        return self.sign(other.name, other.key.public_key(), extensions)

    def leaf(
        self,
        *,
        constraints: tuple[Any, bool] | None = (x509.BasicConstraints(False, None), True),
        key_usage: tuple[Any, bool] | None = (usage(digital_signature=True), True),
        purpose: tuple[Any, bool] | None = (x509.ExtendedKeyUsage([ATTESTATION]), True),
        more: tuple[Any, bool] | None = None,
        ueid: str | None = UEID,
        key: Any = None,
    ) -> x509.Certificate:
        names = [x509.NameAttribute(NameOID.COMMON_NAME, "platform")]
        if ueid is not None:
            names.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, ueid))
        extensions = [one for one in (constraints, key_usage, purpose, more) if one is not None]
        public = key or ec.generate_private_key(ec.SECP256R1()).public_key()
        return self.sign(x509.Name(names), public, extensions)


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority()


def test_an_identity_is_certified_by_its_root() -> None:
    identity = Identity.create(now=NOW)
    assert verify_chain(identity.chain, Trust((identity.root,)), NOW) == identity.ueid
    assert identity.root not in identity.chain
    other = Identity.create(now=NOW)
    assert other.ueid != identity.ueid
    with pytest.raises(CertificateError):
        verify_chain(identity.chain, Trust((other.root,)), NOW)


def test_openssl_agrees(tmp_path: Path) -> None:
    identity = Identity.create()
    (tmp_path / "root.pem").write_bytes(identity.root_pem())
    (tmp_path / "leaf.pem").write_bytes(identity.chain[0].public_bytes(Encoding.PEM))
    subprocess.run(
        ["openssl", "verify", "-x509_strict", "-check_ss_sig", "-purpose", "any", "-CAfile",
         "root.pem", "leaf.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip


def test_of_these_extensions_a_chain_is_good(root: Authority) -> None:
    assert verify_chain([root.leaf()], root.trust, NOW).hex() == UEID
    upper, lower = Authority("upper", path_length=1), Authority("lower")
    chain = [lower.leaf(), upper.ca(lower)]
    assert verify_chain(chain, upper.trust, NOW).hex() == UEID


@pytest.mark.parametrize(
    "make",
    [
        lambda root: root.leaf(constraints=(x509.BasicConstraints(True, None), True)),
        lambda root: root.leaf(constraints=(x509.BasicConstraints(False, None), False)),
        lambda root: root.leaf(constraints=None),
        lambda root: root.leaf(key_usage=(usage(key_cert_sign=True), True)),
        lambda root: root.leaf(key_usage=(usage(digital_signature=True, crl_sign=True), True)),
        lambda root: root.leaf(key_usage=(usage(digital_signature=True), False)),
        lambda root: root.leaf(key_usage=None),
        lambda root: root.leaf(
            purpose=(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), True)
        ),
        lambda root: root.leaf(
            purpose=(x509.ExtendedKeyUsage([ATTESTATION, ExtendedKeyUsageOID.CLIENT_AUTH]), True)
        ),
        lambda root: root.leaf(purpose=(x509.ExtendedKeyUsage([ATTESTATION]), False)),
        lambda root: root.leaf(purpose=None),
        lambda root: root.leaf(
            more=(x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.7"), b"\x05\x00"), True)
        ),
        lambda root: root.leaf(ueid=None),
        lambda root: root.leaf(ueid="02" + "ab" * 32),
        lambda root: root.leaf(ueid="01ab"),
        lambda root: root.leaf(ueid="no digits"),
        lambda root: root.certificate,
    ],
)
def test_another_certificate_is_refused(
    root: Authority, make: Callable[[Authority], x509.Certificate]
) -> None:
    with pytest.raises(CertificateError) as refused:
        verify_chain([make(root)], root.trust, NOW)
    assert str(refused.value).isprintable()


def test_a_platform_certifies_nobody(root: Authority) -> None:
    """A leaf's key that signs another leaf: path length and basic constraints."""
    forger = Authority("platform")
    honest = root.sign(
        forger.name,
        forger.key.public_key(),
        [
            (x509.BasicConstraints(False, None), True),
            (usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([ATTESTATION]), True),
        ],
    )
    with pytest.raises(CertificateError):
        verify_chain([forger.leaf(), honest], root.trust, NOW)


def test_a_chain_is_short() -> None:
    top, middle, low = Authority("top", None), Authority("middle", None), Authority("low", None)
    chain = [low.leaf(), middle.ca(low, None), top.ca(middle, None)]
    with pytest.raises(CertificateError, match="depth"):
        verify_chain(chain, top.trust, NOW)
    limited = Authority("limited", path_length=0)
    with pytest.raises(CertificateError, match="path length"):
        verify_chain([low.leaf(), limited.ca(low)], limited.trust, NOW)


def test_a_root_in_the_chain_counts_for_nothing(root: Authority) -> None:
    foreign = Authority("root")  # of the same name
    with pytest.raises(CertificateError):
        verify_chain([foreign.leaf(), foreign.certificate], root.trust, NOW)


@pytest.mark.parametrize("days", [-2, 11])
def test_it_has_its_time(root: Authority, days: int) -> None:
    with pytest.raises(CertificateError, match="valid at"):
        verify_chain([root.leaf()], root.trust, NOW + days * DAY)


def test_a_ca_is_kept_in_files(tmp_path: Path) -> None:
    ca = CertificateAuthority.make("a manufacturer", now=NOW)
    ca.save(tmp_path / "ca")
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "ca/ca-key.pem").stat().st_mode) == 0o600
    identity = Identity.create(tmp_path / "ca", now=NOW)
    trust = load_trust([tmp_path / "ca/ca.pem"])
    assert verify_chain(identity.chain, trust, NOW) == identity.ueid
    with pytest.raises(CertificateError, match="exists"):
        ca.save(tmp_path / "ca")


def test_files_that_are_no_ca(tmp_path: Path) -> None:
    CertificateAuthority.make("one").save(tmp_path / "one")
    CertificateAuthority.make("two").save(tmp_path / "two")
    with pytest.raises(CertificateError, match="No such file"):
        Identity.create(tmp_path / "none")
    os.replace(tmp_path / "two/ca-key.pem", tmp_path / "one/ca-key.pem")
    with pytest.raises(CertificateError, match=r"is not ca\.pem's key"):
        Identity.create(tmp_path / "one")
    (tmp_path / "one/ca-key.pem").write_text("nothing")
    with pytest.raises(CertificateError, match="no PEM file of a private key"):
        Identity.create(tmp_path / "one")
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(CertificateError, match="no PEM file of certificates"):
        load_trust([tmp_path / "text"])
    leaf = Identity.create()
    (tmp_path / "leaf.pem").write_bytes(leaf.chain[0].public_bytes(Encoding.PEM))
    with pytest.raises(CertificateError, match="no CA"):
        load_trust([tmp_path / "leaf.pem"])


@pytest.mark.parametrize("seed", range(4))
def test_a_certificate_of_an_attackers_making_raises_nothing_else(
    root: Authority, seed: int
) -> None:
    """Whoever signs a token with a key of his own chooses every byte of its certificate."""
    rng = Random(seed)
    der = root.leaf().public_bytes(Encoding.DER)
    for _ in range(1000):
        changed = bytearray(der)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(der))] = rng.randrange(256)
        with contextlib.suppress(TokenError, CertificateError):
            (one,) = _certificates(bytes(changed))
            Token(b"", (one,)).key()
            verify_chain([one], root.trust, NOW)


def test_a_name_that_no_ca_can_have() -> None:
    with pytest.raises(CertificateError, match="60 characters"):
        CertificateAuthority.make("x" * 62)
