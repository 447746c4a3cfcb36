# SPDX-License-Identifier: GPL-2.0-or-later
"""The appraisal of evidence, offline: signature and chain, freshness, reference values, policy.

`verify` raises nothing for what the sender of a token can choose: that is a failed check. Reasons
are for the verifier's side. To who sent the token, say the names of the failed checks at most.
"""

from __future__ import annotations

import datetime as dt
import hmac
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from typing import Final, TypeVar
from uuid import UUID

from mktme.attest.claims import DebugStatus, Evidence, VmClaims, decode_claims
from mktme.attest.errors import AttestationError
from mktme.attest.identity import Trust, load_trust, verify_chain
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.attest.result import Appraisal, Check, Verdict
from mktme.attest.token import Token
from mktme.attest.tpm_quote import MeasuredBoot, QuoteError, TpmQuote, verify_quote

__all__ = ["load_trust", "verify"]

_BITS_PER_BYTE: Final = 8
_T = TypeVar("_T")


def verify(
    token: bytes,
    *,
    trust: Trust,
    policy: Policy,
    reference: Reference,
    nonce: bytes,
    vm: UUID | None = None,
    now: dt.datetime | None = None,
    report_data: bytes | None = None,
    quote: bytes | None = None,
    quote_nonce: bytes = b"",
) -> Appraisal:
    """Appraise what a platform says of one of its VMs.

    Args:
        token: as it came; it may be anything.
        trust: the CAs that are pinned.
        policy: what is demanded.
        reference: which digests are good.
        nonce: what the platform was asked with.
        vm: which VM; None for the only one that it is about.
        now: when, with a time zone; None for now.
        report_data: what must be in it, 64 bytes; None for whatever is.
        quote: what the VM's vTPM says of its boot, a `TpmQuote` as it came; None if it was not
            asked.
        quote_nonce: the secret of the challenge that it was asked with.
    """
    at = dt.datetime.now(dt.UTC) if now is None else now
    checks: list[Check] = []
    boot = None
    evidence = _open(token, trust, at, checks)
    claims = None
    if evidence is not None:
        checks.append(_freshness(evidence, nonce))
        checks.append(_time(evidence, policy, at))
        claims = _find(evidence, vm)
        checks.append(_vm_check(evidence, vm, claims))
        if claims is not None and report_data is not None:
            checks.append(_report_data(claims, report_data))
        checks += _platform_checks(evidence, claims, policy, reference)
        if claims is not None:
            checks += _vm_checks(claims, policy, reference)
            check, boot = _quote(claims, quote, quote_nonce, policy, reference)
            checks.append(check)
    return Appraisal(
        checks=tuple(checks),
        evidence=evidence,
        vm=vm if claims is None else claims.uuid,
        policy=policy.name,
        at=int(at.timestamp()),
        boot=boot,
    )


def _open(token: bytes, trust: Trust, at: dt.datetime, checks: list[Check]) -> Evidence | None:
    """What a platform signed that a pinned CA vouches for; None if it is not that."""

    def made(name: str, step: Callable[[], _T], reason: str) -> _T | None:
        try:
            result = step()
        except AttestationError as error:
            checks.append(_no(name, str(error)))
            return None
        checks.append(_yes(name, reason))
        return result

    parsed = made("format", lambda: Token.parse(token), "COSE_Sign1 of a CWT, with certificates")
    if parsed is None:
        return None
    payload = made("signature", lambda: parsed.verify(parsed.key()), "ES256, of its certificate")
    if payload is None:
        return None
    ueid = made(
        "chain", lambda: verify_chain(parsed.chain, trust, at), "a platform's, of a pinned CA"
    )
    if ueid is None:
        return None
    try:
        evidence = decode_claims(payload)
    except AttestationError as error:
        checks[0] = _no("format", str(error))
        return None
    if evidence.ueid != ueid:
        checks[-1] = _no("chain", "the certificate is another platform's")
        return None
    return evidence


def _freshness(evidence: Evidence, nonce: bytes) -> Check:
    if hmac.compare_digest(evidence.nonce, nonce):
        return _yes("freshness", "it has the nonce that was asked with")
    return _no("freshness", "another nonce: it answers another question")


def _time(evidence: Evidence, policy: Policy, at: dt.datetime) -> Check:
    age = at.timestamp() - evidence.issued_at
    if age < -policy.clock_skew_s:
        return _no("time", f"signed {-age:.0f} s from now, {policy.clock_skew_s} s are allowed")
    most = policy.lifetime_s + policy.clock_skew_s
    if age > most:
        return _no("time", f"{age:.0f} s old, {most} s are allowed")
    return _yes("time", f"{max(age, 0):.0f} s old")


def _find(evidence: Evidence, vm: UUID | None) -> VmClaims | None:
    if vm is not None:
        return evidence.vm(vm)
    return evidence.vms[0] if len(evidence.vms) == 1 else None


def _vm_check(evidence: Evidence, vm: UUID | None, claims: VmClaims | None) -> Check:
    if claims is not None:
        return _yes("vm", f"{claims.name}, {claims.uuid}")
    if vm is not None:
        return _no("vm", f"nothing is said of {vm}")
    return _no("vm", f"it is of {len(evidence.vms)} VMs, and none was named")


def _report_data(claims: VmClaims, wanted: bytes) -> Check:
    if hmac.compare_digest(claims.report_data, wanted):
        return _yes("report-data", "as asked for")
    return _no("report-data", "not what was asked for")


def _platform_checks(
    evidence: Evidence, claims: VmClaims | None, policy: Policy, reference: Reference
) -> Iterator[Check]:
    tme = evidence.tme
    yield _decide(
        "locked", tme.locked, "TME is enabled and its registers locked", "TME is not locked"
    )
    if tme.excludes or tme.bypasses:
        what = "leaves a range unencrypted" if tme.excludes else "is bypassed"
        yield _decide(
            "exclusion", policy.exclusion_range, f"KeyID 0 {what}: allowed", f"KeyID 0 {what}"
        )
    else:
        yield _yes("exclusion", "KeyID 0 encrypts all that it has")
    open_ = [
        name
        for name, entity in (("the engine", evidence), ("QEMU", claims))
        if entity is not None and entity.debug is DebugStatus.ENABLED
    ]
    if open_:
        what = f"{' and '.join(open_)} can be debugged"
        yield _decide("debug", policy.debug, f"{what}: allowed", what)
    else:
        yield _yes("debug", "off")
    yield _decide(
        "code",
        evidence.code in reference.code,
        f"engine {evidence.version}, as in the reference",
        f"engine {evidence.version} has code that is not in the reference",
    )


def _vm_checks(vm: VmClaims, policy: Policy, reference: Reference) -> Iterator[Check]:
    yield from _launch(vm, reference)
    yield _key_size(vm, policy)
    yield _decide(
        "key-mode",
        vm.mode in policy.key_modes,
        f"{vm.mode.value}",
        f"{vm.mode.value}, allowed: {_names(policy.key_modes)}",
    )
    yield _decide(
        "key-source",
        vm.source in policy.key_sources,
        f"{vm.source.value}",
        f"{vm.source.value}, allowed: {_names(policy.key_sources)}",
    )
    yield _data_path(vm, policy)
    yield _decide(
        "integrity",
        vm.integrity or not policy.integrity,
        "each line has a MAC" if vm.integrity else "none is demanded",
        "lines have no MACs",
    )
    yield _exceptions(vm, policy)
    yield _decide("fault", vm.fault is None, "its memory is followed", str(vm.fault))
    if vm.vtpm is None:
        yield _decide("vtpm", not policy.vtpm, "none is demanded", "there is none")
    else:
        yield _yes("vtpm", f"its endorsement key is {vm.vtpm.hex()[:16]}...")


def _launch(vm: VmClaims, reference: Reference) -> Iterator[Check]:
    measured = vm.launch.by_name()
    for name in sorted(measured.keys() | reference.launch.keys()):
        digest = measured.get(name)
        if digest is None:
            yield _no(f"launch:{name}", "in the reference, and not in the evidence")
        elif name not in reference.launch:
            yield _no(f"launch:{name}", "in the evidence, and not in the reference")
        elif (good := reference.launch[name]) is None:
            yield _yes(f"launch:{name}", "may be anything")
        else:
            yield _decide(
                f"launch:{name}",
                digest in good,
                f"{digest.hex()[:16]}..., as in the reference",
                f"{digest.hex()[:16]}... is not in the reference",
            )


def _key_size(vm: VmClaims, policy: Policy) -> Check:
    if vm.algorithm is None:
        return _no("key-size", "it is not encrypted")
    bits = vm.algorithm.key_bytes * _BITS_PER_BYTE // 2  # AES-XTS has two keys (IEEE 1619)
    return _decide(
        "key-size",
        bits >= policy.key_size,
        f"{vm.algorithm.value}: two keys of {bits} bits",
        f"{vm.algorithm.value}: two keys of {bits} bits, {policy.key_size} are demanded",
    )


def _data_path(vm: VmClaims, policy: Policy) -> Check:
    with_ = f" with {'+'.join(vm.trackers)}" if vm.trackers else ""
    found = f"{vm.datapath}{with_}"
    if vm.datapath not in policy.data_paths:
        return _no("data-path", f"{found}, allowed: {', '.join(sorted(policy.data_paths))}")
    if vm.datapath == "shadow" and "pages" not in vm.trackers:
        # FACTS: what devices and firmware write is seen by the page tracker alone.
        return Check("data-path", Verdict.WARNING, f"{found} misses what devices write")
    return _yes("data-path", found)


def _exceptions(vm: VmClaims, policy: Policy) -> Check:
    if not vm.exceptions:
        return _yes("exceptions", "all pages are under its own KeyID")
    kinds = {one.kind for one in vm.exceptions}
    size = sum(one.size_bytes for one in vm.exceptions)
    found = f"{size:,} bytes: {_names(kinds)}"
    if not kinds <= policy.exceptions:
        return _no("exceptions", f"{found}; allowed: {_names(policy.exceptions) or 'none'}")
    if size > policy.exceptions_max:
        return _no("exceptions", f"{found}; {policy.exceptions_max:,} are allowed")
    return _yes("exceptions", f"{found}: allowed")


def _quote(
    vm: VmClaims, quote: bytes | None, nonce: bytes, policy: Policy, reference: Reference
) -> tuple[Check, MeasuredBoot | None]:
    if quote is None:
        check = _decide("vtpm:quote", not policy.quote, "none is demanded", "there is none")
        return check, None
    try:
        answer = TpmQuote.decode(quote)
        boot = verify_quote(answer, vtpm=vm.vtpm, nonce=nonce, reference=reference.pcrs)
    except QuoteError as error:
        return _no(error.check, str(error)), None
    which = ", ".join(map(str, sorted(reference.pcrs)))
    found = f"PCRs {which} as in the reference" if which else "no PCR is in the reference"
    return _yes("vtpm:quote", f"its boot is what the event log says; {found}"), boot


def _names(values: Collection[Enum]) -> str:
    return ", ".join(sorted(str(one.value) for one in values))


def _decide(name: str, good: bool, yes: str, no: str) -> Check:
    return _yes(name, yes) if good else _no(name, no)


def _yes(name: str, reason: str) -> Check:
    return Check(name, Verdict.AFFIRMING, reason)


def _no(name: str, reason: str) -> Check:
    return Check(name, Verdict.CONTRAINDICATED, reason)
