# SPDX-License-Identifier: GPL-2.0-or-later
"""Cookies, and nonces that serve once, whoever asks."""

from __future__ import annotations

import contextlib
import multiprocessing
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from mktme.broker.errors import StoreError
from mktme.broker.keys import MasterKey
from mktme.broker.sessions import (
    COOKIE_MAX_BYTES,
    LIFETIME_S,
    Attested,
    ReplayError,
    SessionError,
    Sessions,
)

from ..attest.signing import VM

KEY = bytes(range(32))
NOW_S = 1_800_000_000.0


def opened(path: Path) -> Sessions:
    return Sessions(path, MasterKey(KEY))


def test_nonce_is_told_by_the_cookie_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        cookie, session = one.make("alice/strict", NOW_S)
        assert other.find(cookie, NOW_S + 1) == session
        assert len(session.nonce) == 32
        assert session.selector == "alice/strict"
        assert session.expires_s - session.issued_s == LIFETIME_S
        assert len(cookie) <= COOKIE_MAX_BYTES
        _, again = one.make("alice/strict", NOW_S)
        assert again.nonce != session.nonce
        # A challenge leaves nothing.
        assert one.count() == 0


def test_longest_selector_fits_a_cookie(tmp_path: Path) -> None:
    with opened(tmp_path) as sessions:
        selector = f"{'a' * 63}/{'b' * 63}"
        cookie, _ = sessions.make(selector, NOW_S)
        assert len(cookie) <= COOKIE_MAX_BYTES
        assert sessions.find(cookie, NOW_S).selector == selector


def race(path: Path, cookies: list[str]) -> int:
    """How many sessions one process could use."""
    won = 0
    with opened(path) as sessions:
        for cookie in cookies:
            with contextlib.suppress(ReplayError):
                sessions.use(sessions.find(cookie, NOW_S), NOW_S)
                won += 1
    return won


def test_of_several_processes_one_uses_a_nonce(tmp_path: Path) -> None:
    with opened(tmp_path) as sessions:
        cookies = [sessions.make("alice/strict", NOW_S)[0] for _ in range(300)]
        with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
            won = list(pool.map(race, [tmp_path] * 4, [cookies] * 4))
        assert sum(won) == len(cookies)
        assert sessions.count() == 0  # none of them is attested


def test_attested_session(tmp_path: Path) -> None:
    with opened(tmp_path) as sessions:
        _, session = sessions.make("alice/strict", NOW_S)
        with pytest.raises(SessionError):
            sessions.attested(session)
        sessions.use(session, NOW_S)
        with pytest.raises(SessionError):
            sessions.attested(session)
        attested = Attested(b"evidence", VM, NOW_S)
        sessions.attest(session, attested)
        assert sessions.attested(session) == attested


def test_what_is_in_the_database_is_sealed_for_its_session(tmp_path: Path) -> None:
    with opened(tmp_path) as sessions:
        _, session = sessions.make("alice/strict", NOW_S)
        _, other = sessions.make("alice/strict", NOW_S)
        for one in (session, other):
            sessions.use(one, NOW_S)
        sessions.attest(session, Attested(b"evidence", VM, NOW_S))
        (path,) = tmp_path.glob("sessions-*.db")
        with contextlib.closing(sqlite3.connect(path)) as db:
            ((sealed,),) = db.execute("SELECT attested FROM used WHERE attested IS NOT NULL")
            assert b"evidence" not in sealed
            db.execute("UPDATE used SET attested = ?", (sealed,))
            db.commit()
            assert sessions.attested(session).evidence == b"evidence"
            with pytest.raises(SessionError):
                sessions.attested(other)
            db.execute("UPDATE used SET attested = 'text'")
            db.commit()
        with pytest.raises(SessionError):
            sessions.attested(session)


def test_sessions_of_another_boot_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as sessions:
        cookie, session = sessions.make("alice/strict", NOW_S)
        sessions.use(session, NOW_S)
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr("mktme.broker.sessions._BOOT_ID", boot)
    with opened(tmp_path) as sessions:
        assert [one.name for one in tmp_path.glob("sessions-*.db")] == ["sessions-another.db"]
        with pytest.raises(SessionError):
            sessions.find(cookie, NOW_S)


def test_expired_sessions_are_forgotten(tmp_path: Path) -> None:
    with opened(tmp_path) as sessions:
        for at_s in (NOW_S, NOW_S + 60):
            _, session = sessions.make("alice/strict", at_s)
            sessions.use(session, at_s)
            sessions.attest(session, Attested(b"evidence", VM, at_s))
        assert sessions.count() == 2
        later_s = NOW_S + LIFETIME_S
        sessions.use(sessions.make("alice/strict", later_s)[1], later_s)
        assert sessions.count() == 1


def test_no_database_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        opened(tmp_path / "none")


def test_database_that_is_none(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (path,) = tmp_path.glob("sessions-*.db")
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="not a database"):
        opened(tmp_path)
