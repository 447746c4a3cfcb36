# SPDX-License-Identifier: GPL-2.0-or-later
"""A broker with one tenant, alice, who trusts one platform; and what a client of hers sends."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding
from joserfc import jwe
from joserfc.jwk import ECKey

from mktme.attest.claims import Evidence, RecipientKey
from mktme.broker.audit import AuditLog
from mktme.broker.broker import Attestation, Broker
from mktme.broker.directory import BrokerDirectory, create
from mktme.broker.keys import MasterKey
from mktme.broker.sessions import Sessions
from mktme.broker.store import Kind, Terms

from ..attest.signing import NOW, VM, Platform

POLICY: Final = b'name = "alice-strict"\n'
LAX: Final = b'name = "alice-lax"\nintegrity = false\ndata-paths = ["inline", "shadow"]\n'
KEY_PATH: Final = "alice/key/vm1"
SECRET: Final = b"the secret that no test may see in an answer, log or file: " + bytes(range(5))
CLIENT: Final = "192.0.2.1"


def pem(platform: Platform) -> bytes:
    return platform.identity.root.public_bytes(Encoding.PEM)


def furnish(broker: BrokerDirectory, platform: Platform) -> None:
    """Give the broker its tenant alice, with a key."""
    broker.put(Kind.TRUST, "alice", "platforms", pem(platform))
    broker.put(Kind.POLICY, "alice", "strict", POLICY)
    broker.put(Kind.REFERENCE, "alice", "strict", platform.reference().encode())
    broker.put(Kind.RESOURCE, "alice", KEY_PATH, SECRET, Terms("strict"))


@dataclass
class Clock:
    """A clock that a test sets."""

    now: dt.datetime = NOW

    def __call__(self) -> dt.datetime:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)


@dataclass
class Setting:
    """All of it, without HTTP."""

    directory: BrokerDirectory
    platform: Platform
    clock: Clock

    @classmethod
    def make(cls, path: Path, platform: Platform) -> Setting:
        setting = cls(create(path), platform, Clock())
        furnish(setting.directory, platform)
        return setting

    def open(self, **sessions: Any) -> Broker:
        """A worker."""
        master = MasterKey.read(self.directory.keys / "master.key")
        return Broker(
            self.directory.open_store(),
            Sessions(self.directory.path, master, **sessions),
            AuditLog(self.directory.audit_log, self.clock),
            self.signer(),
            self.clock,
        )

    def signer(self) -> ECKey:
        return ECKey.import_key((self.directory.keys / "token.key").read_bytes())

    def sent(
        self,
        nonce: bytes,
        evidence: Callable[[Evidence], Evidence] = lambda one: one,
        *,
        platform: Platform | None = None,
        **changes: Any,
    ) -> Attestation:
        """What a client sends for a nonce.

        Args:
            nonce: the challenge's.
            evidence: changes the evidence before it is signed.
            platform: signs it; None: the one that alice trusts.
            changes: of what goes with it.
        """
        signs = platform or self.platform
        claims = signs.evidence(nonce=nonce, issued_at=int(self.clock.now.timestamp()))
        attestation = Attestation(
            nonce,
            RecipientKey.of(signs.recipient.public_key()),
            signs.sign(evidence(claims)),
            VM,
        )
        return dataclasses.replace(attestation, **changes)

    def attested(self, broker: Broker, policy: str = "alice/strict", **changes: Any) -> str:
        """The cookie of a session whose evidence passed."""
        cookie, nonce = broker.challenge(policy)
        broker.attest(cookie, self.sent(nonce, **changes), CLIENT)
        return cookie

    def opened(self, sealed: dict[str, str], platform: Platform | None = None) -> bytes:
        """What is in a JWE for a platform's VM, as another implementation opens it."""
        key = ECKey.import_key((platform or self.platform).recipient)
        registry = jwe.JWERegistry(algorithms=["ECDH-ES+A256KW", "A256GCM"])
        plaintext = jwe.decrypt_json(dict(sealed), key, registry=registry).plaintext  # type: ignore[arg-type]
        assert plaintext is not None
        return plaintext

    def records(self) -> list[dict[str, Any]]:
        """The audit log."""
        return [json.loads(line) for line in self.directory.audit_log.read_text().splitlines()]
