# SPDX-License-Identifier: GPL-2.0-or-later
"""A platform and VMs that are not there, but sign evidence of what they would be; and its files."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.asymmetric import ec

from mktme.attest.claims import (
    Component,
    DebugStatus,
    Evidence,
    KeySource,
    Launch,
    RecipientKey,
    TmeClaims,
    VmClaims,
)
from mktme.attest.identity import Identity, Trust
from mktme.attest.reference import Reference
from mktme.attest.token import sign
from mktme.engine.keys import KeyMode
from mktme.engine.tme import TmeActivate, TmeCapability
from mktme.provision.apply import Narrator, Provisioner
from mktme.provision.attestation import Attester, Criteria
from mktme.provision.secrets import Marks
from mktme.provision.state import Facts, PlatformState, SecretFact, by_path, wanted
from mktme.provision.tenants import Broker, Deployment, Secret, VmSpec
from mktme.provision.tenants import KeySource as Source
from mktme.vm.console import VmError
from mktme.vm.pages import GuestPages

CODE = b"\x33" * 32
KERNEL = b"\x22" * 32
POLICY = """\
name = "lenient"
data-paths = ["shadow", "inline"]
integrity = false
exceptions = ["shared", "further-keyid", "unencrypted"]
exceptions-max = 1073741824
"""


def write_files(directory: Path) -> None:
    """A policy, the reference values that a fake VM has, and a secret."""
    (directory / "policy.toml").write_text(POLICY)
    reference = Reference(frozenset({CODE}), {"kernel": frozenset({KERNEL})})
    (directory / "reference.json").write_bytes(reference.encode())
    secret = directory / "token"
    secret.touch(mode=0o600)
    secret.write_text("correct horse battery staple")


class Quiet:
    """A narrator that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notices: list[str] = []

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        self.steps.append(what)
        yield

    def notice(self, line: str) -> None:
        self.notices.append(line)


@dataclass
class FakeGuest:
    """A VM; `said` is all that was asked of it, in this order."""

    spec: VmSpec
    bench: FakeBench
    keyid: int
    uuid: UUID = field(default_factory=uuid4)
    said: list[str] = field(default_factory=list)
    running: bool = False
    source: KeySource = KeySource.RANDOM
    kernel: bytes = KERNEL
    seed: bytes | None = None
    own: dict[str, bytes] = field(default_factory=dict)
    lost: str | None = None
    secrets: dict[str, tuple[Secret, bytes]] = field(default_factory=dict)
    pages: tuple[GuestPages, ...] = ()
    recipient: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def evidence(self, nonce: bytes) -> bytes:
        self.said.append("evidence")
        return self.bench.evidence(self, nonce)

    def claims(self) -> VmClaims:
        track = "" if self.spec.track is None else self.spec.track.value
        return VmClaims(
            uuid=self.uuid,
            name=self.spec.name,
            running=self.running,
            launch=Launch(
                (
                    *([] if self.seed is None else [Component("disk1", self.seed)]),
                    Component("kernel", self.kernel),
                )
            ),
            keyid=self.keyid,
            algorithm=self.spec.algorithm,
            mode=KeyMode.RANDOM if self.source is KeySource.RANDOM else KeyMode.DIRECT,
            source=self.source,
            datapath="shadow" if self.spec.datapath.value == "shadow" else "inline",
            trackers=tuple(one for one in ("pages", "stores") if one in track),
            integrity=False,
            exceptions=(),
            report_data=bytes(64),
            recipient_key=RecipientKey.of(self.recipient.public_key()),
            vtpm=None,
            debug=DebugStatus.DISABLED,
            fault=None,
        )

    def facts(self, spec: VmSpec, criteria: Criteria, secrets: tuple[SecretFact, ...]) -> Facts:
        launched = dataclasses.replace(
            self.spec,
            pages=self.pages,
            source=Source(self.source.value),
            resource=spec.resource if self.source is KeySource.BROKER else None,
            secrets=(),
        )
        (facts,) = wanted(Deployment(name="x", vms=(launched,))).facts
        return dataclasses.replace(
            facts,
            policy=criteria.policy_fact,
            reference=criteria.reference_fact,
            trust=criteria.trust_fact,
            secrets=secrets,
        )

    def trouble(self) -> str | None:
        return self.lost

    def release(self, jwe: bytes) -> None:
        self.said.append(f"release {jwe.decode()}")
        self.source = KeySource.BROKER

    def boot(self) -> None:
        self.said.append("boot")
        self.running = True
        self.bench.when_booted(self)

    def hold(self) -> None:
        self.said.append("hold")

    def resume(self) -> None:
        self.said.append("resume")

    def assign(self, old: Collection[GuestPages], new: Collection[GuestPages]) -> None:
        assert self.pages == tuple(old)
        self.pages = tuple(new)

    def look(self, secrets: Collection[Secret], marks: Marks) -> tuple[SecretFact, ...]:
        there = [one for one in by_path(tuple(secrets)) if one.path in self.secrets]
        return tuple(
            SecretFact(str(self.secrets[one.path][0]), marks.of_file(one.file))
            if self.secrets[one.path][1] == one.file.read_bytes()
            else SecretFact(str(self.secrets[one.path][0]), "another")
            for one in there
        )

    def hand_over(self, secret: Secret) -> None:
        self.said.append(f"hand over {secret.path}")
        self.secrets[secret.path] = (secret, secret.file.read_bytes())

    def withdraw(self, path: str) -> None:
        self.said.append(f"withdraw {path}")
        self.secrets.pop(path, None)

    def close(self) -> None:
        self.said.append("close")
        self.bench.guests.remove(self)


@dataclass
class FakeBench:
    """A platform; `identity` signs what its VMs say."""

    deployment: Deployment
    identity: Identity = field(default_factory=Identity.create)
    guests: list[FakeGuest] = field(default_factory=list)
    all_guests: list[FakeGuest] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    aborted: bool = False
    fails: set[str] = field(default_factory=set)
    when_booted: Callable[[FakeGuest], None] = lambda _guest: None
    make: Callable[[FakeGuest], None] = lambda _guest: None

    def state(self) -> PlatformState:
        return PlatformState(
            dram_bytes=self.deployment.dram_bytes,
            config=self.deployment.platform,
            emulator=self.deployment.emulator,
            ca=self.deployment.ca,
            engine_pid=1,
            control_socket=Path("/nowhere/control.sock"),
        )

    def roots(self) -> Trust:
        return Trust((self.identity.root,))

    def evidence(self, guest: FakeGuest, nonce: bytes) -> bytes:
        return sign(
            Evidence(
                nonce=nonce,
                issued_at=int(self.identity.chain[0].not_valid_before_utc.timestamp()) + 3600,
                ueid=self.identity.ueid,
                version="0.1.0",
                code=CODE,
                debug=DebugStatus.DISABLED,
                tme=TmeClaims(
                    capability=TmeCapability().encode(),
                    activate=TmeActivate(
                        lock=True, enable=True, keyid_bits=6, algorithms=7
                    ).encode(),
                    exclude_mask=0,
                    exclude_base=0,
                ),
                vms=(guest.claims(),),
            ),
            self.identity,
        )

    def launch(self, spec: VmSpec, tell: Narrator) -> FakeGuest:
        if spec.name in self.fails:
            raise VmError(f"{spec.name} does not come up", hint="make it come up")
        used = {one.keyid for one in self.guests}
        keyid = min(set(range(1, 64)) - used)
        guest = FakeGuest(spec, self, keyid, pages=spec.pages)
        self.make(guest)
        self.guests.append(guest)
        self.all_guests.append(guest)
        return guest

    def wait_ended(self) -> None:
        self.ended.wait()

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        assert self.guests == []
        self.ended.set()


@dataclass
class Site:
    """A provisioner over fake platforms, the last of which is `bench`."""

    benches: list[FakeBench] = field(default_factory=list)
    prepare: Callable[[FakeBench], None] = lambda _bench: None
    jwe: Callable[[Attester, VmSpec, Broker], bytes] = lambda _vm, _spec, _broker: b"jwe"

    def __post_init__(self) -> None:
        self.provisioner = Provisioner(
            self.open, lambda vm, spec, broker: self.jwe(vm, spec, broker)
        )

    def open(self, deployment: Deployment, tell: Narrator) -> FakeBench:
        bench = FakeBench(deployment)
        self.prepare(bench)
        self.benches.append(bench)
        return bench

    @property
    def bench(self) -> FakeBench:
        return self.benches[-1]

    def guest(self, name: str) -> FakeGuest:
        """The one that there is of this name."""
        (guest,) = (one for one in self.bench.guests if one.spec.name == name)
        return guest
