# SPDX-License-Identifier: GPL-2.0-or-later
"""A platform that signs whatever a test wants it to say; no VM and no engine."""

from __future__ import annotations

import dataclasses
import datetime as dt
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

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
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.attest.result import Appraisal
from mktme.attest.token import sign
from mktme.attest.verify import verify
from mktme.engine.keys import KeyMode
from mktme.engine.tme import TmeActivate, TmeCapability
from mktme.engine.xts import Algorithm

NOW: Final = dt.datetime(2027, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
NONCE: Final = bytes(range(32))
VM: Final = UUID("3f6ae9a2-7d70-4a4f-9a52-7b1a6a1f5a01")
POLICY: Final = Policy(name="strict")

_ACTIVATE: Final = TmeActivate(lock=True, enable=True, keyid_bits=6, algorithms=7)


@dataclass(frozen=True)
class Platform:
    """An identity, and a VM's recipient key of which a test has both halves."""

    identity: Identity = field(default_factory=lambda: Identity.create(now=NOW))
    recipient: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    @property
    def trust(self) -> Trust:
        return Trust((self.identity.root,))

    def vm(self, **changes: Any) -> VmClaims:
        """A VM that the strictest policy affirms, but for what a test changes."""
        claims = VmClaims(
            uuid=VM,
            name="alice",
            running=False,
            launch=Launch(
                (Component("command-line", b"\x11" * 32), Component("kernel", b"\x22" * 32))
            ),
            keyid=1,
            algorithm=Algorithm.AES_XTS_128_INTEGRITY,
            mode=KeyMode.RANDOM,
            source=KeySource.RANDOM,
            datapath="inline",
            trackers=(),
            integrity=True,
            exceptions=(),
            report_data=bytes(64),
            recipient_key=RecipientKey.of(self.recipient.public_key()),
            vtpm=None,
            debug=DebugStatus.DISABLED,
            fault=None,
        )
        return dataclasses.replace(claims, **changes)

    def evidence(self, *vms: VmClaims, **changes: Any) -> Evidence:
        """Evidence of some VMs, by default of the one above."""
        evidence = Evidence(
            nonce=NONCE,
            issued_at=int(NOW.timestamp()),
            ueid=self.identity.ueid,
            version="0.1.0",
            code=b"\x33" * 32,
            debug=DebugStatus.DISABLED,
            tme=TmeClaims(
                capability=TmeCapability().encode(),
                activate=_ACTIVATE.encode(),
                exclude_mask=0,
                exclude_base=0,
            ),
            vms=vms or (self.vm(),),
        )
        return dataclasses.replace(evidence, **changes)

    def reference(self) -> Reference:
        """Digests as the evidence above has them."""
        return Reference.of(self.evidence(), self.vm())

    def sign(self, evidence: Evidence | None = None) -> bytes:
        return sign(self.evidence() if evidence is None else evidence, self.identity)

    def appraise(self, token: bytes, **changes: Any) -> Appraisal:
        """What a verifier finds of a token who has pinned this platform."""
        arguments: dict[str, Any] = dict(
            trust=self.trust,
            policy=POLICY,
            reference=self.reference(),
            nonce=NONCE,
            vm=VM,
            now=NOW,
        )
        return verify(token, **(arguments | changes))
