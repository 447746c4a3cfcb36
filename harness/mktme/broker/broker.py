# SPDX-License-Identifier: GPL-2.0-or-later
"""Every decision of the broker, and nothing of HTTP: challenge, attestation, release.

Evidence is appraised twice. At attestation, by the policy that the client named, for the token; one
try for each nonce. At the release of a resource once more, by the policy that the resource needs,
as of the moment of attestation: so what is released depends on signed evidence alone, not on what
somebody noted down about it.

A refusal says which checks failed and no more, and the audit log says why. To who attested with one
tenant's policy, other tenants' resources do not exist. A tenant or policy that does not exist is
not told from a platform that nobody trusts.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NoReturn
from uuid import UUID

from joserfc import jwe, jwt
from joserfc.jwk import ECKey

from mktme.attest.claims import RecipientKey, VmClaims
from mktme.attest.identity import Trust
from mktme.attest.policy import Policy
from mktme.attest.result import Appraisal, Check, Verdict, ear
from mktme.attest.verify import verify
from mktme.broker import metrics
from mktme.broker.audit import AuditLog, FailedCheck, Record
from mktme.broker.errors import DeniedError, StoreError
from mktme.broker.rates import ClientRates
from mktme.broker.sessions import (
    Attested,
    BusyError,
    ReplayError,
    Session,
    SessionError,
    Sessions,
)
from mktme.broker.store import NO_REFERENCE, Contents, Row, Rules, Store
from mktme.engine.secret import scrub

ISSUER: Final = "mktme-broker"
KEY_ALGORITHM: Final = "ECDH-ES+A256KW"
"""How what is released is encrypted to its recipient (RFC 7518, section 4.6)."""
CONTENT_ALGORITHM: Final = "A256GCM"
DEFAULT_SELECTOR: Final = "default/default"
"""Tenant and policy, if a client names none."""

STRANGERS: Final = (10.0, 100.0)
"""Requests without a session that are recorded: in a second, and at once; metrics count all."""

_NOBODY: Final = Rules("", "", 0, Policy(name="none"), NO_REFERENCE, Trust(()))
_JWE: Final = jwe.JWERegistry(algorithms=[KEY_ALGORITHM, CONTENT_ALGORITHM])

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attestation:
    """What a client sends to attest a VM.

    Attributes:
        nonce: the challenge's.
        key: what secrets are to be encrypted to; it must be the one in the evidence.
        evidence: the token.
        vm: which VM it is about.
    """

    nonce: bytes
    key: RecipientKey
    evidence: bytes
    vm: UUID


class Broker:
    """One worker's.

    Args:
        store: what there is to release, and on what terms.
        sessions: of all workers.
        audit: where decisions are recorded.
        signer: signs tokens, P-256.
        clock: the time, in UTC.
    """

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        audit: AuditLog,
        signer: ECKey,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._audit = audit
        self._signer = signer
        self._clock = clock
        self._strangers = ClientRates(*STRANGERS)

    def challenge(self, selector: str = DEFAULT_SELECTOR) -> tuple[str, bytes]:
        """Begin a session.

        Args:
            selector: TENANT/POLICY; whether there is such a policy shows when evidence comes.

        Returns:
            The session's cookie, and the nonce that evidence has to have.
        """
        cookie, session = self._sessions.make(selector, self._clock().timestamp())
        return cookie, session.nonce

    def attest(self, cookie: str | None, sent: Attestation, client: str) -> tuple[str, str]:
        """Appraise evidence.

        Args:
            cookie: the session's.
            sent: what the client sent.
            client: its network address.

        Returns:
            The cookie, and the result as a token: an EAR, signed as a JWT with ES256.

        Raises:
            DeniedError: the evidence does not pass, or the session does not allow it.
            AuditError: that cannot be recorded.
            StoreError: the sessions' database cannot be used.
        """
        case = _Case("attest", client, sent.vm)
        now = self._clock()
        session = self._find(cookie, now, case)
        case.session = session
        try:
            self._sessions.use(session, now.timestamp())
        except ReplayError as error:
            self._deny(case, "AttestationError", 401, _failed("freshness", str(error)))
        if not hmac.compare_digest(sent.nonce, session.nonce):
            failed = _failed("freshness", "the nonce is another session's")
            self._deny(case, "AttestationError", 401, failed)
        tenant, _, policy = session.selector.partition("/")
        case.tenant, case.policy = tenant, policy
        rules = self._contents(case).rules(tenant, policy) or _NOBODY
        appraisal, vm = self._appraise(case, rules, sent.evidence, session, sent.vm, now)
        failed = appraisal.failed
        if vm is not None and vm.recipient_key != sent.key:
            failed += _failed("recipient-key", "the client's key is not the one in the evidence")
        metrics.ATTESTATIONS.labels("contraindicated" if failed else "affirming").inc()
        if vm is None or failed:
            self._deny(case, "AttestationError", 401, failed)
        try:
            self._sessions.attest(session, Attested(sent.evidence, sent.vm, now.timestamp()))
        except BusyError as error:
            self._deny(case, "Busy", 503, _failed("sessions", str(error)))
        metrics.SESSIONS.set(self._sessions.count())
        token = self._token(appraisal, session, sent.key)
        self._record(case, "done")
        assert cookie is not None
        return cookie, token

    def release(self, cookie: str | None, path: str, client: str) -> dict[str, str]:
        """Release a resource to the recipient in a session's evidence.

        Args:
            cookie: the session's.
            path: REPOSITORY/TYPE/TAG.
            client: its network address.

        Returns:
            A JWE, flattened (RFC 7516, section 7.2.2).

        Raises:
            DeniedError: the session is not attested, its tenant has no such resource, or the
                evidence does not pass the resource's policy.
            AuditError: that cannot be recorded.
            StoreError: the sessions' database cannot be used.
        """
        case = _Case("release", client, resource=path)
        session = self._find(cookie, self._clock(), case)
        case.session = session
        case.tenant = tenant = session.selector.partition("/")[0]
        try:
            attested = self._sessions.attested(session)
        except SessionError as error:
            self._deny(case, "SessionError", 401, _failed("session", str(error)))
        case.asked = attested.vm
        contents = self._contents(case)
        row = contents.resource(tenant, path)
        if row is None:
            self._deny(case, "ResourceNotFound", 404, ())
        case.row = row
        terms = row.release
        case.policy = terms.policy
        rules = contents.rules(tenant, terms.policy) or _NOBODY
        at = datetime.fromtimestamp(attested.at_s, UTC)
        appraisal, vm = self._appraise(case, rules, attested.evidence, session, attested.vm, at)
        failed = appraisal.failed
        if vm is not None and terms.vm is not None and terms.vm not in (vm.name, str(vm.uuid)):
            failed += _failed("binding", f"it is for {terms.vm}")
        if vm is None or failed:
            self._deny(case, "PolicyDeny", 403, failed)
        secret = contents.open(row)
        try:
            sealed = _encrypt(secret, vm.recipient_key)
        finally:
            if len(secret) > 1:
                scrub(secret)
        # Before the answer: what cannot be recorded is not released.
        self._record(case, "done")
        return sealed

    def check(self) -> int:
        """Whether the store can be used; returns its generation.

        Raises:
            StoreError: it cannot.
        """
        return self._store.contents().generation

    def close(self) -> None:
        """Close what it has; again does nothing."""
        self._sessions.close()
        self._store.close()
        self._audit.close()

    def _find(self, cookie: str | None, now: datetime, case: _Case) -> Session:
        try:
            return self._sessions.find(cookie or "", now.timestamp())
        except SessionError as error:
            self._deny(case, "SessionError", 401, _failed("session", str(error)))

    def _contents(self, case: _Case) -> Contents:
        try:
            contents = self._store.contents()
        except StoreError as error:
            metrics.GENERATION.set(0)
            log.error("%s", error)
            self._deny(case, "StoreError", 503, _failed("store", str(error)))
        metrics.GENERATION.set(contents.generation)
        case.generation = contents.generation
        return contents

    def _appraise(
        self,
        case: _Case,
        rules: Rules,
        evidence: bytes,
        session: Session,
        vm: UUID,
        at: datetime,
    ) -> tuple[Appraisal, VmClaims | None]:
        case.policy_version = rules.version
        appraisal = verify(
            evidence,
            trust=rules.trust,
            policy=rules.policy,
            reference=rules.reference,
            nonce=session.nonce,
            vm=vm,
            now=at,
        )
        if appraisal.evidence is None:
            return appraisal, None
        case.ueid = appraisal.evidence.ueid
        claims = appraisal.evidence.vm(vm)
        case.claims = claims
        return appraisal, claims

    def _token(self, appraisal: Appraisal, session: Session, key: RecipientKey) -> str:
        """The EAR, for this session and recipient alone, as long as the session."""
        claims = ear(appraisal)
        for submodule in claims["submods"].values():
            # Reasons are for the broker's side.
            for check in submodule.get("mktme.checks", ()):
                check.pop("reason", None)
        claims |= {
            "iss": ISSUER,
            "exp": int(session.expires_s),
            "sid": session.id.hex(),
            "cnf": {"jwk": public_jwk(key)},
        }
        header = {"alg": "ES256", "typ": "JWT", "kid": self._signer.thumbprint()}
        return jwt.encode(header, claims, self._signer)

    def _deny(self, case: _Case, kind: str, status: int, failed: tuple[Check, ...]) -> NoReturn:
        for check in failed:
            metrics.FAILED_CHECKS.labels(check.name.partition(":")[0]).inc()
        # Who has no session needs nobody's leave to ask, and must not fill the disk.
        if case.session is not None or not self._strangers.take(""):
            self._record(case, kind, failed)
        raise DeniedError(
            _DETAILS[kind], status=status, kind=kind, checks=tuple(one.name for one in failed)
        )

    def _record(self, case: _Case, outcome: str, failed: tuple[Check, ...] = ()) -> None:
        if case.event == "release":
            metrics.RELEASES.labels("released" if outcome == "done" else "refused").inc()
        self._audit.write(case.record(outcome, failed))


@dataclass
class _Case:
    """What is known of a request, for its record."""

    event: str
    client: str
    asked: UUID | None = None
    resource: str | None = None
    session: Session | None = None
    tenant: str | None = None
    policy: str | None = None
    policy_version: int | None = None
    ueid: bytes | None = None
    claims: VmClaims | None = None
    row: Row | None = None
    generation: int | None = None

    def record(self, outcome: str, failed: tuple[Check, ...]) -> Record:
        return Record(
            event=self.event,
            outcome=outcome,
            client=self.client,
            session=None if self.session is None else self.session.id.hex()[:16],
            tenant=self.tenant,
            policy=self.policy,
            policy_version=self.policy_version,
            vm=self.asked,
            name=None if self.claims is None else self.claims.name,
            keyid=None if self.claims is None else self.claims.keyid,
            ueid=None if self.ueid is None else self.ueid.hex(),
            resource=self.resource,
            resource_version=None if self.row is None else self.row.version,
            checks=tuple(FailedCheck(one.name, one.reason) for one in failed),
            generation=self.generation,
        )


_DETAILS: Final = {
    "AttestationError": "the evidence does not pass",
    "SessionError": "no session, or it is over",
    "ResourceNotFound": "no such resource",
    "PolicyDeny": "the evidence does not pass the resource's policy",
    "StoreError": "the broker cannot release anything now",
    "Busy": "too many sessions; try again later",
}


def public_jwk(key: RecipientKey) -> dict[str, Any]:
    """A recipient key as a JWK (RFC 7517), as Trustee's clients send it."""
    jwk = ECKey.import_key(key.public_key()).as_dict(private=False)
    return {name: jwk[name] for name in ("kty", "crv", "x", "y")} | {"alg": KEY_ALGORITHM}


def _encrypt(secret: bytes, recipient: RecipientKey) -> dict[str, str]:
    """A JWE of a secret; the ephemeral key is in the header that is authenticated."""
    header = {"alg": KEY_ALGORITHM, "enc": CONTENT_ALGORITHM}
    key = ECKey.import_key(recipient.public_key())
    compact = jwe.encrypt_compact(header, secret, key, registry=_JWE)
    # The compact form and the flattened one are the same five parts.
    names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    return dict(zip(names, compact.split("."), strict=True))


def _failed(name: str, reason: str) -> tuple[Check, ...]:
    return (Check(name, Verdict.CONTRAINDICATED, reason),)
