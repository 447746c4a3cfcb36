# SPDX-License-Identifier: GPL-2.0-or-later
"""Doing what was planned: each VM proves itself before its first instruction, and again after it.

Of a VM, in this order, and each only if all before it was affirmed::

    launch      QEMU is loaded, no instruction has run
    key         source broker: evidence to the broker, its JWE to the engine
    appraise    by the tenant's policy and reference values
    boot
    appraise    again: it runs now, and is still what it was
    hand over   its secrets

`Provisioner` knows the order and remembers; what it gives orders to is behind `Bench` and `Guest`
(`mktme.provision.guests` has the real ones). A step that fails leaves what other steps did; the
next plan says what is still to be done.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from mktme.attest.identity import Trust, load_trust
from mktme.attest.result import Check, RefusedError
from mktme.engine.errors import MktmeError
from mktme.provision.attestation import Attester, Criteria, appraise
from mktme.provision.errors import ProvisionError
from mktme.provision.plan import PLATFORM, Action, Plan, Step, plan
from mktme.provision.secrets import Marks
from mktme.provision.state import (
    Condition,
    Facts,
    PlatformState,
    SecretFact,
    State,
    VmState,
    wanted,
)
from mktme.provision.tenants import Broker, Deployment, KeySource, OnRefusal, Secret, VmSpec
from mktme.vm.console import VmError
from mktme.vm.pages import GuestPages

log = logging.getLogger(__name__)


class Guest(Attester, Protocol):
    """A VM that was launched, and is there until `close`."""

    @property
    def keyid(self) -> int:
        """What its memory is under."""
        ...

    def facts(self, spec: VmSpec, criteria: Criteria, secrets: tuple[SecretFact, ...]) -> Facts:
        """What it is now: as its engine and libvirt have it, the rest as given.

        Raises:
            MktmeError: they do not say.
        """
        ...

    def trouble(self) -> str | None:
        """Why it is lost, None if it is not."""
        ...

    def release(self, jwe: bytes) -> None:
        """Give it the key that a broker encrypted to it."""
        ...

    def boot(self) -> None:
        """Let it run for the first time, to its shell."""
        ...

    def hold(self) -> None:
        """Stop its vCPUs."""
        ...

    def resume(self) -> None:
        """Let them go on."""
        ...

    def assign(self, old: Collection[GuestPages], new: Collection[GuestPages]) -> None:
        """Give ranges of its pages back, and others to other KeyIDs."""
        ...

    def look(self, secrets: Collection[Secret], marks: Marks) -> tuple[SecretFact, ...]:
        """Which of some secrets are in it."""
        ...

    def hand_over(self, secret: Secret) -> None:
        """Write a secret into it."""
        ...

    def withdraw(self, path: str) -> None:
        """Remove one."""
        ...

    def close(self) -> None:
        """Take it down; nothing of it is left."""
        ...


class Bench(Protocol):
    """A platform that runs, until `close`."""

    def state(self) -> PlatformState:
        """What it is."""
        ...

    def roots(self) -> Trust:
        """The CA that vouches for it, as the engine that was started here says."""
        ...

    def launch(self, spec: VmSpec, tell: Narrator) -> Guest:
        """Load a VM; no instruction of it runs yet."""
        ...

    def wait_ended(self) -> None:
        """Wait until its engine ends, also by `close`."""
        ...

    def abort(self) -> None:
        """Have whoever waits for a VM give up, from any thread; `close` is next."""
        ...

    def close(self) -> None:
        """Take it down."""
        ...


OpenBench = Callable[[Deployment, "Narrator"], Bench]
FetchKey = Callable[[Attester, VmSpec, Broker], bytes]


class Narrator(Protocol):
    """Is told how it goes on; as `mktme.proof.runs.Narrator`."""

    def step(self, what: str) -> AbstractContextManager[object]:
        """A step that begins now."""
        ...

    def notice(self, line: str) -> None:
        """Something is not as it was asked for."""
        ...


class Outcome(enum.Enum):
    """How a step ended."""

    DONE = "done"
    REFUSED = "refused"
    """Its evidence was, or the broker gave no key: no secret was sent."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """What it needs has failed."""


@dataclass(frozen=True, slots=True)
class Result:
    """A step, and how it ended.

    Attributes:
        reason: why it did not end well; empty if it did.
        hint: what can be done about it.
        failed: checks that did not affirm.
        duration_s: seconds.
    """

    step: Step
    outcome: Outcome
    reason: str = ""
    hint: str | None = None
    failed: tuple[Check, ...] = ()
    duration_s: float = 0.0


@dataclass(slots=True)
class _Record:
    """What the provisioner remembers of a VM.

    Attributes:
        criteria: of its last appraisal.
        keyed: whether it has its own key.
        booted: whether it was ever let run.
        held: why it is held, None if it is not.
        handed: the secrets that it was given.
        last: its facts when it could last be asked.
    """

    spec: VmSpec
    guest: Guest
    criteria: Criteria
    last: Facts
    keyed: bool = False
    booted: bool = False
    held: str | None = None
    failed: tuple[Check, ...] = ()
    handed: tuple[Secret, ...] = ()


@dataclass(slots=True)
class Provisioner:
    """Holds a platform and its VMs, and makes them what is wanted. Not for several threads.

    Attributes:
        open_bench: brings a platform up.
        fetch_key: attests a VM to a broker, and returns the JWE with its key.
    """

    open_bench: OpenBench
    fetch_key: FetchKey
    _marks: Marks = field(default_factory=Marks)
    _bench: Bench | None = None
    _records: dict[str, _Record] = field(default_factory=dict)

    @property
    def bench(self) -> Bench | None:
        """The platform, if one runs."""
        return self._bench

    def state(self) -> State:
        """What there is now."""
        if self._bench is None:
            return State()
        vms = (self._vm_state(name, self._records[name]) for name in sorted(self._records))
        return State(self._bench.state(), tuple(vms))

    def plan(self, deployment: Deployment, only: frozenset[str] | None = None) -> Plan:
        """What is to be done; arguments as `mktme.provision.plan.plan` has them."""
        return plan(wanted(deployment, self._marks.of_file), self.state(), only)

    def apply(
        self,
        deployment: Deployment,
        tell: Narrator,
        only: frozenset[str] | None = None,
        go_on: Callable[[], bool] = lambda: True,
    ) -> tuple[Result, ...]:
        """Do what is to be done, and say how each step ended.

        Args:
            deployment: what is wanted.
            tell: is told how it goes on.
            only: VMs that it is about; None: all.
            go_on: asked before each step whether it is still wanted.

        Raises:
            MktmeError: it cannot even be planned.
        """
        steps = [
            one for one in self.plan(deployment, only).steps if one.action is not Action.NOTHING
        ]
        specs = {one.name: one for one in deployment.vms}
        results: list[Result] = []
        for step in steps:
            lost = self._bench is None and step.subject != PLATFORM
            if lost or not go_on():
                reason = "there is no platform" if lost else "it is not wanted any more"
                results.append(Result(step, Outcome.SKIPPED, reason))
                continue
            run = partial(self._do, step, specs.get(step.subject), deployment, tell)
            results.append(self._told(tell, step, run))
        return tuple(results)

    def destroy(self, tell: Narrator) -> tuple[Result, ...]:
        """Take all VMs and the platform down."""
        results = [
            self._told(tell, Step(Action.DELETE, name), partial(self._remove, name))
            for name in sorted(self._records)
        ]
        if self._bench is not None:
            results.append(self._told(tell, Step(Action.DELETE, PLATFORM), self.close))
        return tuple(results)

    def close(self) -> None:
        """Take down all that there is."""
        with contextlib.ExitStack() as stack:
            if self._bench is not None:
                stack.callback(self._bench.close)
                self._bench = None
            for name in self._records:
                stack.callback(self._records[name].guest.close)
            self._records = {}

    # --- steps --------------------------------------------------------------------------------

    def _do(self, step: Step, spec: VmSpec | None, deployment: Deployment, tell: Narrator) -> None:
        if step.subject == PLATFORM:
            self.close()
            self._bench = self.open_bench(deployment, tell)
            return
        if step.action in (Action.DELETE, Action.REPLACE):
            self._remove(step.subject)
        if spec is None:
            return
        if step.action is not Action.UPDATE:
            self._launch(spec, deployment, tell)
            self._advance(spec.name, deployment, fresh=True)
            return
        before = self._records[spec.name].criteria
        self._update(spec, deployment)
        try:
            self._advance(spec.name, deployment, fresh=False)
        except RefusedError:
            raise
        except Exception:
            if record := self._records.get(spec.name):
                record.criteria = before  # it was not appraised by the new ones: still drift
            raise

    def _told(self, tell: Narrator, step: Step, run: Callable[[], None]) -> Result:
        """Do a step, and tell of it; whatever comes of it is its result."""
        started = time.monotonic()
        outcome, reason, hint = Outcome.DONE, "", None
        failed: tuple[Check, ...] = ()
        try:
            with tell.step(f"{step.action.value} {step.subject}"):
                run()
        except RefusedError as error:
            outcome, reason, failed = Outcome.REFUSED, str(error), error.checks
        except MktmeError as error:
            log.info("%s %s failed: %s", step.action.value, step.subject, error)
            outcome, reason, hint = Outcome.FAILED, str(error), error.hint
        except OSError as error:  # a full disk, say: the other steps may do all the same
            log.warning("%s %s failed: %s", step.action.value, step.subject, error)
            outcome, reason = Outcome.FAILED, str(error)
        return Result(step, outcome, reason, hint, failed, time.monotonic() - started)

    def _launch(self, spec: VmSpec, deployment: Deployment, tell: Narrator) -> None:
        assert self._bench is not None
        criteria = Criteria.of(spec, deployment.trust)
        guest = self._bench.launch(spec, tell)
        try:
            facts = guest.facts(spec, criteria, ())
            self._records[spec.name] = _Record(spec, guest, criteria, facts)
        except BaseException:
            guest.close()
            raise

    def _update(self, spec: VmSpec, deployment: Deployment) -> None:
        """Change what can be changed in place; `_advance` does the rest."""
        record = self._records[spec.name]
        criteria = Criteria.of(spec, deployment.trust)
        if record.spec.pages != spec.pages:
            record.guest.assign(record.spec.pages, spec.pages)
        record.spec, record.criteria = spec, criteria

    def _advance(self, name: str, deployment: Deployment, *, fresh: bool) -> None:
        """Bring a VM to where it runs, has proved that, and has its secrets.

        Args:
            name: which.
            deployment: what is wanted.
            fresh: whether it was launched for this.
        """
        record = self._records[name]
        try:
            if record.spec.source is KeySource.BROKER and not record.keyed:
                self._key(record, deployment.broker)
            self._require(record, deployment)
            if not record.booted:
                # It runs from here on, held before or not; until it has proved itself as it runs,
                # whatever fails takes it down.
                record.booted, record.held, fresh = True, None, True
                record.guest.boot()
                self._require(record, deployment)
            elif record.held is not None:
                record.guest.resume()
            record.held, record.failed = None, ()
        except RefusedError as error:
            self._refuse(record, error, deployment.on_refusal)
            raise
        except Exception:
            if fresh:  # it has proved nothing, and is not worth holding
                self._remove(name)
            raise
        self._hand_over(record)

    def _key(self, record: _Record, broker: Broker | None) -> None:
        """Have the broker release the VM's key to the engine."""
        if broker is None:
            raise ProvisionError(f"{record.spec.name}: there is no broker to have its key from")
        record.guest.release(self.fetch_key(record.guest, record.spec, broker))
        record.keyed = True

    def _require(self, record: _Record, deployment: Deployment) -> None:
        """Ask for evidence, and go on only if all of it is affirmed.

        Raises:
            RefusedError: it is not.
        """
        appraisal = appraise(
            record.guest,
            record.criteria,
            self._trust(deployment),
            record.spec.source,
            running=record.booted,
        )
        record.failed = appraisal.failed
        appraisal.require()

    def _trust(self, deployment: Deployment) -> Trust:
        if deployment.trust:
            return load_trust(deployment.trust)
        assert self._bench is not None
        return self._bench.roots()

    def _refuse(self, record: _Record, error: RefusedError, what: OnRefusal) -> None:
        record.failed = error.checks
        if what is OnRefusal.REMOVE:
            self._remove(record.spec.name)
            return
        if record.booted and record.held is None:
            try:
                record.guest.hold()
            except MktmeError:
                self._remove(record.spec.name)
                raise
        record.held = str(error)

    def _hand_over(self, record: _Record) -> None:
        """Make the secrets in a guest those that it is to have."""
        guest, spec = record.guest, record.spec
        wanted_paths = {one.path for one in spec.secrets}
        for one in record.handed:
            if one.path not in wanted_paths:
                guest.withdraw(one.path)
        there = set(guest.look(spec.secrets, self._marks))
        record.handed = spec.secrets
        for one in spec.secrets:
            if SecretFact(str(one), self._marks.of_file(one.file)) not in there:
                guest.hand_over(one)

    def _secrets(self, record: _Record, condition: Condition) -> tuple[SecretFact, ...]:
        """Those that a guest has. One that does not answer is not lost for that: it may be slow."""
        if condition is Condition.RUNNING:
            with contextlib.suppress(VmError):
                return record.guest.look(record.handed, self._marks)
        return ()

    def _remove(self, name: str) -> None:
        record = self._records.pop(name, None)  # its platform may have gone, and it with that
        if record is not None:
            record.guest.close()

    # --- what there is ------------------------------------------------------------------------

    def _vm_state(self, name: str, record: _Record) -> VmState:
        condition, trouble = Condition.RUNNING, record.guest.trouble()
        if trouble is not None:
            condition = Condition.LOST
        elif record.held is not None:
            condition, trouble = Condition.HELD, record.held
        facts = record.last
        if condition is not Condition.LOST:
            try:
                facts = record.guest.facts(
                    record.spec, record.criteria, self._secrets(record, condition)
                )
                record.last = facts
            except VmError as error:
                condition, trouble = Condition.LOST, str(error)
        return VmState(
            name=name,
            uuid=record.guest.uuid,
            keyid=record.guest.keyid,
            memory_bytes=record.spec.memory_bytes,
            condition=condition,
            facts=facts,
            trouble=trouble,
            failed=tuple(one.name for one in record.failed),
        )
