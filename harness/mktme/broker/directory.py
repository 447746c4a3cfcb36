# SPDX-License-Identifier: GPL-2.0-or-later
"""A broker's directory, and how it begins.

::

    DIR/broker.db               policies, reference values, trust, resources: sealed
    DIR/sessions-BOOT.db        cookies that were used, since the machine booted
    DIR/audit.jsonl             who got what
    DIR/metrics-*/              of a broker that runs, or was killed
    DIR/keys/                   may be a link to another place (mktme broker init --keys)
        master.key              32 bytes
        generation              of broker.db, the last one
        token.key, token.pub    signs attestation results (PEM, P-256), and how to check them
        tls.key, tls.crt        of the HTTPS listener
        ca.crt                  what clients pin, unless the certificate is the operator's

All private files are mode 0600, and the directories 0700.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from mktme.attest.identity import key_usage
from mktme.broker.audit import AUDIT_FILE, AuditLog, Record
from mktme.broker.broker import Broker
from mktme.broker.errors import BrokerSetupError, StoreError
from mktme.broker.keys import MASTER_BYTES, MasterKey
from mktme.broker.sessions import Sessions
from mktme.broker.store import Kind, Store, Terms
from mktme.engine.errors import KeyMaterialError
from mktme.engine.keys import read_private_file
from mktme.engine.xts import wipe

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
_TLS_DAYS: Final = 397  # CA/Browser Forum, Baseline Requirements 6.3.2
_BACKDATED: Final = dt.timedelta(hours=1)
_PEM_MAX_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class BrokerDirectory:
    """Where a broker keeps its things."""

    path: Path

    @property
    def database(self) -> Path:
        """What it can release."""
        return self.path / "broker.db"

    @property
    def audit_log(self) -> Path:
        """Who got what."""
        return self.path / AUDIT_FILE

    @property
    def keys(self) -> Path:
        """What must not be where others can read or write."""
        return self.path / "keys"

    @property
    def ca(self) -> Path:
        """What clients pin, of the broker's own TLS certificate."""
        return self.keys / "ca.crt"

    @property
    def tls(self) -> tuple[Path, Path]:
        """The certificate (and its chain) and the key of the HTTPS listener."""
        return self.keys / "tls.crt", self.keys / "tls.key"

    def open_store(self) -> Store:
        """Open the database.

        Raises:
            KeyMaterialError: there is no master key.
            StoreError: the database is not as it was left.
        """
        master = MasterKey.read(self.keys / "master.key")
        try:
            return Store(self.database, self.keys / "generation", master)
        finally:
            master.wipe()

    def open_broker(self) -> Broker:
        """Open all of it, for one worker.

        Raises:
            KeyMaterialError: a key is missing.
            BrokerError: something else is, or not as it was left.
        """
        store = self.open_store()
        try:
            audit = AuditLog(self.audit_log)
            try:
                master = MasterKey.read(self.keys / "master.key")
                try:
                    sessions = Sessions(self.path, master)
                finally:
                    master.wipe()
                return Broker(store, sessions, audit, self._signer())
            except BaseException:
                audit.close()
                raise
        except BaseException:
            store.close()
            raise

    def put(
        self, kind: Kind, tenant: str, name: str, plaintext: bytes, terms: Terms | None = None
    ) -> int:
        """Change something, and record that; arguments and what it raises: `Store.put`."""
        with self.open_store() as store, AuditLog(self.audit_log) as audit:
            generation = store.put(kind, tenant, name, plaintext, terms)
            audit.write(_change(kind, tenant, name, generation, "set", terms))
        return generation

    def remove(self, kind: Kind, tenant: str, name: str) -> int:
        """Take something away, and record that; arguments and what it raises: `Store.remove`."""
        with self.open_store() as store, AuditLog(self.audit_log) as audit:
            generation = store.remove(kind, tenant, name)
            audit.write(_change(kind, tenant, name, generation, "remove", None))
        return generation

    def _signer(self) -> ECKey:
        buffer = bytearray(_PEM_MAX_BYTES)
        path = self.keys / "token.key"
        try:
            length = read_private_file(path, buffer)
            return ECKey.import_key(bytes(buffer[:length]))
        except (ValueError, JoseError) as error:
            raise KeyMaterialError(f"{path}: no PEM file of a private key") from error
        finally:
            wipe(buffer)


def create(
    path: Path,
    *,
    keys: Path | None = None,
    names: Sequence[str] = LOCAL_NAMES,
    certificate: tuple[Path, Path] | None = None,
) -> BrokerDirectory:
    """Make a broker's directory.

    Args:
        path: which; it must not be there yet.
        keys: another place for the keys; it must not be there yet. None: in the directory.
        names: host names and addresses for a TLS certificate of a CA that is made for it and
            forgotten.
        certificate: in place of that, PEM files with a certificate and its key, which are copied.

    Raises:
        BrokerSetupError: something is there already, or makes no sense.
        StoreError: the database cannot be made.
    """
    if certificate is not None:
        check_pair(*certificate)
        tls = tuple(one.read_bytes() for one in certificate)
        ca = None
    else:
        *pair, ca = _local_certificate(names)
        tls = tuple(pair)
    broker = BrokerDirectory(path)
    try:
        path.mkdir(mode=0o700)
        if keys is None:
            broker.keys.mkdir(mode=0o700)
        else:
            keys.mkdir(mode=0o700)
            broker.keys.symlink_to(keys.absolute(), target_is_directory=True)
        signer = ec.generate_private_key(ec.SECP256R1())
        _write(broker.keys / "token.key", _private_pem(signer))
        _write(
            broker.keys / "token.pub",
            signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        )
        for file, data in zip(broker.tls, tls, strict=True):
            _write(file, data)
        if ca is not None:
            _write(broker.ca, ca)
        material = bytearray(secrets.token_bytes(MASTER_BYTES))
        master = MasterKey(material)
        try:
            _write(broker.keys / "master.key", material)
            Store.create(broker.database, broker.keys / "generation", master).close()
        finally:
            wipe(material)
            master.wipe()
    except FileExistsError as error:
        raise BrokerSetupError(
            f"{error.filename}: exists", hint="choose another directory"
        ) from error
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {error.strerror}") from error
    return broker


def _change(
    kind: Kind, tenant: str, name: str, generation: int, what: str, terms: Terms | None
) -> Record:
    return Record(
        event="change",
        outcome="done",
        tenant=tenant,
        policy=name if kind is Kind.POLICY else None if terms is None else terms.policy,
        resource=name if kind is Kind.RESOURCE else None,
        generation=generation,
        what=f"{what} {kind.value} {name} by uid {os.getuid()}",
    )


def _write(path: Path, data: bytes | bytearray) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def check_pair(certificate: Path, key: Path) -> None:
    """Check that TLS can be served with a certificate and its key.

    Raises:
        BrokerSetupError: it cannot.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise BrokerSetupError(
            f"{certificate} and {key}: no certificate and its key",
            hint="give PEM files, the key without a passphrase",
        ) from error


def _local_certificate(names: Sequence[str]) -> tuple[bytes, bytes, bytes]:
    """A certificate and its key, and the CA that issued it; all PEM. The CA's key is gone."""
    now = dt.datetime.now(dt.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)])
        for one in ("mktme broker CA", "mktme broker")
    )

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + dt.timedelta(days=_TLS_DAYS))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
        )

    ca = (
        builder(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(key_cert_sign=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    certificate = (
        builder(name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(one) for one in names]), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(Encoding.PEM),
        _private_pem(key),
        ca.public_bytes(Encoding.PEM),
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:  # not ASCII
        raise BrokerSetupError(f"{name!r} is no host name") from error
