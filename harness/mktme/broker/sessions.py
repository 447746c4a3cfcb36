# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions: a cookie that the broker can tell for its own, and a nonce that serves once.

A challenge leaves nothing behind in the broker, as a SYN cookie (RFC 4987, section 3.6) does not:
the cookie says when it was made and for which policy, with a MAC, and the nonce is derived from it.
So a flood of challenges costs the broker no memory, and nobody can choose a nonce. What is kept is
the other half, in a database that all workers share: which cookies were used. Using one inserts a
row, whose key is unique, so that of two workers one fails.

The MAC's key changes with the database and with each boot of the machine: a database that is lost,
or that a power cut has put back by some commits, makes every older cookie void.

What an attested session has (its evidence) is sealed for that session. Who can write to the
database but has not the master key can end a session, or take back that a cookie was used until it
expires; evidence that is sent then is appraised again, and what is released is for the same
recipient.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import sqlite3
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from uuid import UUID

import msgspec

from mktme.broker.errors import BrokerError, StoreError
from mktme.broker.keys import MasterKey, Sealer, SealError

LIFETIME_S: Final = 120
"""From the challenge on: to make evidence, send it, and fetch what it is for."""
SESSIONS_MAX: Final = 16_384
"""That are attested and have not expired, of all workers. One has some 4 KiB on disk."""
COOKIE_MAX_BYTES: Final = 512

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_HEAD: Final = struct.Struct(">16sQ")  # random; when, in ms since 1970
_MAC_BYTES: Final = 32
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS epoch (one INTEGER PRIMARY KEY CHECK (one = 1), random BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS used (
    session BLOB PRIMARY KEY, expires REAL NOT NULL, attested BLOB
);
CREATE INDEX IF NOT EXISTS expiry ON used (expires);
CREATE TABLE IF NOT EXISTS load (one INTEGER PRIMARY KEY CHECK (one = 1), used INTEGER NOT NULL);
INSERT OR IGNORE INTO load VALUES (1, 0);
CREATE TRIGGER IF NOT EXISTS came AFTER UPDATE OF attested ON used WHEN OLD.attested IS NULL
    BEGIN UPDATE load SET used = used + 1; END;
CREATE TRIGGER IF NOT EXISTS went AFTER DELETE ON used WHEN OLD.attested IS NOT NULL
    BEGIN UPDATE load SET used = used - 1; END;
"""


class SessionError(BrokerError):
    """A cookie that is none of this broker's, or expired."""


class ReplayError(SessionError):
    """A nonce that served already."""


class BusyError(BrokerError):
    """There are as many sessions as there may be."""


@dataclass(frozen=True, slots=True)
class Session:
    """What a cookie says.

    Attributes:
        id: SHA-256 of the cookie; it tells nobody the cookie.
        nonce: 32 bytes, to be in the evidence.
        selector: which policy the evidence is to be appraised by.
        issued_s: when it was made, seconds since 1970.
        expires_s: when it ends.
    """

    id: bytes
    nonce: bytes
    selector: str
    issued_s: float
    expires_s: float


class Attested(msgspec.Struct, frozen=True):
    """What an attested session has.

    Attributes:
        evidence: the token, as it came.
        vm: which VM it is about.
        at_s: when it was appraised, seconds since 1970.
    """

    evidence: bytes
    vm: UUID
    at_s: float


class Sessions:
    """The sessions of a broker, of all its workers; a context manager.

    Args:
        directory: for the database.
        master: the broker's.
        lifetime_s: of a session.
        most: how many may be attested at the same time.

    Raises:
        StoreError: the database cannot be made or used.
    """

    def __init__(
        self,
        directory: Path,
        master: MasterKey,
        *,
        lifetime_s: float = LIFETIME_S,
        most: int = SESSIONS_MAX,
    ) -> None:
        self._lifetime_s = lifetime_s
        self._most = most
        boot = _BOOT_ID.read_text("ascii").strip()
        path = directory / f"sessions-{boot}.db"
        try:
            for other in directory.glob("sessions-*.db*"):
                if not other.name.startswith(path.name):
                    other.unlink(missing_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(path, timeout=5.0, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{path}: {error}") from error
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            # What a power cut takes back is void after it.
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.executescript(_SCHEMA)
            self._db.execute("INSERT OR IGNORE INTO epoch VALUES (1, ?)", (os.urandom(32),))
            ((epoch,),) = self._db.execute("SELECT random FROM epoch").fetchall()
        except (ValueError, sqlite3.Error) as error:
            self._db.close()
            raise StoreError(f"{path}: {error}") from error
        salt = hashlib.sha256(boot.encode() + epoch).digest()
        self._cookie_key = master.derive("cookies", salt)
        self._nonce_key = master.derive("nonces", salt)
        self._sealer = Sealer(master.derive("sessions", salt))

    def make(self, selector: str, now_s: float) -> tuple[str, Session]:
        """A new session and its cookie.

        Args:
            selector: which policy.
            now_s: seconds since 1970.
        """
        body = _HEAD.pack(os.urandom(16), int(now_s * 1000)) + selector.encode()
        mac = hmac.digest(self._cookie_key, body, "sha256")
        return _text(body + mac), self._session(body, _text(body + mac))

    def find(self, cookie: str, now_s: float) -> Session:
        """The session of a cookie.

        Raises:
            SessionError: it is none of this broker's, or expired.
        """
        data = _bytes(cookie)
        body, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
        if len(body) < _HEAD.size or not hmac.compare_digest(
            hmac.digest(self._cookie_key, body, "sha256"), mac
        ):
            raise SessionError("no session of this broker")
        session = self._session(body, cookie)
        # Made in the future: by this machine's clock, before somebody put that back.
        if not session.issued_s - 1 <= now_s < session.expires_s:
            raise SessionError("the session expired")
        return session

    def use(self, session: Session, now_s: float) -> None:
        """Let a session's nonce serve, once and for all workers.

        Raises:
            ReplayError: it did already.
            StoreError: the database cannot be used.
        """
        with self._transaction():
            self._db.execute("DELETE FROM used WHERE expires <= ?", (now_s,))
            try:
                self._db.execute(
                    "INSERT INTO used VALUES (?, ?, NULL)", (session.id, session.expires_s)
                )
            except sqlite3.IntegrityError:
                raise ReplayError("this session's nonce served already") from None

    def attest(self, session: Session, attested: Attested) -> None:
        """Keep what a session has that was used and whose evidence passed.

        Raises:
            BusyError: there are too many that are attested.
            StoreError: the database cannot be used.
        """
        sealed = self._sealer.seal(msgspec.msgpack.encode(attested), (session.id,))
        with self._transaction():
            ((count,),) = self._db.execute("SELECT used FROM load").fetchall()
            if count >= self._most:
                raise BusyError(f"{count} sessions")
            self._db.execute("UPDATE used SET attested = ? WHERE session = ?", (sealed, session.id))

    def attested(self, session: Session) -> Attested:
        """What an attested session has.

        Raises:
            SessionError: it is not attested.
            StoreError: the database cannot be used.
        """
        try:
            rows = self._db.execute(
                "SELECT attested FROM used WHERE session = ? AND attested IS NOT NULL",
                (session.id,),
            ).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"sessions: {error}") from error
        try:
            ((sealed,),) = rows
            return msgspec.msgpack.decode(self._sealer.open(sealed, (session.id,)), type=Attested)
        except (ValueError, TypeError, SealError):
            raise SessionError("the session is not attested") from None

    def count(self) -> int:
        """How many sessions are attested and not forgotten yet.

        Raises:
            StoreError: the database cannot be used.
        """
        try:
            ((count,),) = self._db.execute("SELECT used FROM load").fetchall()
        except (ValueError, sqlite3.Error) as error:
            raise StoreError(f"sessions: {error}") from error
        return int(count)

    def close(self) -> None:
        """Close the database; again does nothing."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _session(self, body: bytes, cookie: str) -> Session:
        _, issued_ms = _HEAD.unpack_from(body)
        return Session(
            hashlib.sha256(cookie.encode()).digest(),
            hmac.digest(self._nonce_key, body, "sha256"),
            body[_HEAD.size :].decode(),
            issued_ms / 1000,
            issued_ms / 1000 + self._lifetime_s,
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()
        except (ValueError, sqlite3.Error) as error:
            raise StoreError(f"sessions: {error}") from error


def _text(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    """The inverse, or nothing: of each session there is one spelling."""
    if len(text) > COOKIE_MAX_BYTES:
        return b""
    try:
        data = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:  # UnicodeEncodeError is one
        return b""
    return data if _text(data) == text else b""
