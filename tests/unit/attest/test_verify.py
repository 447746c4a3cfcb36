# SPDX-License-Identifier: GPL-2.0-or-later
"""The appraisal: what is affirmed, and which check each forgery and weakness fails."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any
from uuid import uuid4

import pytest

from mktme.attest.claims import (
    Component,
    DebugStatus,
    ExceptionKind,
    KeySource,
    Launch,
    PageException,
)
from mktme.attest.errors import AttestationError
from mktme.attest.identity import Trust
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.attest.result import RefusedError, Verdict, ear
from mktme.engine.keys import KeyMode
from mktme.engine.tme import TmeActivate
from mktme.engine.xts import Algorithm

from .signing import NONCE, NOW, POLICY, VM, Platform


def failed(appraisal: Any) -> list[str]:
    return [check.name for check in appraisal.failed]


def test_true_evidence_is_affirmed(platform: Platform) -> None:
    appraisal = platform.appraise(platform.sign())
    assert failed(appraisal) == []
    assert appraisal.verdict is Verdict.AFFIRMING
    assert appraisal.evidence == platform.evidence()
    assert [check.name for check in appraisal.checks] == [
        "format", "signature", "chain", "freshness", "time", "vm", "locked", "exclusion", "debug",
        "code", "launch:command-line", "launch:kernel", "key-size", "key-mode", "key-source",
        "data-path", "integrity", "exceptions", "fault", "vtpm",
        "vtpm:quote",
    ]  # fmt: skip
    appraisal.require()


def test_of_two_vms_one_is_named(platform: Platform) -> None:
    other = platform.vm(uuid=uuid4(), keyid=2)
    token = platform.sign(
        platform.evidence(*sorted((platform.vm(), other), key=lambda vm: vm.uuid.bytes))
    )
    assert failed(platform.appraise(token)) == []
    assert failed(platform.appraise(token, vm=None)) == ["vm"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("freshness", {"nonce": bytes(32)}),
        ("time", {"now": NOW + dt.timedelta(seconds=331)}),
        ("time", {"now": NOW - dt.timedelta(seconds=31)}),
        ("vm", {"vm": uuid4()}),
        ("report-data", {"report_data": b"\x01" * 64}),
        ("chain", {"now": NOW + dt.timedelta(days=31)}),
        ("chain", {"now": NOW - dt.timedelta(days=1)}),
        ("chain", {"trust": Trust(())}),
        ("chain", {"trust": Platform().trust}),
        ("code", {"reference": Reference(frozenset(), {})}),
        ("vtpm", {"policy": dataclasses.replace(POLICY, vtpm=True)}),
        ("vtpm:quote", {"policy": dataclasses.replace(POLICY, quote=True)}),
        ("key-size", {"policy": dataclasses.replace(POLICY, key_size=256)}),
    ],
)
def test_what_is_asked_for_and_is_not_so_is_refused(
    platform: Platform, name: str, changes: dict[str, Any]
) -> None:
    appraisal = platform.appraise(platform.sign(), **changes)
    assert name in failed(appraisal)
    assert appraisal.verdict is Verdict.CONTRAINDICATED
    with pytest.raises(RefusedError) as refused:
        appraisal.require()
    assert refused.value.checks == appraisal.failed
    reasons = [check.reason for check in appraisal.failed]
    assert not any(reason in str(refused.value) for reason in reasons)


@pytest.mark.parametrize("seconds", [-30, 0, 330])
def test_skew_and_lifetime_are_allowed_to_the_second(platform: Platform, seconds: int) -> None:
    appraisal = platform.appraise(platform.sign(), now=NOW + dt.timedelta(seconds=seconds))
    assert failed(appraisal) == []


def launch(
    kernel: bytes = b"\x22", command_line: bytes | None = b"\x11", initrd: bytes | None = None
) -> Launch:
    """That of `Platform.vm`, but for what differs."""
    names = {"command-line": command_line, "initrd": initrd, "kernel": kernel}
    return Launch(tuple(Component(name, one * 32) for name, one in names.items() if one))


_EXCEPTION = PageException(kind=ExceptionKind.SHARED, ram_offset=4096, size_bytes=8192, keyid=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("launch:kernel", {"launch": launch(kernel=b"\x23")}),
        ("launch:command-line", {"launch": launch(command_line=b"\x12")}),
        ("launch:initrd", {"launch": launch(initrd=b"\x11")}),
        ("launch:command-line", {"launch": launch(command_line=None)}),
        ("key-mode", {"mode": KeyMode.NO_ENCRYPT}),
        ("key-mode", {"mode": KeyMode.PLATFORM}),
        ("key-size", {"algorithm": None}),
        ("key-source", {"source": KeySource.FILE}),
        ("data-path", {"datapath": "shadow", "trackers": ("pages", "stores")}),
        ("integrity", {"integrity": False}),
        ("exceptions", {"exceptions": (_EXCEPTION,)}),
        ("debug", {"debug": DebugStatus.ENABLED}),
        ("fault", {"fault": "its memory cannot be read"}),
    ],
)
def test_a_vm_that_is_not_as_demanded_is_refused(
    platform: Platform, name: str, changes: dict[str, Any]
) -> None:
    token = platform.sign(platform.evidence(platform.vm(**changes)))
    assert failed(platform.appraise(token)) == [name]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("locked", {"activate": TmeActivate(enable=True).encode()}),
        ("locked", {"activate": TmeActivate(lock=True).encode()}),
        ("exclusion", {"exclude_mask": 0x3FFFFFF00000 | 1 << 11}),
        ("exclusion", {"activate": TmeActivate(lock=True, enable=True, bypass=True).encode()}),
    ],
)
def test_a_platform_that_is_not_as_demanded_is_refused(
    platform: Platform, name: str, changes: dict[str, Any]
) -> None:
    evidence = platform.evidence()
    token = platform.sign(
        dataclasses.replace(evidence, tme=dataclasses.replace(evidence.tme, **changes))
    )
    assert failed(platform.appraise(token)) == [name]


def test_another_engines_memory_that_can_be_read_is_refused(platform: Platform) -> None:
    token = platform.sign(platform.evidence(debug=DebugStatus.ENABLED))
    assert failed(platform.appraise(token)) == ["debug"]


def test_a_lenient_policy_affirms_what_it_allows(platform: Platform) -> None:
    policy = Policy(
        key_sources=frozenset(KeySource),
        data_paths=frozenset({"shadow"}),
        integrity=False,
        exceptions=frozenset({ExceptionKind.SHARED}),
        exceptions_max=8192,
        exclusion_range=True,
        debug=True,
    )
    vm = platform.vm(
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.DIRECT,
        source=KeySource.FILE,
        datapath="shadow",
        trackers=("pages", "stores"),
        integrity=False,
        exceptions=(_EXCEPTION,),
        debug=DebugStatus.ENABLED,
    )
    token = platform.sign(platform.evidence(vm))
    assert failed(platform.appraise(token, policy=policy)) == []
    less = dataclasses.replace(policy, exceptions_max=8191)
    assert failed(platform.appraise(token, policy=less)) == ["exceptions"]


def test_stores_alone_are_a_warning(platform: Platform) -> None:
    vm = platform.vm(datapath="shadow", trackers=("stores",))
    policy = dataclasses.replace(POLICY, data_paths=frozenset({"shadow"}))
    appraisal = platform.appraise(platform.sign(platform.evidence(vm)), policy=policy)
    assert failed(appraisal) == ["data-path"]
    assert appraisal.verdict is Verdict.WARNING
    with pytest.raises(AttestationError, match="data-path"):
        appraisal.require()


def test_every_changed_byte_is_noticed(platform: Platform) -> None:
    token = platform.sign()
    for position in range(0, len(token), 7):
        forged = bytearray(token)
        forged[position] ^= 0x40
        appraisal = platform.appraise(bytes(forged))
        assert appraisal.evidence is None, position
        assert appraisal.failed[0].name in ("format", "signature", "chain")


def test_a_platform_cannot_speak_for_another(platform: Platform) -> None:
    token = platform.sign(platform.evidence(ueid=b"\x01" + bytes(32)))
    appraisal = platform.appraise(token)
    assert failed(appraisal) == ["chain"]
    assert appraisal.evidence is None


def test_an_ear_has_the_words_of_its_draft(platform: Platform) -> None:
    result = ear(platform.appraise(platform.sign()))
    submodule = result["submods"][str(VM)]
    assert submodule["ear.status"] == "affirming"
    assert submodule["ear.appraisal-policy-id"] == "strict"
    assert set(submodule["ear.trustworthiness-vector"].values()) == {2}
    assert result["iat"] == int(NOW.timestamp())
    assert result["eat_nonce"] == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    refused = ear(platform.appraise(b"", nonce=NONCE))["submods"][str(VM)]
    assert refused["ear.status"] == "contraindicated"
    assert refused["ear.trustworthiness-vector"] == {
        "instance-identity": 96, "configuration": 0, "executables": 0, "hardware": 0,
        "runtime-opaque": 0,
    }  # fmt: skip
