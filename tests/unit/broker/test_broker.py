# SPDX-License-Identifier: GPL-2.0-or-later
"""What the broker releases, and what it refuses: in no refusal does a secret leave it."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwt

from mktme.attest.claims import (
    Component,
    Evidence,
    ExceptionKind,
    Launch,
    PageException,
    RecipientKey,
)
from mktme.attest.jwe import open_jwe
from mktme.broker.broker import Broker
from mktme.broker.errors import AuditError, DeniedError
from mktme.broker.sessions import LIFETIME_S
from mktme.broker.store import Contents, Kind, Row, Terms
from mktme.engine.tme import TmeActivate
from mktme.engine.xts import Algorithm

from ..attest.signing import VM, Platform
from .setting import CLIENT, KEY_PATH, LAX, POLICY, SECRET, Setting, pem

OTHER_VM: Final = UUID("3f6ae9a2-7d70-4a4f-9a52-7b1a6a1f5a02")


def with_vm(**changes: Any) -> Callable[[Evidence], Evidence]:
    """Evidence in which the VM is another."""

    def change(evidence: Evidence) -> Evidence:
        return dataclasses.replace(
            evidence, vms=(dataclasses.replace(evidence.vms[0], **changes), *evidence.vms[1:])
        )

    return change


def with_(**changes: Any) -> Callable[[Evidence], Evidence]:
    """Evidence in which the platform is another."""
    return lambda evidence: dataclasses.replace(evidence, **changes)


def tme(**changes: Any) -> Callable[[Evidence], Evidence]:
    def change(evidence: Evidence) -> Evidence:
        return dataclasses.replace(evidence, tme=dataclasses.replace(evidence.tme, **changes))

    return change


# --- what is released -------------------------------------------------------------------------


def test_secret_is_released_to_the_recipient_in_the_evidence(
    setting: Setting, broker: Broker
) -> None:
    sealed = broker.release(setting.attested(broker), KEY_PATH, CLIENT)
    assert set(sealed) == {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
    header = json.loads(base64.urlsafe_b64decode(sealed["protected"] + "=="))
    assert (header["alg"], header["enc"]) == ("ECDH-ES+A256KW", "A256GCM")
    assert header["epk"]["crv"] == "P-256"  # in the header that is authenticated
    assert setting.opened(sealed) == SECRET
    # Each release is encrypted anew.
    again = broker.release(setting.attested(broker), KEY_PATH, CLIENT)
    assert again["encrypted_key"] != sealed["encrypted_key"]
    assert again["ciphertext"] != sealed["ciphertext"]


def test_token_is_an_ear_for_this_session_and_recipient(setting: Setting, broker: Broker) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce)
    same_cookie, token = broker.attest(cookie, sent, CLIENT)
    assert same_cookie == cookie
    found = jwt.decode(token, setting.signer(), algorithms=["ES256"])
    claims = found.claims
    assert claims["iss"] == "mktme-broker"
    assert claims["iat"] == int(setting.clock.now.timestamp())
    assert claims["exp"] - claims["iat"] == LIFETIME_S
    assert claims["eat_nonce"] == base64.urlsafe_b64encode(nonce).decode().rstrip("=")
    assert claims["submods"][str(VM)]["ear.status"] == "affirming"
    jwk = claims["cnf"]["jwk"]
    assert base64.urlsafe_b64decode(jwk["x"] + "=") == sent.key.x
    assert claims["sid"] not in cookie
    other = setting.attested(broker)
    assert other != cookie
    assert "reason" not in json.dumps(claims)


def test_resource_needs_its_own_policy(setting: Setting, broker: Broker) -> None:
    """What was attested by a lax policy gets what needs only that."""
    setting.directory.put(Kind.POLICY, "alice", "lax", LAX)
    reference = setting.platform.reference().encode()
    setting.directory.put(Kind.REFERENCE, "alice", "lax", reference)
    setting.directory.put(Kind.RESOURCE, "alice", "alice/motd/1", b"hello", Terms("lax"))
    weak = with_vm(integrity=False, algorithm=Algorithm.AES_XTS_128)
    cookie = setting.attested(broker, "alice/lax", evidence=weak)
    assert setting.opened(broker.release(cookie, "alice/motd/1", CLIENT)) == b"hello"
    denied(setting, lambda: broker.release(cookie, KEY_PATH, CLIENT), 403, "integrity")


def test_resource_of_one_vm(setting: Setting, broker: Broker) -> None:
    put = setting.directory.put
    put(Kind.RESOURCE, "alice", "alice/key/by-name", b"1", Terms("strict", "alice"))
    put(Kind.RESOURCE, "alice", "alice/key/by-uuid", b"2", Terms("strict", str(VM)))
    put(Kind.RESOURCE, "alice", "alice/key/not-hers", b"3", Terms("strict", str(OTHER_VM)))
    cookie = setting.attested(broker)
    assert setting.opened(broker.release(cookie, "alice/key/by-name", CLIENT)) == b"1"
    assert setting.opened(broker.release(cookie, "alice/key/by-uuid", CLIENT)) == b"2"
    denied(setting, lambda: broker.release(cookie, "alice/key/not-hers", CLIENT), 403, "binding")


def test_administrators_changes_count_at_once(setting: Setting, broker: Broker) -> None:
    cookie = setting.attested(broker)
    setting.directory.put(Kind.RESOURCE, "alice", KEY_PATH, b"the next", Terms("strict"))
    assert setting.opened(broker.release(cookie, KEY_PATH, CLIENT)) == b"the next"
    setting.directory.put(Kind.POLICY, "alice", "strict", POLICY + b"key-size = 256\n")
    denied(setting, lambda: broker.release(cookie, KEY_PATH, CLIENT), 403, "key-size")
    setting.directory.remove(Kind.RESOURCE, "alice", KEY_PATH)
    denied(setting, lambda: broker.release(cookie, KEY_PATH, CLIENT), 404)


# --- what is refused --------------------------------------------------------------------------


def denied(setting: Setting, ask: Callable[[], object], status: int, *checks: str) -> DeniedError:
    """What is asked for is refused for these checks, and nothing tells more than their names."""
    with pytest.raises(DeniedError) as caught:
        ask()
    error = caught.value
    assert (error.status, error.checks) == (status, checks)
    assert re.fullmatch(r"[a-z ',;]+", str(error))  # one of few sentences, without anything's name
    assert error.hint is None
    record = setting.records()[-1]
    assert record["outcome"] == error.kind
    assert [one["name"] for one in record.get("checks", ())] == list(checks)
    assert all(one["reason"] for one in record.get("checks", ()))
    return error


REFUSED: Final[dict[str, tuple[Callable[[Evidence], Evidence], tuple[str, ...]]]] = {
    "evidence for another nonce": (with_(nonce=bytes(32)), ("freshness",)),
    "another VM's": (with_vm(uuid=OTHER_VM), ("vm",)),
    "changed command line": (
        with_vm(
            launch=Launch(
                (Component("command-line", b"\x12" * 32), Component("kernel", b"\x22" * 32))
            )
        ),
        ("launch:command-line",),
    ),
    "further image": (
        with_vm(
            launch=Launch(
                (
                    Component("command-line", b"\x11" * 32),
                    Component("disk", b"\x44" * 32),
                    Component("kernel", b"\x22" * 32),
                )
            )
        ),
        ("launch:disk",),
    ),
    "changed engine": (with_(code=b"\x34" * 32), ("code",)),
    "TME not locked": (
        tme(activate=TmeActivate(enable=True, keyid_bits=6, algorithms=7).encode()),
        ("locked",),
    ),
    "exclusion range": (tme(exclude_mask=(1 << 11) | 0x3FFFF00000000), ("exclusion",)),
    "no integrity": (with_vm(integrity=False, algorithm=Algorithm.AES_XTS_128), ("integrity",)),
    "shadow, which misses what devices write": (
        with_vm(datapath="shadow", trackers=("stores",)),
        ("data-path",),
    ),
    "shared pages": (
        with_vm(
            exceptions=(
                PageException(kind=ExceptionKind.SHARED, ram_offset=0, size_bytes=4096, keyid=0),
            )
        ),
        ("exceptions",),
    ),
    "memory no longer followed": (with_vm(fault="the window is lost"), ("fault",)),
}


@pytest.mark.parametrize(("change", "checks"), REFUSED.values(), ids=REFUSED.keys())
def test_evidence_that_does_not_pass(
    setting: Setting,
    broker: Broker,
    change: Callable[[Evidence], Evidence],
    checks: tuple[str, ...],
) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce, change)
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, *checks)
    no_session(setting, broker, cookie)


def no_session(setting: Setting, broker: Broker, cookie: str) -> None:
    denied(setting, lambda: broker.release(cookie, KEY_PATH, CLIENT), 401, "session")


def test_replayed_nonce(setting: Setting, broker: Broker) -> None:
    """The same request once more, as somebody on the way could send it."""
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce)
    broker.attest(cookie, sent, CLIENT)
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, "freshness")


def test_replayed_evidence_in_a_new_session(setting: Setting, broker: Broker) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    old = setting.sent(nonce)
    broker.attest(cookie, old, CLIENT)
    cookie, nonce = broker.challenge("alice/strict")
    # With the nonce that it is for, and with the one that was asked with.
    denied(setting, lambda: broker.attest(cookie, old, CLIENT), 401, "freshness")
    cookie, nonce = broker.challenge("alice/strict")
    sent = dataclasses.replace(old, nonce=nonce)
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, "freshness")
    no_session(setting, broker, cookie)


def test_failed_attempt_uses_the_nonce_up(setting: Setting, broker: Broker) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    bad = setting.sent(nonce, evidence=with_vm(fault="lost"))
    denied(setting, lambda: broker.attest(cookie, bad, CLIENT), 401, "fault")
    good = setting.sent(nonce)
    denied(setting, lambda: broker.attest(cookie, good, CLIENT), 401, "freshness")
    no_session(setting, broker, cookie)


def test_old_nonce_after_a_restart_and_at_another_worker(setting: Setting, broker: Broker) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    unused, its_nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce)
    broker.attest(cookie, sent, CLIENT)
    other = setting.open()
    denied(setting, lambda: other.attest(cookie, sent, CLIENT), 401, "freshness")
    # What another worker attested is everybody's, and so is a challenge.
    assert setting.opened(other.release(cookie, KEY_PATH, CLIENT)) == SECRET
    other.attest(unused, setting.sent(its_nonce), CLIENT)
    other.close()
    broker.close()
    anew = setting.open()
    denied(setting, lambda: anew.attest(cookie, sent, CLIENT), 401, "freshness")
    anew.close()


def test_database_of_sessions_is_lost(setting: Setting, broker: Broker) -> None:
    """Then nobody knows which nonces served: none does any more."""
    cookie, nonce = broker.challenge("alice/strict")
    broker.close()
    (path,) = setting.directory.path.glob("sessions-*.db")
    path.unlink()
    anew = setting.open()
    denied(setting, lambda: anew.attest(cookie, setting.sent(nonce), CLIENT), 401, "session")
    anew.close()


def test_session_expires(setting: Setting, broker: Broker) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce)
    attested = setting.attested(broker)
    setting.clock.pass_(LIFETIME_S)
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, "session")
    no_session(setting, broker, attested)
    setting.clock.pass_(-LIFETIME_S - 3600)  # the broker's clock was put back
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, "session")


@pytest.mark.parametrize(
    ("seconds", "passes"), [(31, False), (30, True), (-330, True), (-331, False)]
)
def test_clock_skew(setting: Setting, broker: Broker, seconds: int, passes: bool) -> None:
    """Evidence may be 30 s from now and 300 s old; and clocks differ by 30 s."""
    at = int((setting.clock.now + dt.timedelta(seconds=seconds)).timestamp())
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce, with_(issued_at=at))
    if passes:
        broker.attest(cookie, sent, CLIENT)
        return
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, "time")
    no_session(setting, broker, cookie)


def test_expired_certificate(setting: Setting, broker: Broker) -> None:
    setting.clock.pass_(31 * 24 * 3600)
    cookie, nonce = broker.challenge("alice/strict")
    denied(setting, lambda: broker.attest(cookie, setting.sent(nonce), CLIENT), 401, "chain")


def test_forged_evidence(setting: Setting, broker: Broker) -> None:
    """A bit is another, somewhere; where it is in the certificate, that is another's."""
    cookie, nonce = broker.challenge("alice/strict")
    evidence = setting.sent(nonce).evidence
    step = len(evidence) // 64
    for at in range(1, len(evidence), step):
        cookie, nonce = broker.challenge("alice/strict")
        sent = setting.sent(nonce)
        forged = bytearray(sent.evidence)
        forged[at] ^= 1
        sent = dataclasses.replace(sent, evidence=bytes(forged))
        with pytest.raises(DeniedError) as caught:
            broker.attest(cookie, sent, CLIENT)
        assert caught.value.status == 401
        assert set(caught.value.checks) <= {"format", "signature", "chain"}
        no_session(setting, broker, cookie)


@pytest.mark.parametrize("evidence", [b"\0", b"\xd2\x84", b"\x9f" * 5000, b"[" * 100_000])
def test_evidence_that_is_none(setting: Setting, broker: Broker, evidence: bytes) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce)
    sent = dataclasses.replace(sent, evidence=evidence)
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, "format")
    # Of what nobody vouches for, nothing is in the log.
    assert not {"name", "keyid", "ueid"} & setting.records()[-1].keys()


def test_foreign_chain(setting: Setting, broker: Broker, foreign: Platform) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce, platform=foreign)
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, "chain")
    assert not {"name", "keyid", "ueid"} & setting.records()[-1].keys()
    no_session(setting, broker, cookie)


@pytest.mark.parametrize("selector", ["mallory/strict", "alice/none", "default/default"])
def test_policy_that_does_not_exist_is_as_a_foreign_chain(
    setting: Setting, broker: Broker, selector: str, foreign: Platform
) -> None:
    refusals = []
    for one, platform in ((selector, setting.platform), ("alice/strict", foreign)):
        cookie, nonce = broker.challenge(one)
        sent = setting.sent(nonce, platform=platform)
        attest = functools.partial(broker.attest, cookie, sent, CLIENT)
        error = denied(setting, attest, 401, "chain")
        refusals.append((str(error), error.kind))
    assert refusals[0] == refusals[1]


def test_key_of_a_man_in_the_middle(setting: Setting, broker: Broker) -> None:
    """He has good evidence, and a key of his own."""
    his = RecipientKey.of(ec.generate_private_key(ec.SECP256R1()).public_key())
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce, key=his)
    denied(setting, lambda: broker.attest(cookie, sent, CLIENT), 401, "recipient-key")
    no_session(setting, broker, cookie)


def test_man_in_the_middle_can_read_nothing(setting: Setting, broker: Broker) -> None:
    """He relays all of it: what he gets is for the VM's engine."""
    sealed = broker.release(setting.attested(broker), KEY_PATH, CLIENT)
    with pytest.raises(Exception, match=r"(?i)unwrap|decrypt|invalid"):
        setting.opened(sealed, Platform())


def test_other_tenants_resources_do_not_exist(
    setting: Setting, broker: Broker, platform: Platform
) -> None:
    put = setting.directory.put
    put(Kind.TRUST, "bob", "platforms", pem(platform))
    put(Kind.POLICY, "bob", "strict", POLICY)
    put(Kind.REFERENCE, "bob", "strict", platform.reference().encode())
    put(Kind.RESOURCE, "bob", "bob/key/1", b"bob's", Terms("strict"))
    cookie = setting.attested(broker)
    theirs = denied(setting, lambda: broker.release(cookie, "bob/key/1", CLIENT), 404)
    nobodys = denied(setting, lambda: broker.release(cookie, "bob/key/2", CLIENT), 404)
    assert str(theirs) == str(nobodys)
    bobs = setting.attested(broker, "bob/strict")
    denied(setting, lambda: broker.release(bobs, KEY_PATH, CLIENT), 404)
    assert setting.opened(broker.release(bobs, "bob/key/1", CLIENT)) == b"bob's"


def test_cookies_that_are_none(setting: Setting, broker: Broker, tmp_path: Path) -> None:
    cookie, nonce = broker.challenge("alice/strict")
    sent = setting.sent(nonce)
    other = Setting.make(tmp_path / "other", setting.platform)
    elsewhere = other.open()
    theirs, _ = elsewhere.challenge("alice/strict")
    elsewhere.close()
    changed = ("A" if cookie[0] != "A" else "B") + cookie[1:]
    for one in (None, "", "x", "é", cookie + "=", cookie + "A", cookie[:-8], changed, theirs):
        attest = functools.partial(broker.attest, one, sent, CLIENT)
        denied(setting, attest, 401, "session")
    broker.attest(cookie, sent, CLIENT)


def test_refused_clients_leave_room_for_others(setting: Setting) -> None:
    broker = setting.open(most=1)
    for _ in range(3):
        cookie, _nonce = broker.challenge("alice/strict")
        sent = setting.sent(bytes(32))  # another nonce than the session's
        denied(setting, functools.partial(broker.attest, cookie, sent, CLIENT), 401, "freshness")
    assert setting.opened(broker.release(setting.attested(broker), KEY_PATH, CLIENT)) == SECRET


def test_sessions_are_bounded(setting: Setting) -> None:
    broker = setting.open(most=2)
    first, _second = setting.attested(broker), setting.attested(broker)
    cookie, nonce = broker.challenge("alice/strict")
    denied(setting, lambda: broker.attest(cookie, setting.sent(nonce), CLIENT), 503, "sessions")
    assert setting.opened(broker.release(first, KEY_PATH, CLIENT)) == SECRET
    setting.clock.pass_(LIFETIME_S + 1)
    setting.attested(broker)
    broker.close()


# --- what is recorded -------------------------------------------------------------------------


def test_record_of_a_release(setting: Setting, broker: Broker) -> None:
    cookie = setting.attested(broker)
    broker.release(cookie, KEY_PATH, CLIENT)
    *_, attested, released = setting.records()
    common = {
        "time": "2027-03-04T05:06:07.000Z",
        "outcome": "done",
        "client": CLIENT,
        "tenant": "alice",
        "policy": "strict",
        "vm": str(VM),
        "name": "alice",
        "keyid": 1,
        "ueid": setting.platform.identity.ueid.hex(),
        "generation": 5,
        "policy_version": 3,
    }
    session = attested.pop("session")
    assert len(session) == 16
    assert attested == {"event": "attest", **common}
    assert released == {
        "event": "release",
        "session": session,
        "resource": KEY_PATH,
        "resource_version": 5,
        **common,
    }


def test_what_cannot_be_recorded_is_not_released(setting: Setting, broker: Broker) -> None:
    cookie = setting.attested(broker)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, broker._audit._file)
        with pytest.raises(AuditError, match="No space left"):
            broker.release(cookie, KEY_PATH, CLIENT)
    finally:
        os.close(full)


def test_who_has_no_session_does_not_fill_the_log(setting: Setting, broker: Broker) -> None:
    before = len(setting.records())
    for _ in range(200):
        with pytest.raises(DeniedError):
            broker.release(None, KEY_PATH, CLIENT)
    assert 100 <= len(setting.records()) - before < 200
    cookie = setting.attested(broker)  # whose records are all there
    assert setting.records()[-1]["event"] == "attest"
    denied(setting, lambda: broker.release(cookie, "alice/key/none", CLIENT), 404)


def test_secret_is_overwritten_once_it_is_encrypted(
    setting: Setting, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def watched(contents: Contents, row: Row) -> bytes:
        opened.append(real(contents, row))
        return opened[-1]

    real = Contents.open
    cookie = setting.attested(broker)
    monkeypatch.setattr(Contents, "open", watched)
    sealed = broker.release(cookie, KEY_PATH, CLIENT)
    assert [bytes(one) for one in opened] == [bytes(len(SECRET))]
    assert setting.opened(sealed) == SECRET


def test_engine_opens_what_is_released(setting: Setting, broker: Broker) -> None:
    """The engine's own code, which reads no more than it has to."""
    sealed = broker.release(setting.attested(broker), KEY_PATH, CLIENT)
    answer = json.dumps(sealed).encode()
    with open_jwe(answer, setting.platform.recipient, len(SECRET)) as secret:
        assert bytes(secret.view) == SECRET


def test_names_in_the_log_deceive_nobody(setting: Setting, broker: Broker) -> None:
    """A platform chooses its VMs' names."""
    setting.attested(broker, evidence=with_vm(name="bob\u202emoc"))
    (line,) = setting.directory.audit_log.read_bytes().splitlines()[-1:]
    assert "\u202e" not in line.decode()
    assert json.loads(line)["name"] == "bob\N{REPLACEMENT CHARACTER}moc"


def test_no_secret_in_any_file(setting: Setting, broker: Broker) -> None:
    """What is written down while secrets are released; and that this test would find one."""
    cookie = setting.attested(broker)
    sealed = broker.release(cookie, KEY_PATH, CLIENT)
    denied(setting, lambda: broker.release("", KEY_PATH, CLIENT), 401, "session")
    master = (setting.directory.keys / "master.key").read_bytes()
    files = [one for one in setting.directory.path.rglob("*") if one.is_file()]
    assert len(files) > 6
    for path in files:
        content = path.read_bytes()
        assert SECRET[:16] not in content
        assert (master in content) == (path.name == "master.key")
        assert cookie.encode() not in content
    assert SECRET[:16] in setting.opened(sealed)
