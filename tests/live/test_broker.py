# SPDX-License-Identifier: GPL-2.0-or-later
"""A broker's key in a live VM: evidence of its engine, for a key that nobody between can read."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator

import pytest

from mktme.attest.claims import Evidence, KeySource, VmClaims, decode_claims
from mktme.attest.reference import Reference
from mktme.attest.token import Token
from mktme.broker.directory import BrokerDirectory, create
from mktme.broker.errors import DeniedError
from mktme.broker.store import Kind, Terms
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.transparency import compare_memory
from mktme.pytest_plugin import vm_config
from mktme.service.client import EngineRefusedError
from mktme.vm.platform import Platform, Vm

from ..unit.broker.server import Server, serving

MIB = 1 << 20
INTEGRITY = Algorithm.AES_XTS_128_INTEGRITY
PATH = "alice/key/vm1"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> BrokerDirectory:
    return create(tmp_path_factory.mktemp("broker") / "broker")


@pytest.fixture(scope="module")
def server(directory: BrokerDirectory) -> Iterator[Server]:
    with serving(directory.path, "--workers", "1") as server:
        yield server


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform(2 * 192 * MIB) as platform:
        yield platform


def said(platform: Platform, vm: Vm) -> tuple[Evidence, VmClaims]:
    """What the engine says of a VM now."""
    token = Token.parse(platform.engine.evidence(secrets.token_bytes(32), vm.uuid))
    evidence = decode_claims(token.verify(token.key()))
    claims = evidence.vm(vm.uuid)
    assert claims is not None
    return evidence, claims


def furnish(directory: BrokerDirectory, platform: Platform, vm: Vm) -> bytes:
    """Alice takes this VM as it is for good, and has a key for it; returns that."""
    key = secrets.token_bytes(INTEGRITY.key_bytes)
    root = platform.engine.identity().root.encode()
    directory.put(Kind.TRUST, "alice", "platforms", root)
    for name, text in (("strict", b""), ("long-keys", b"key-size = 256\n")):
        directory.put(Kind.POLICY, "alice", name, text)
        directory.put(Kind.REFERENCE, "alice", name, Reference.of(*said(platform, vm)).encode())
    directory.put(Kind.RESOURCE, "alice", PATH, key, Terms("strict", str(vm.uuid)))
    return key


def test_key_of_a_broker(directory: BrokerDirectory, server: Server, platform: Platform) -> None:
    """Before the VM's first instruction; then it boots, and its memory is under that key."""
    # The store tracker tells that no instruction has run.
    config = vm_config(memory="192M", datapath="inline", track="stores", algorithm=INTEGRITY.value)
    with (
        platform.carry(uuid.uuid4(), config, "alice", boot=False) as vm,
        server.client() as client,
    ):
        key = furnish(directory, platform, vm)
        _, before = said(platform, vm)
        assert (before.mode, before.source, before.running) == (
            KeyMode.RANDOM,
            KeySource.RANDOM,
            False,
        )

        def evidence(nonce: bytes) -> bytes:
            return platform.engine.evidence(nonce, vm.uuid)

        # A policy that it does not pass.
        with pytest.raises(DeniedError) as denied:
            client.attest(vm.uuid, evidence, policy="alice/long-keys")
        assert denied.value.checks == ("key-size",)

        client.attest(vm.uuid, evidence, policy="alice/strict")
        jwe = client.resource(PATH)
        assert key not in jwe
        keyid = platform.engine.release_key(vm.uuid, jwe)
        _, after = said(platform, vm)
        assert (after.mode, after.source, after.keyid) == (
            KeyMode.DIRECT,
            KeySource.BROKER,
            keyid,
        )
        assert after.recipient_key != before.recipient_key
        # What was released once is nobody's any more, and old evidence is old.
        with pytest.raises(EngineRefusedError):
            platform.engine.release_key(vm.uuid, jwe)
        with pytest.raises(DeniedError) as denied:
            client.attest(vm.uuid, lambda _nonce: evidence(bytes(32)), policy="alice/strict")
        assert denied.value.checks == ("freshness",)

        vm.domain.boot(config.boot_deadline_s)
        with vm.held() as engine:
            assert compare_memory(vm, engine).passed
        _, running = said(platform, vm)
        assert (running.running, running.source) == (True, KeySource.BROKER)
