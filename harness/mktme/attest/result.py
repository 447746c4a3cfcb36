# SPDX-License-Identifier: GPL-2.0-or-later
"""What an appraisal found: check by check, and as an EAR (draft-ietf-rats-ear, RFC 9711)."""

from __future__ import annotations

import base64
import enum
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final
from uuid import UUID

from mktme.attest.claims import Evidence
from mktme.attest.errors import AttestationError
from mktme.attest.tpm_quote import MeasuredBoot

EAR_PROFILE: Final = "tag:github.com,2023:veraison/ear"
"""As Veraison's and Trustee's verifiers name it."""

_VERIFIER: Final = {"developer": "mktme", "build": f"mktme {metadata.version('mktme')}"}


class Verdict(enum.Enum):
    """A trust tier (draft-ietf-rats-ar4si, section 2.3); the value is EAR's word for it."""

    AFFIRMING = "affirming"
    WARNING = "warning"
    CONTRAINDICATED = "contraindicated"

    @property
    def number(self) -> int:
        """The tier's first trustworthiness claim."""
        return _TIERS[self]


_TIERS: Final = {Verdict.AFFIRMING: 2, Verdict.WARNING: 32, Verdict.CONTRAINDICATED: 96}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: stable, for programs.
        verdict: what is thought of it.
        reason: one line, for people on the verifier's side; not for who sent the evidence.
    """

    name: str
    verdict: Verdict
    reason: str


class RefusedError(AttestationError):
    """Evidence that is not affirmed. The message names the checks that failed and no more.

    Attributes:
        checks: those that failed.
    """

    def __init__(self, checks: Iterable[Check]) -> None:
        self.checks = tuple(checks)
        super().__init__(f"refused: {', '.join(one.name for one in self.checks)}")


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What a verifier found of one token and one VM.

    Attributes:
        checks: in the order in which they were made; what a failed one forbids to believe, no
            later one looks at.
        evidence: what was signed; None if that is not known.
        vm: which VM it was about; None if there is none.
        policy: name of the policy.
        at: when, seconds since 1970.
        boot: what it booted, if its vTPM proved it; None otherwise.
    """

    checks: tuple[Check, ...]
    evidence: Evidence | None
    vm: UUID | None
    policy: str
    at: int
    boot: MeasuredBoot | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of all checks."""
        return worst(self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """Checks that do not affirm."""
        return tuple(one for one in self.checks if one.verdict is not Verdict.AFFIRMING)

    def require(self) -> None:
        """Go on only if all is affirmed.

        Raises:
            RefusedError: it is not.
        """
        if self.failed or not self.checks:
            raise RefusedError(self.failed)


def worst(checks: Iterable[Check]) -> Verdict:
    """The worst verdict of checks; of none, contraindicated."""
    return max(
        (one.verdict for one in checks),
        key=lambda verdict: verdict.number,
        default=Verdict.CONTRAINDICATED,
    )


# Which trustworthiness claim (AR4SI, section 2.3) a check counts for.
_VECTOR: Final = {
    "instance-identity": ("format", "chain", "signature", "freshness", "time", "vm", "report-data"),
    "configuration": ("debug", "key-mode", "key-source", "data-path", "fault"),
    "executables": ("code", "launch"),
    "hardware": ("locked", "exclusion", "vtpm"),
    "runtime-opaque": ("key-size", "integrity", "exceptions"),
}


def ear(appraisal: Appraisal) -> dict[str, Any]:
    """An appraisal as the claims of an EAR, ready for JSON; whoever vouches for it signs it."""
    vector = {}
    for claim, names in _VECTOR.items():
        checks = [one for one in appraisal.checks if one.name.partition(":")[0] in names]
        vector[claim] = worst(checks).number if checks else 0
    submodule: dict[str, Any] = {
        "ear.status": appraisal.verdict.value,
        "ear.trustworthiness-vector": vector,
        "ear.appraisal-policy-id": appraisal.policy,
        "mktme.checks": [
            {"name": one.name, "verdict": one.verdict.value, "reason": one.reason}
            for one in appraisal.checks
        ],
    }
    if (boot := appraisal.boot) is not None:
        submodule["mktme.boot"] = {
            "boot-loaders": [digest.hex() for digest in boot.boot_loaders],
            "commands": list(boot.commands),
            "files": [{"name": one.label, "sha256": one.sha256.hex()} for one in boot.files],
        }
    result: dict[str, Any] = {
        "eat_profile": EAR_PROFILE,
        "iat": appraisal.at,
        "ear.verifier-id": _VERIFIER,
        "submods": {"none" if appraisal.vm is None else str(appraisal.vm): submodule},
    }
    if appraisal.evidence is not None:
        nonce = base64.urlsafe_b64encode(appraisal.evidence.nonce).decode().rstrip("=")
        result["eat_nonce"] = nonce
        result["ueid"] = base64.urlsafe_b64encode(appraisal.evidence.ueid).decode().rstrip("=")
    return result
