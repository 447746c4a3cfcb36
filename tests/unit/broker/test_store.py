# SPDX-License-Identifier: GPL-2.0-or-later
"""The database in the hands of somebody without the master key."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from mktme.attest.errors import PolicyError
from mktme.broker.broker import Broker
from mktme.broker.errors import BrokerSetupError, StoreError
from mktme.broker.keys import MASTER_BYTES, MasterKey, Sealer, SealError
from mktme.broker.store import SECRET_MAX_BYTES, Kind, Store, Terms
from mktme.engine.errors import KeyMaterialError

from .setting import CLIENT, KEY_PATH, LAX, POLICY, SECRET, Setting
from .test_broker import denied


def released(setting: Setting, broker: Broker) -> bytes:
    return setting.opened(broker.release(setting.attested(broker), KEY_PATH, CLIENT))


@contextlib.contextmanager
def tampering(setting: Setting) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(setting.directory.database)) as db:
        yield db
        db.commit()


# Each begins with: trust "platforms", policies "strict" and "lax", a resource for each of them.
TAMPERED: Final = {
    "two resources swapped": """
        CREATE TEMP TABLE a AS SELECT sealed FROM row WHERE name = 'alice/key/vm1';
        UPDATE row SET sealed = (SELECT sealed FROM row WHERE name = 'alice/motd/1')
            WHERE name = 'alice/key/vm1';
        UPDATE row SET sealed = (SELECT sealed FROM a) WHERE name = 'alice/motd/1';
    """,
    "resource renamed": "UPDATE row SET name = 'alice/key/vm2' WHERE name = 'alice/key/vm1'",
    "a weaker policy for a resource": """
        UPDATE row SET terms = replace(terms, 'strict', 'lax') WHERE name = 'alice/key/vm1'
    """,
    "a binding taken away": "UPDATE row SET terms = '{\"policy\":\"lax\"}' WHERE terms LIKE '%vm%'",
    "a policy under another's name": """
        DELETE FROM row WHERE kind = 'policy' AND name = 'strict';
        UPDATE row SET name = 'strict' WHERE kind = 'policy' AND name = 'lax';
    """,
    "given to another tenant": "UPDATE row SET tenant = 'mallory' WHERE kind = 'resource'",
    "of another kind": "UPDATE row SET kind = 'trust', name = 'x' WHERE name = 'alice/motd/1'",
    "of no kind": "UPDATE row SET kind = 'none' WHERE name = 'alice/motd/1'",
    "row taken away": "DELETE FROM row WHERE kind = 'reference'",
    "row added": "INSERT INTO row VALUES ('trust', 'alice', 'mallory', 9, '', x'00')",
    "version changed": "UPDATE row SET version = version + 1 WHERE name = 'alice/key/vm1'",
    "not what it was sealed as": "UPDATE row SET sealed = zeroblob(99) WHERE kind = 'policy'",
    "of another type": "UPDATE row SET sealed = 7, version = 'x' WHERE kind = 'policy'",
    "generation changed": "UPDATE manifest SET generation = generation + 1",
    "no manifest": "DELETE FROM manifest",
    "manifest of another type": "UPDATE manifest SET mac = 'x', generation = 'y'",
    "no table": "DROP TABLE row",
}


@pytest.mark.parametrize("sql", TAMPERED.values(), ids=TAMPERED.keys())
@pytest.mark.parametrize("running", [True, False], ids=["while it runs", "before it starts"])
def test_tampering_is_noticed(setting: Setting, sql: str, running: bool) -> None:
    put = setting.directory.put
    put(Kind.POLICY, "alice", "lax", LAX)
    put(Kind.RESOURCE, "alice", "alice/motd/1", b"hello", Terms("lax", vm="alice"))
    broker = setting.open()
    try:
        assert released(setting, broker) == SECRET  # control
        cookie = setting.attested(broker)
        if not running:
            broker.close()
        with tampering(setting) as db:
            db.executescript(sql)
        if not running:
            with pytest.raises(StoreError):
                setting.directory.open_store()
            return
        denied(setting, lambda: broker.release(cookie, KEY_PATH, CLIENT), 503, "store")
        # And nobody attests any more.
        fresh, nonce = broker.challenge("alice/strict")
        sent = setting.sent(nonce)
        denied(setting, lambda: broker.attest(fresh, sent, CLIENT), 503, "store")
    finally:
        broker.close()
    # An administrator's change does not vouch for it.
    with pytest.raises(StoreError):
        put(Kind.RESOURCE, "alice", "alice/motd/2", b"hello", Terms("lax"))


def test_older_row_put_back_is_noticed(setting: Setting, broker: Broker) -> None:
    with tampering(setting) as db:
        (old,) = db.execute("SELECT * FROM row WHERE kind = 'policy'").fetchall()
    setting.directory.put(Kind.POLICY, "alice", "strict", POLICY + b"key-size = 256\n")
    cookie, nonce = broker.challenge("alice/strict")
    denied(setting, lambda: broker.attest(cookie, setting.sent(nonce), CLIENT), 401, "key-size")
    with tampering(setting) as db:
        db.execute("INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?, ?, ?)", old)
    cookie, nonce = broker.challenge("alice/strict")
    denied(setting, lambda: broker.attest(cookie, setting.sent(nonce), CLIENT), 503, "store")


def copy(directory: Path, to: Path) -> None:
    for path in directory.glob("broker.db*"):
        shutil.copy(path, to / path.name)


def test_older_database_put_back_is_noticed(setting: Setting, tmp_path: Path) -> None:
    copy(setting.directory.path, tmp_path)
    setting.directory.put(Kind.POLICY, "alice", "strict", POLICY + b"key-size = 256\n")
    for path in setting.directory.path.glob("broker.db*"):
        path.unlink()
    copy(tmp_path, setting.directory.path)
    with pytest.raises(StoreError, match="put back to generation 5, the last is 6"):
        setting.open()


def test_what_cannot_be_noticed(setting: Setting, tmp_path: Path) -> None:
    """The database and the last generation, put back both while no broker runs."""
    copy(setting.directory.path, tmp_path)
    anchor = setting.directory.keys / "generation"
    shutil.copy(anchor, tmp_path)
    setting.directory.put(Kind.POLICY, "alice", "strict", POLICY + b"key-size = 256\n")
    for path in setting.directory.path.glob("broker.db*"):
        path.unlink()
    copy(tmp_path, setting.directory.path)
    shutil.copy(tmp_path / "generation", anchor)
    broker = setting.open()
    assert released(setting, broker) == SECRET
    broker.close()


def test_both_put_back_while_a_broker_runs_is_noticed(setting: Setting, broker: Broker) -> None:
    """It remembers the last generation that it read."""
    anchor = setting.directory.keys / "generation"
    last = anchor.read_text()
    with tampering(setting) as db:
        rows = db.execute("SELECT * FROM row").fetchall()
        manifest = db.execute("SELECT * FROM manifest").fetchall()
    setting.directory.put(Kind.POLICY, "alice", "strict", POLICY + b"key-size = 256\n")
    assert broker.check() == 6
    with tampering(setting) as db:
        db.execute("DELETE FROM row")
        db.executemany("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?)", rows)
        db.executemany("INSERT OR REPLACE INTO manifest VALUES (?, ?, ?)", manifest)
    anchor.write_text(last)
    cookie, nonce = broker.challenge("alice/strict")
    denied(setting, lambda: broker.attest(cookie, setting.sent(nonce), CLIENT), 503, "store")


def test_mended_store_serves_again(setting: Setting, broker: Broker) -> None:
    with tampering(setting) as db:
        db.execute("UPDATE row SET version = version + 1 WHERE kind = 'trust'")
    with pytest.raises(StoreError):
        broker.check()
    with tampering(setting) as db:
        db.execute("UPDATE row SET version = version - 1 WHERE kind = 'trust'")
    assert released(setting, broker) == SECRET


def test_change_that_is_not_completed_is_none(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the database and the file beside the key leaves the change, and a broker."""

    def crash(_path: Path, _generation: int) -> None:
        raise OSError("crash")

    with monkeypatch.context() as patched:
        patched.setattr("mktme.broker.store._write_anchor", crash)
        with pytest.raises(OSError, match="crash"):
            setting.directory.put(Kind.RESOURCE, "alice", KEY_PATH, b"next", Terms("strict"))
    broker = setting.open()
    assert released(setting, broker) == b"next"
    broker.close()
    with setting.directory.open_store() as store:
        assert store.put(Kind.RESOURCE, "alice", KEY_PATH, b"3", Terms("strict")) == 7


def test_other_master_key(setting: Setting) -> None:
    path = setting.directory.keys / "master.key"
    path.write_bytes(os.urandom(MASTER_BYTES))
    with pytest.raises(StoreError, match="without the master key"):
        setting.open()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.chmod(0o640), "others have access"),
        (lambda path: path.write_bytes(b"x" * 31), "not 32 bytes"),
        (lambda path: path.write_bytes(b"x" * 33), "not 32 bytes"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["for others to read", "short", "long", "none"],
)
def test_master_key_that_is_none(
    setting: Setting, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(setting.directory.keys / "master.key")
    with pytest.raises(KeyMaterialError, match=message) as caught:
        setting.open()
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "x", "-1x"])
def test_last_generation_that_is_none(setting: Setting, content: str) -> None:
    (setting.directory.keys / "generation").write_text(content)
    with pytest.raises(StoreError, match="last generation"):
        setting.open()


def test_no_database(setting: Setting) -> None:
    setting.directory.database.unlink()
    with pytest.raises(StoreError):
        setting.open()
    assert not setting.directory.database.exists()


@pytest.mark.parametrize(
    ("kind", "tenant", "name", "data", "message"),
    [
        (Kind.RESOURCE, "alice", "key/vm1", b"x", "is no resource"),
        (Kind.RESOURCE, "alice", "a/b/..", b"x", "is no resource"),
        (Kind.RESOURCE, "alice", "a/b/c/d", b"x", "is no resource"),
        (Kind.RESOURCE, "alice", "a/b/é", b"x", "is no resource"),
        (Kind.RESOURCE, "alice", "a/b/c\n", b"x", "is no resource"),
        (Kind.RESOURCE, "Alice", "a/b/c", b"x", "is no name of a tenant"),
        (Kind.RESOURCE, "a/b", "a/b/c", b"x", "is no name of a tenant"),
        (Kind.RESOURCE, "alice", "a/b/c", b"", "1 to 65,536 bytes"),
        (Kind.RESOURCE, "alice", "a/b/c", bytes(SECRET_MAX_BYTES + 1), "1 to 65,536 bytes"),
        (Kind.RESOURCE, "bob", "a/b/c", b"x", "tenant bob has no policy strict"),
        (Kind.POLICY, "alice", "a b", POLICY, "is no name of a policy"),
        (Kind.POLICY, "", "a", POLICY, "is no name of a tenant"),
    ],
)
def test_what_cannot_be_put(
    setting: Setting, kind: Kind, tenant: str, name: str, data: bytes, message: str
) -> None:
    terms = Terms("strict") if kind is Kind.RESOURCE else None
    with pytest.raises(BrokerSetupError, match=message):
        setting.directory.put(kind, tenant, name, data, terms)
    with setting.directory.open_store() as store:
        assert store.contents().generation == 5


def test_documents_are_read_before_they_are_kept(setting: Setting) -> None:
    with pytest.raises(PolicyError):
        setting.directory.put(Kind.POLICY, "alice", "strict", b"integrty = true")
    with pytest.raises(ValueError, match="PEM"):
        setting.directory.put(Kind.TRUST, "alice", "platforms", b"none")
    with setting.directory.open_store() as store:
        assert store.contents().generation == 5


def test_policy_that_is_needed_is_not_removed(setting: Setting) -> None:
    with pytest.raises(BrokerSetupError, match=f"resource {KEY_PATH} needs policy strict"):
        setting.directory.remove(Kind.POLICY, "alice", "strict")
    with pytest.raises(BrokerSetupError, match="has no policy lax"):
        setting.directory.remove(Kind.POLICY, "alice", "lax")
    setting.directory.remove(Kind.RESOURCE, "alice", KEY_PATH)
    setting.directory.remove(Kind.POLICY, "alice", "strict")


def test_version_of_a_row_that_was_removed_is_not_used_again(setting: Setting) -> None:
    def version() -> int:
        with setting.directory.open_store() as store:
            row = store.contents().resource("alice", KEY_PATH)
        assert row is not None
        return row.version

    first = version()
    setting.directory.remove(Kind.RESOURCE, "alice", KEY_PATH)
    setting.directory.put(Kind.RESOURCE, "alice", KEY_PATH, SECRET, Terms("strict"))
    assert version() > first


def test_two_administrators_at_once(setting: Setting) -> None:
    with setting.directory.open_store() as one, setting.directory.open_store() as other:
        assert one.put(Kind.RESOURCE, "alice", "a/b/1", b"1", Terms("strict")) == 6
        assert other.put(Kind.RESOURCE, "alice", "a/b/2", b"2", Terms("strict")) == 7
        assert {path for _, _, path in one.contents().rows} >= {"a/b/1", "a/b/2"}


def test_database_is_not_made_over_another(setting: Setting) -> None:
    key = MasterKey(bytes(MASTER_BYTES))
    with pytest.raises(BrokerSetupError, match="exists"):
        Store.create(setting.directory.database, setting.directory.keys / "generation", key)


def test_seal_is_for_its_place() -> None:
    sealer = Sealer(bytes(32))
    sealed = sealer.seal(b"secret", ("a", 1))
    assert sealer.open(sealed, ("a", 1)) == b"secret"
    for data, place in ((sealed, ("a", 2)), (sealed[:-1], ("a", 1)), (b"", ("a", 1))):
        with pytest.raises(SealError):
            sealer.open(data, place)
    assert sealer.seal(b"secret", ("a", 1)) != sealed


def test_derived_keys_differ() -> None:
    master = MasterKey(bytes(range(32)))
    keys = {master.derive("rows"), master.derive("manifest"), master.derive("rows", b"salt")}
    assert len(keys) == 3
    assert bytes(range(32)).hex() not in repr(master)
    # HKDF-SHA256 by hand (RFC 5869).
    import hmac

    extracted = hmac.digest(bytes(32), bytes(range(32)), "sha256")
    expanded = hmac.digest(extracted, b"mktme broker 1 rows\x01", "sha256")
    assert master.derive("rows") == expanded
