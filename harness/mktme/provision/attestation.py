# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's evidence, asked for with a fresh nonce and appraised by what its tenant demands."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self
from uuid import UUID

from cryptography import x509

from mktme.attest.claims import VmClaims
from mktme.attest.identity import Trust
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.attest.result import Appraisal, Check, Verdict
from mktme.attest.verify import verify
from mktme.provision.state import file_fact, read, trust_fact
from mktme.provision.tenants import KeySource, VmSpec
from mktme.service.client import EngineClient

NONCE_BYTES: Final = 32


class Attester(Protocol):
    """What can be asked for evidence of a VM."""

    @property
    def uuid(self) -> UUID:
        """Which VM."""
        ...

    @property
    def own(self) -> Mapping[str, bytes]:
        """What of its launch is its alone: components that whoever launched it made, and digests.

        Of these, nothing else is good, and no reference value needs to know them.
        """
        ...

    def evidence(self, nonce: bytes) -> bytes:
        """A token that is about this VM alone.

        Raises:
            ServiceError: the engine gives none.
        """
        ...


@dataclass(frozen=True, slots=True)
class Criteria:
    """What a VM's evidence must satisfy, read once: what it is called is what it is.

    Attributes:
        policy_fact: as `mktme.provision.state.Facts` has it; so are the other two.
    """

    policy: Policy
    reference: Reference
    policy_fact: str
    reference_fact: str
    trust_fact: str

    @classmethod
    def of(cls, spec: VmSpec, trust: tuple[Path, ...]) -> Self:
        """Read a VM's policy and reference values.

        Args:
            spec: the VM.
            trust: certificates of the CAs that are pinned.

        Raises:
            ProvisionError: they cannot be read any more.
            AttestationError: they are none.
        """
        policy, reference = read(spec.policy), read(spec.reference)
        return cls(
            Policy.decode(policy),
            Reference.decode(reference),
            file_fact(spec.policy, policy),
            file_fact(spec.reference, reference),
            trust_fact(trust),
        )


def engine_roots(engine: EngineClient) -> Trust:
    """The CA that an engine names itself: of one that was started here, as good as pinned."""
    return Trust(tuple(x509.load_pem_x509_certificates(engine.identity().root.encode())))


def appraise(
    vm: Attester, criteria: Criteria, trust: Trust, source: KeySource, *, running: bool
) -> Appraisal:
    """Ask for evidence and appraise it.

    Beside what the policy demands it must say what the provisioner knows: where the key comes from,
    and whether the VM has run. A policy may allow any source; a VM that was to get its key from the
    broker, and has one that it drew itself, is not what was asked for.

    Args:
        vm: what to ask.
        criteria: what it must satisfy.
        trust: the CAs that it must come from.
        source: where the VM's key comes from.
        running: whether it has been let run.

    Raises:
        ServiceError: there is no evidence.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    token = vm.evidence(nonce)
    appraisal = verify(
        token,
        trust=trust,
        policy=criteria.policy,
        reference=_with_own(criteria.reference, vm.own),
        nonce=nonce,
        vm=vm.uuid,
    )
    claims = None if appraisal.evidence is None else appraisal.evidence.vm(vm.uuid)
    if claims is None:
        return appraisal
    return dataclasses.replace(
        appraisal, checks=(*appraisal.checks, *_expected(claims, source, running))
    )


def _with_own(reference: Reference, own: Mapping[str, bytes]) -> Reference:
    exact = {name: frozenset((digest,)) for name, digest in own.items()}
    return Reference(reference.code, {**reference.launch, **exact})


def _expected(claims: VmClaims, source: KeySource, running: bool) -> list[Check]:
    found = claims.source.value
    ran = "it may have run" if claims.running else "it has not run"
    # Without the store tracker nobody saw that nothing was executed, and the claim is that it may.
    as_left = claims.running if running else not claims.running or "stores" not in claims.trackers
    return [
        _check("provisioned:key-source", found == source.value, found, f"not {source.value}"),
        _check("provisioned:running", as_left, ran, "not as it was left"),
    ]


def _check(name: str, good: bool, found: str, wrong: str) -> Check:
    if good:
        return Check(name, Verdict.AFFIRMING, found)
    return Check(name, Verdict.CONTRAINDICATED, f"{found}: {wrong}")
