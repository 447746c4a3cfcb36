# SPDX-License-Identifier: GPL-2.0-or-later
"""What the broker keeps: policies, reference values, trusted platform CAs, and resources.

Each is a row of SQLite, sealed with a key that is derived from the master key. Its place (kind,
tenant, name, version, and the terms of a resource's release) is authenticated with it, so that a
row in another row's place, or with another policy or tenant, does not open. A manifest,
authenticated too, is over all rows that there are: one that is missing, added, or put back as it
was earlier is noticed. The manifest counts its generations, and the last one is also in a file
beside the master key: a whole database put back as it was earlier is noticed.

What cannot be noticed: that file and the database both put back, while no broker runs that had seen
more. Who can write beside the master key can do so. So the keys may be in another place than the
database (``mktme broker init --keys``), and each change's generation is in the audit log.

A process reads all of the database once, and again when SQLite tells that somebody changed it
(PRAGMA data_version); what it releases is what it has read and checked. If that check fails,
nothing is released any more.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import hashlib
import hmac
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import msgspec
from cryptography import x509

from mktme.attest.identity import Trust
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.broker.errors import BrokerSetupError, StoreError
from mktme.broker.keys import SEAL_BYTES, MasterKey, Sealer, SealError

PERMISSIONS: Final = 0o600
SECRET_MAX_BYTES: Final = 64 << 10
DOCUMENT_MAX_BYTES: Final = 1 << 20

NO_REFERENCE: Final = Reference(frozenset(), {})
"""No digest is good."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}", re.ASCII)
_SCHEMA: Final = """
CREATE TABLE row (
    kind TEXT NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
    terms TEXT NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (kind, tenant, name)
);
CREATE TABLE manifest (
    one INTEGER PRIMARY KEY CHECK (one = 1), generation INTEGER NOT NULL, mac BLOB NOT NULL
);
"""


class Kind(enum.Enum):
    """What a row is."""

    POLICY = "policy"
    REFERENCE = "reference"
    TRUST = "trust"
    RESOURCE = "resource"


class Terms(msgspec.Struct, frozen=True, omit_defaults=True):
    """On what terms a resource is released.

    Attributes:
        policy: the tenant's policy that evidence has to pass.
        vm: the name or UUID of the only VM that may have it; None: any that passes.
    """

    policy: str
    vm: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it is in the database; the first four columns are its place.

    Attributes:
        terms: of a resource, as JSON; else empty.
        sealed: nonce, ciphertext and tag.
    """

    kind: Kind
    tenant: str
    name: str
    version: int
    terms: str
    sealed: bytes = field(repr=False)

    @property
    def place(self) -> tuple[object, ...]:
        """What it was sealed for."""
        return (self.kind.value, self.tenant, self.name, self.version, self.terms)

    @property
    def size_bytes(self) -> int:
        """Of what is sealed in it."""
        return len(self.sealed) - SEAL_BYTES

    @property
    def release(self) -> Terms:
        """The terms of a resource."""
        return msgspec.json.decode(self.terms, type=Terms)


@dataclass(frozen=True, slots=True)
class Rules:
    """What evidence is appraised by.

    Attributes:
        tenant: whose they are.
        name: the policy's.
        version: the policy's.
        trust: certificates of platform CAs.
    """

    tenant: str
    name: str
    version: int
    policy: Policy
    reference: Reference
    trust: Trust


class Contents:
    """All that was in the database at one moment, authenticated.

    Args:
        generation: the manifest's.
        rows: by kind, tenant and name.
        sealer: opens them.
    """

    def __init__(
        self, generation: int, rows: Mapping[tuple[Kind, str, str], Row], sealer: Sealer
    ) -> None:
        self.generation: Final = generation
        self.rows: Final = rows
        self._sealer = sealer
        self._rules: dict[tuple[str, str], Rules | None] = {}

    def resource(self, tenant: str, path: str) -> Row | None:
        """A tenant's resource; None if it has none of that path."""
        return self.rows.get((Kind.RESOURCE, tenant, path))

    def rules(self, tenant: str, policy: str) -> Rules | None:
        """A tenant's policy, with its reference values and the CAs that the tenant trusts.

        Args:
            tenant: its name.
            policy: the policy's; reference values of the same name belong to it.

        Returns:
            None if the tenant has no such policy.
        """
        key = (tenant, policy)
        if key not in self._rules:
            self._rules[key] = self._read_rules(tenant, policy)
        return self._rules[key]

    def open(self, row: Row) -> bytes:
        """What was sealed in a row.

        Raises:
            StoreError: it does not open.
        """
        try:
            return self._sealer.open(row.sealed, row.place)
        except SealError:
            raise StoreError(f"{row.kind.value} {row.tenant}/{row.name} was changed") from None

    def _read_rules(self, tenant: str, name: str) -> Rules | None:
        row = self.rows.get((Kind.POLICY, tenant, name))
        if row is None:
            return None
        values = self.rows.get((Kind.REFERENCE, tenant, name))
        roots = [
            certificate
            for one in self.rows.values()
            if one.kind is Kind.TRUST and one.tenant == tenant
            for certificate in x509.load_pem_x509_certificates(self.open(one))
        ]
        return Rules(
            tenant,
            name,
            row.version,
            Policy.decode(self.open(row)),
            NO_REFERENCE if values is None else Reference.decode(self.open(values)),
            Trust(tuple(roots)),
        )


class Store:
    """The database, and the file with its last generation; a context manager.

    Args:
        path: the database.
        anchor: the file with the generation.
        master: the broker's.

    Raises:
        StoreError: there is no database, or it is not as a broker with this key left it.
    """

    def __init__(self, path: Path, anchor: Path, master: MasterKey) -> None:
        self._path = path
        self._anchor = anchor
        self._sealer = Sealer(master.derive("rows"))
        self._manifest_key = master.derive("manifest")
        self._contents: Contents | None = None
        self._seen: int | None = None
        self._fault: StoreError | None = None
        self._highest = 0
        try:
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=5.0)
        except sqlite3.Error as error:
            raise _unreadable(path, error) from error
        self._db.isolation_level = None
        try:
            self._db.execute("PRAGMA synchronous = FULL")
            self.contents()
        except sqlite3.Error as error:
            self.close()
            raise _unreadable(path, error) from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, anchor: Path, master: MasterKey) -> Self:
        """Make an empty one.

        Raises:
            BrokerSetupError: there is something of that name.
            StoreError: it cannot be made.
        """
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, PERMISSIONS))
        except FileExistsError as error:
            raise BrokerSetupError(f"{path}: exists", hint="choose another directory") from error
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        mac = _manifest_mac(master.derive("manifest"), 1, {})
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)
            db.execute("INSERT INTO manifest VALUES (1, 1, ?)", (mac,))
            db.commit()
        _write_anchor(anchor, 1)
        return cls(path, anchor, master)

    def contents(self) -> Contents:
        """All that is in it now.

        Raises:
            StoreError: it is not as a broker with this key left it; so it stays until somebody
                mends it.
        """
        try:
            ((version,),) = self._db.execute("PRAGMA data_version")
            if version != self._seen:
                self._contents = self._fault = None
                try:
                    self._contents = self._read()
                except StoreError as error:
                    self._fault = error
                self._seen = version
        except sqlite3.Error as error:
            self._seen = None
            raise _unreadable(self._path, error) from error
        if self._fault is not None:
            raise StoreError(str(self._fault), hint=self._fault.hint)
        assert self._contents is not None
        return self._contents

    def put(
        self, kind: Kind, tenant: str, name: str, plaintext: bytes, terms: Terms | None = None
    ) -> int:
        """Add a row, or replace it by its next version.

        Args:
            kind: what it is.
            tenant: whose it is.
            name: of a policy and the like; of a resource, REPOSITORY/TYPE/TAG.
            plaintext: a document (at most 1 MiB) or secret (1 byte to 64 KiB).
            terms: of a resource's release.

        Returns:
            The database's generation with it.

        Raises:
            BrokerSetupError: a name, a size, or a document that makes no sense.
            StoreError: the database is not as it was left; it is not changed then.
        """
        _check_name("tenant", tenant)
        (check_path if kind is Kind.RESOURCE else _check_name_of(kind))(name)
        _check_plaintext(kind, plaintext)

        def change(old: Contents, rows: dict[tuple[Kind, str, str], Row]) -> None:
            if terms is not None and (Kind.POLICY, tenant, terms.policy) not in rows:
                raise BrokerSetupError(
                    f"tenant {tenant} has no policy {terms.policy}", hint="set-policy first"
                )
            replaced = rows.get((kind, tenant, name))
            # Of a row that was removed the version would begin anew: the generation never does.
            version = max(replaced.version if replaced else 0, old.generation) + 1
            text = "" if terms is None else msgspec.json.encode(terms).decode()
            bare = Row(kind, tenant, name, version, text, b"")
            sealed = self._sealer.seal(plaintext, bare.place)
            rows[kind, tenant, name] = Row(kind, tenant, name, version, text, sealed)

        return self._change(change)

    def remove(self, kind: Kind, tenant: str, name: str) -> int:
        """Take a row away; returns the database's generation without it.

        Raises:
            BrokerSetupError: there is no such row, or a resource needs it.
            StoreError: the database is not as it was left; it is not changed then.
        """

        def change(_old: Contents, rows: dict[tuple[Kind, str, str], Row]) -> None:
            if rows.pop((kind, tenant, name), None) is None:
                raise BrokerSetupError(f"tenant {tenant} has no {kind.value} {name}")
            for row in rows.values():
                if (
                    kind is Kind.POLICY
                    and row.kind is Kind.RESOURCE
                    and row.tenant == tenant
                    and row.release.policy == name
                ):
                    raise BrokerSetupError(
                        f"resource {row.name} needs policy {name}", hint="remove that first"
                    )

        return self._change(change)

    def close(self) -> None:
        """Close it; again does nothing."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _change(self, change: Callable[[Contents, dict[tuple[Kind, str, str], Row]], None]) -> int:
        try:
            with _transaction(self._db):
                old = self._read()  # not cached: it is this that the new manifest vouches for
                rows = dict(old.rows)
                change(old, rows)
                for key, row in rows.items():
                    if old.rows.get(key) != row:
                        self._db.execute(
                            "INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?, ?, ?)",
                            (*row.place, row.sealed),
                        )
                for kind, tenant, name in old.rows.keys() - rows.keys():
                    self._db.execute(
                        "DELETE FROM row WHERE kind = ? AND tenant = ? AND name = ?",
                        (kind.value, tenant, name),
                    )
                generation = old.generation + 1
                self._db.execute(
                    "UPDATE manifest SET generation = ?, mac = ?",
                    (generation, _manifest_mac(self._manifest_key, generation, rows)),
                )
        except sqlite3.Error as error:
            raise _unreadable(self._path, error) from error
        finally:
            self._seen = None  # data_version is about other connections' changes
        # After the commit: a crash in between leaves a database that is newer than the file says.
        _raise_anchor(self._anchor, generation)
        return generation

    def _read(self) -> Contents:
        with _transaction(self._db, "DEFERRED"):
            found = self._db.execute("SELECT generation, mac FROM manifest").fetchall()
            records = self._db.execute(
                "SELECT kind, tenant, name, version, terms, sealed FROM row"
            ).fetchall()
        rows = {}
        try:
            ((generation, mac),) = found
            for kind, *columns in records:
                row = Row(Kind(kind), *columns)
                rows[row.kind, row.tenant, row.name] = row
            expected = _manifest_mac(self._manifest_key, generation, rows)
            genuine = hmac.compare_digest(mac, expected)
        except (ValueError, TypeError):  # other types and kinds than there are
            genuine = False
        if not genuine:
            raise StoreError(
                f"{self._path}: it was changed by somebody without the master key",
                hint="put back a copy of this generation, or make the broker anew",
            )
        # Not less than any this process saw: the file may be put back too.
        last = max(_read_anchor(self._anchor), self._highest)
        if generation < last:
            raise StoreError(
                f"{self._path}: it was put back to generation {generation}, the last is {last}",
                hint="put back a copy of that generation, or make the broker anew",
            )
        self._highest = generation
        return Contents(generation, rows, self._sealer)


def check_path(path: str) -> None:
    """Check that a resource can be called so: REPOSITORY/TYPE/TAG.

    Raises:
        BrokerSetupError: it cannot.
    """
    parts = path.split("/")
    if len(parts) != 3 or not all(map(_PART.fullmatch, parts)):
        raise BrokerSetupError(
            f"{path!r} is no resource", hint="REPOSITORY/TYPE/TAG, such as alice/key/vm1"
        )


def _check_plaintext(kind: Kind, plaintext: bytes) -> None:
    most = SECRET_MAX_BYTES if kind is Kind.RESOURCE else DOCUMENT_MAX_BYTES
    least = 1 if kind is Kind.RESOURCE else 0  # an empty policy.toml is the strictest
    if not least <= len(plaintext) <= most:
        raise BrokerSetupError(f"a {kind.value} has {least} to {most:,} bytes")
    decoders: dict[Kind, Callable[[bytes], object]] = {
        Kind.POLICY: Policy.decode,
        Kind.REFERENCE: Reference.decode,
        Kind.TRUST: x509.load_pem_x509_certificates,
    }
    if kind in decoders:
        decoders[kind](plaintext)


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise BrokerSetupError(
            f"{name!r} is no name of a {what}",
            hint="lower-case letters, digits, '.', '_' and '-', 63 at most",
        )


def _check_name_of(kind: Kind) -> Callable[[str], None]:
    return lambda name: _check_name(kind.value, name)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, mode: str = "IMMEDIATE") -> Iterator[None]:
    """All that is done in the body, or nothing; within another one it is part of that."""
    if db.in_transaction:
        yield
        return
    db.execute(f"BEGIN {mode}")
    try:
        yield
    except BaseException:
        db.rollback()
        raise
    db.commit()


def _manifest_mac(key: bytes, generation: int, rows: Mapping[tuple[Kind, str, str], Row]) -> bytes:
    listed = sorted((*row.place, hashlib.sha256(row.sealed).hexdigest()) for row in rows.values())
    return hmac.digest(key, msgspec.json.encode([generation, listed]), "sha256")


def _read_anchor(path: Path) -> int:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path}: the last generation cannot be read",
            hint="it has the number that `mktme broker list` and the audit log told last",
        ) from error


def _raise_anchor(path: Path, generation: int) -> None:
    """Note a generation, unless whoever committed after us has noted theirs already."""
    try:
        lock = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path.parent}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if generation > _read_anchor(path):
            _write_anchor(path, generation)
    finally:
        os.close(lock)


def _write_anchor(path: Path, generation: int) -> None:
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "w") as file:
            file.write(f"{generation}\n")
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error


def _unreadable(path: Path, error: sqlite3.Error) -> StoreError:
    return StoreError(f"{path}: {error}")
