# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's part of attestation: claims are its live state, and released keys are taken in."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from mktme.attest.claims import (
    Component,
    DebugStatus,
    Evidence,
    ExceptionKind,
    KeySource,
    Launch,
    PageException,
    VmClaims,
)
from mktme.attest.errors import JweError, MeasurementError
from mktme.attest.identity import CertificateAuthority, Identity, load_trust, verify_chain
from mktme.attest.measure import Observation
from mktme.attest.token import Token, open_token
from mktme.datapath.shadow import Track
from mktme.engine.dram import Dram
from mktme.engine.errors import KeyIdError, KeyMaterialError, MktmeError
from mktme.engine.firmware import Exclusion, PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.pconfig import Command, encode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess, EngineRefusedError
from mktme.service.drains import Drains
from mktme.service.requests import Requests
from mktme.service.vms import Vm

from ...vectors import reference
from ..attest.test_jwe import seal
from .conftest import CUSTODY

PAGE = 4096
MIB = 1 << 20
NONCE = bytes(range(16))
LAUNCH = Launch((Component("kernel", b"\x01" * 32),))
TEXT = b"what the guest holds in memory  " * 2


class FakeLink:
    """A QEMU that is there, whose store tracker is not."""

    qemu_pid = os.getpid()

    def counters(self) -> None:
        return None

    def close(self) -> None:
        pass


class FakeObservation(Observation):
    """What was launched, without a process of it."""

    def measure(self, _digests: object) -> Launch:
        return LAUNCH


@dataclass
class Engine:
    """One in this process, with a VM of 1 MiB that looks as if it ran."""

    requests: Requests
    identity: Identity
    vm: Vm

    def ask(self, request: wire.Command) -> Coroutine[object, object, wire.Reply]:
        return self.requests.handle(request, None)

    async def evidence(self, **arguments: object) -> Evidence:
        request = wire.GetEvidence(nonce=NONCE, **arguments)  # type: ignore[arg-type]
        reply = await self.ask(request)
        assert isinstance(reply, wire.Evidence)
        key = self.identity.key.public_key()
        return open_token(reply.token, key)

    async def claims(self) -> VmClaims:
        claims = (await self.evidence(vm=self.vm.uuid)).vm(self.vm.uuid)
        assert claims is not None
        return claims

    async def release(self, key: bytes) -> int:
        jwe = seal(self.vm.recipient, "ECDH-ES", key).encode()
        reply = await self.ask(wire.ReleaseKey(vm=self.vm.uuid, jwe=jwe))
        assert isinstance(reply, wire.KeyProgrammed)
        return reply.keyid


@contextmanager
def engine(
    tmp_path: Path,
    config: PlatformConfig | None = None,
    *,
    algorithm: Algorithm = Algorithm.AES_XTS_256,
    key_file: Path | None = None,
    mode: KeyMode = KeyMode.RANDOM,
) -> Iterator[Callable[[Callable[[Engine], Coroutine[object, object, None]]], None]]:
    """Runs a test's coroutine with one."""

    async def run(test: Callable[[Engine], Coroutine[object, object, None]]) -> None:
        identity = Identity.create()
        drains = Drains(lambda _event: None)
        set_up = config or PlatformConfig()
        requests = Requests(dram, set_up, CUSTODY, drains, lambda _event: None, identity)
        uuid = uuid4()
        await requests.handle(
            wire.AddVm(
                vm=uuid,
                name="alice",
                memory_bytes=MIB,
                track=Track.STORES_AND_PAGES,
                algorithm=algorithm,
                mode=mode,
                key_file=None if key_file is None else str(key_file),
            ),
            None,
        )
        vm = requests.vms[uuid]
        observation = FakeObservation(Path("/proc/0"), {}, {}, {}, debuggable=False)
        vm.link, vm.observation = FakeLink(), observation  # type: ignore[assignment]
        await test(Engine(requests, identity, vm))

    with Dram.create(tmp_path / "dram", 8 * MIB) as dram:
        yield lambda test: asyncio.run(run(test))


def test_claims_are_what_the_engine_has(tmp_path: Path) -> None:
    async def check(one: Engine) -> None:
        said = await one.evidence()
        package = one.requests.package
        assert said.nonce == NONCE
        assert said.ueid == one.identity.ueid
        assert (said.tme.capability, said.tme.activate) == (
            package.rdmsr(0x981),
            package.rdmsr(0x982),
        )
        assert said.tme.locked
        claims = said.vms[0]
        assert claims.launch == LAUNCH
        assert (claims.keyid, claims.mode, claims.source) == (1, KeyMode.RANDOM, KeySource.RANDOM)
        assert claims.algorithm is Algorithm.AES_XTS_256
        assert (claims.datapath, claims.trackers) == ("shadow", ("pages", "stores"))
        assert claims.running  # nobody saw that it did not
        assert not claims.integrity
        assert claims.exceptions == ()
        assert claims.report_data == bytes(64)
        assert claims.recipient_key.public_key() == one.vm.recipient.public_key()
        assert (await one.evidence(report_data=b"\x07" * 64)).vms[0].report_data == b"\x07" * 64
        one.vm.fault = "its memory\nwent"
        assert (await one.claims()).fault == "its memory\\nwent"

    with engine(tmp_path) as run:
        run(check)


def test_pages_that_are_not_the_vms_own_are_told_of(tmp_path: Path) -> None:
    async def check(one: Engine) -> None:
        further = await one.ask(
            wire.ProgramKey(mode=KeyMode.RANDOM, algorithm=Algorithm.AES_XTS_128)
        )
        open_ = await one.ask(
            wire.ProgramKey(mode=KeyMode.NO_ENCRYPT, algorithm=Algorithm.AES_XTS_128)
        )
        assert isinstance(further, wire.KeyProgrammed)
        assert isinstance(open_, wire.KeyProgrammed)
        for page, keyid in ((1, 0), (3, further.keyid), (5, open_.keyid)):
            request = wire.AssignPages(
                vm=one.vm.uuid, ram_offset=page * PAGE, size_bytes=PAGE, keyid=keyid
            )
            await one.ask(request)
        kinds = (ExceptionKind.SHARED, ExceptionKind.FURTHER, ExceptionKind.UNENCRYPTED)
        assert (await one.claims()).exceptions == tuple(
            PageException(kind=kind, ram_offset=page * PAGE, size_bytes=PAGE, keyid=keyid)
            for kind, page, keyid in zip(
                kinds, (1, 3, 5), (0, further.keyid, open_.keyid), strict=True
            )
        )

    with engine(tmp_path) as run:
        run(check)


def test_shared_pages_in_an_exclusion_range_are_unencrypted(tmp_path: Path) -> None:
    async def check(one: Engine) -> None:
        await one.ask(wire.AssignPages(vm=one.vm.uuid, ram_offset=0, size_bytes=MIB, keyid=0))
        claims = await one.claims()
        assert one.vm.region.base == 0
        assert [(x.kind, x.ram_offset, x.size_bytes) for x in claims.exceptions] == [
            (ExceptionKind.SHARED, 0, 64 << 10),
            (ExceptionKind.UNENCRYPTED, 64 << 10, 64 << 10),
            (ExceptionKind.SHARED, 128 << 10, MIB - (128 << 10)),
        ]
        assert (await one.evidence()).tme.excludes

    config = PlatformConfig(exclusion=Exclusion(base=64 << 10, size_bytes=64 << 10))
    with engine(tmp_path, config) as run:
        run(check)


def test_memory_without_encryption_is_one_exception(tmp_path: Path) -> None:
    async def check(one: Engine) -> None:
        claims = await one.claims()
        assert (claims.algorithm, claims.mode) == (None, KeyMode.NO_ENCRYPT)
        assert claims.source is KeySource.NONE
        (found,) = claims.exceptions
        assert (found.kind, found.size_bytes) == (ExceptionKind.UNENCRYPTED, MIB)

    with engine(tmp_path, mode=KeyMode.NO_ENCRYPT) as run:
        run(check)


def key_of(path: Path, key: bytes) -> Path:
    path.touch(0o600)
    path.write_bytes(key)
    return path


def test_a_known_key_is_not_passed_off_as_another(tmp_path: Path) -> None:
    key = key_of(tmp_path / "key", secrets.token_bytes(64))

    async def check(one: Engine) -> None:
        assert (await one.claims()).source is KeySource.FILE
        await one.release(secrets.token_bytes(64))
        assert (await one.claims()).source is KeySource.BROKER
        # A raw PCONFIG puts a known key in its place.
        program = encode(one.vm.keyid, Command.SET_KEY_DIRECT, Algorithm.AES_XTS_256)
        raw = wire.ExecutePconfig(leaf=0, address=0, program=bytes(program), key_file=str(key))
        await one.ask(raw)
        assert (await one.claims()).source is KeySource.FILE
        # And one more clears it: as KeyID 0, whose key is not the VM's own.
        program = encode(one.vm.keyid, Command.CLEAR_KEY, Algorithm.AES_XTS_256)
        await one.ask(wire.ExecutePconfig(leaf=0, address=0, program=bytes(program)))
        claims = await one.claims()
        assert (claims.mode, claims.source) == (KeyMode.PLATFORM, KeySource.NONE)

    with engine(tmp_path, mode=KeyMode.DIRECT, key_file=key) as run:
        run(check)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_a_released_key_encrypts_what_the_vm_has(tmp_path: Path, algorithm: Algorithm) -> None:
    key, other = (secrets.token_bytes(algorithm.key_bytes) for _ in range(2))

    async def check(one: Engine) -> None:
        base, old = one.vm.region.base, one.vm.keyid
        one.requests.controller.write(base + 5 * PAGE, TEXT, old)
        await one.ask(wire.AssignPages(vm=one.vm.uuid, ram_offset=0, size_bytes=PAGE, keyid=0))
        recipient = one.vm.recipient
        keyid = await one.release(key)
        assert keyid == one.vm.keyid != old
        assert not one.requests.package.keys.is_programmed(old)
        claims = await one.claims()
        assert (claims.keyid, claims.mode) == (keyid, KeyMode.DIRECT)
        assert (claims.source, claims.algorithm) == (KeySource.BROKER, algorithm)
        assert [(x.kind, x.ram_offset) for x in claims.exceptions] == [(ExceptionKind.SHARED, 0)]
        assert one.vm.recipient is not recipient
        assert claims.recipient_key.public_key() == one.vm.recipient.public_key()
        address = base + 5 * PAGE
        line = Path(one.requests.dram.path).read_bytes()[address : address + 64]
        tweak = address.to_bytes(16, "little")
        assert reference.decrypt(key, tweak, line) == TEXT
        assert reference.decrypt(other, tweak, line) != TEXT  # control
        # And it goes with the VM, as any key does.
        await one.ask(wire.RemoveVm(vm=one.vm.uuid))
        assert not one.requests.package.keys.is_programmed(keyid)

    with engine(tmp_path, algorithm=algorithm) as run:
        run(check)


def test_a_jwe_is_taken_once_and_by_its_vm_alone(tmp_path: Path) -> None:
    async def check(one: Engine) -> None:
        keyid = one.vm.keyid
        jwe = seal(one.vm.recipient, secret=secrets.token_bytes(64)).encode()
        strange = seal(ec.generate_private_key(ec.SECP256R1())).encode()
        short = seal(one.vm.recipient, secret=secrets.token_bytes(32)).encode()
        weak = seal(one.vm.recipient, secret=bytes(64)).encode()
        for bad, error in (
            (strange, JweError),
            (short, JweError),
            (b"nothing", JweError),
            (weak, KeyMaterialError),
        ):
            with pytest.raises(error):
                await one.ask(wire.ReleaseKey(vm=one.vm.uuid, jwe=bad))
            assert one.vm.keyid == keyid
            assert (await one.claims()).source is KeySource.RANDOM
        await one.ask(wire.ReleaseKey(vm=one.vm.uuid, jwe=jwe))
        with pytest.raises(JweError):
            await one.ask(wire.ReleaseKey(vm=one.vm.uuid, jwe=jwe))
        with pytest.raises(MktmeError, match="no VM"):
            await one.ask(wire.ReleaseKey(vm=uuid4(), jwe=jwe))

    with engine(tmp_path) as run:
        run(check)


def test_without_a_free_keyid_nothing_changes(tmp_path: Path) -> None:
    async def check(one: Engine) -> None:
        with pytest.raises(KeyIdError, match="taken"):
            await one.release(secrets.token_bytes(64))
        assert (await one.claims()).source is KeySource.RANDOM

    with engine(tmp_path, PlatformConfig(keyid_bits=1)) as run:
        run(check)


def test_who_cannot_be_vouched_for_has_no_evidence(tmp_path: Path) -> None:
    async def check(one: Engine) -> None:
        with pytest.raises(MktmeError, match="no VM"):
            await one.evidence(vm=uuid4())
        one.vm.observation, one.vm.unmeasured = None, "QEMU contradicts its domain: kernel"
        with pytest.raises(MeasurementError, match="contradicts its domain: kernel"):
            await one.claims()
        assert (await one.evidence()).vms == ()  # nor among all

    with engine(tmp_path) as run:
        run(check)


def test_it_is_measured_once(tmp_path: Path) -> None:
    """What was launched is what it was, whatever becomes of the files."""

    async def check(one: Engine) -> None:
        asked = []

        class Counting(FakeObservation):
            def measure(self, _digests: object) -> Launch:
                asked.append(1)
                return LAUNCH

        one.vm.observation = Counting(Path("/proc/0"), {}, {}, {}, debuggable=False)
        both = await asyncio.gather(one.claims(), one.claims())
        assert [claims.launch for claims in both] == [LAUNCH, LAUNCH]
        assert len(asked) == 1

    with engine(tmp_path) as run:
        run(check)


def test_a_vm_that_ends_while_it_is_measured(tmp_path: Path) -> None:
    async def check(one: Engine) -> None:
        class Ending(FakeObservation):
            def measure(self, _digests: object) -> Launch:
                one.vm.link = None
                return LAUNCH

        one.vm.observation = Ending(Path("/proc/0"), {}, {}, {}, debuggable=False)
        with pytest.raises(MeasurementError, match="ended meanwhile"):
            await one.claims()

    with engine(tmp_path) as run:
        run(check)


# --- the process ------------------------------------------------------------------------------


def test_a_ca_certifies_the_engine(tmp_path: Path) -> None:
    CertificateAuthority.make("maker").save(tmp_path / "ca")
    process = EngineProcess(tmp_path, tmp_path / "dram", 8 * MIB, ca=tmp_path / "ca")
    with process as running:
        token = running.client.evidence(NONCE)
        ueid = running.client.identity().ueid
    trust = load_trust([tmp_path / "ca/ca.pem"])
    parsed = Token.parse(token)
    said = open_token(token, parsed.key())
    assert verify_chain(parsed.chain, trust, said.time) == said.ueid == ueid
    assert said.debug is DebugStatus.DISABLED
    assert said.vms == ()


def test_a_ca_that_is_none_ends_the_engine_with_its_reason(tmp_path: Path) -> None:
    process = EngineProcess(tmp_path, tmp_path / "dram", 8 * MIB, ca=tmp_path / "none")
    with pytest.raises(EngineRefusedError, match="No such file"), process:
        pass


def test_observers_may_ask_and_not_release(tmp_path: Path) -> None:
    with EngineProcess(tmp_path, tmp_path / "dram", 8 * MIB) as running:
        vm = uuid4()
        running.client.add_vm(
            vm,
            name="alice",
            memory_bytes=MIB,
            track=Track.PAGES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
        )
        observer = EngineClient.connect(tmp_path / "control.sock", wire.Role.OBSERVER)
        with observer:
            assert observer.evidence(NONCE)
            with pytest.raises(EngineRefusedError, match="not linked"):
                observer.evidence(NONCE, vm)
            for request in (
                lambda: observer.release_key(vm, b"x"),
                lambda: observer.describe_domain(vm, "<domain/>"),
            ):
                with pytest.raises(EngineRefusedError) as refused:
                    request()
                assert refused.value.error == "RoleError"
        with pytest.raises(EngineRefusedError, match="no JWE"):
            running.client.release_key(vm, b"x")
        records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        found = [(one["event"], one["outcome"]) for one in records]
        assert ("GetEvidence", "done") in found
        assert ("GetEvidence", "MeasurementError") in found
        assert ("ReleaseKey", "RoleError") in found
        assert ("ReleaseKey", "JweError") in found


@pytest.mark.parametrize("nonce", [b"", bytes(7), bytes(65)])
def test_a_nonce_has_its_size(nonce: bytes) -> None:
    body = wire.frame(wire.GetEvidence(nonce=nonce))[wire.LENGTH_BYTES :]
    with pytest.raises(wire.ProtocolError):
        wire.decode_request(body)


def test_no_key_gets_into_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = secrets.token_bytes(64)

    async def check(one: Engine) -> None:
        await one.release(key)
        assert "recipient" not in repr(one.vm)

    caplog.set_level(logging.DEBUG)
    with engine(tmp_path) as run:
        run(check)
    for part in (key, key[:32], key[32:]):
        assert part.hex() not in caplog.text
