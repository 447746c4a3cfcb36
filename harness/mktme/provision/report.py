# SPDX-License-Identifier: GPL-2.0-or-later
"""What `mktme provision` says, as JSON for programs (docs/schema/provision-*.json).

No secret, no mark of one and no key is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from mktme.provision import wire
from mktme.provision.apply import Outcome, Result
from mktme.provision.plan import Action, Plan, Step
from mktme.provision.state import Condition, Facts, State, VmState


@dataclass(frozen=True, slots=True)
class VmReport:
    """A VM that there is.

    Attributes:
        keyid: what its memory is under.
        trouble: why it does not run, None if it does.
        failed: checks of its last appraisal that did not affirm.
        secrets: those that it has: where, whose, with which mode.
    """

    name: str
    uuid: UUID
    keyid: int
    condition: Condition
    trouble: str | None
    failed: tuple[str, ...]
    image: str
    memory: str
    vcpus: str
    datapath: str
    algorithm: str
    key: str
    policy: str
    reference: str
    secrets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """A check that did not affirm."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ResultReport:
    """A step that was done, or was to be.

    Attributes:
        reason: why it did not end well; empty if it did.
        failed: checks that did not affirm.
        duration_s: seconds.
    """

    subject: str
    action: Action
    outcome: Outcome
    reason: str
    failed: tuple[CheckReport, ...]
    duration_s: float


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The document of `mktme provision plan`.

    Attributes:
        name: of the deployment.
        changes: whether anything is to be done.
        steps: in their order.
        vms: that there are.
    """

    schema: Literal["mktme.provision-plan"]
    version: Literal[1]
    name: str
    changes: bool
    steps: tuple[Step, ...]
    vms: tuple[VmReport, ...]


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """The document of `mktme provision apply`.

    Attributes:
        well: whether all ended as wanted.
        results: of what was to be done, in its order.
        control_socket: where observers connect to the engine; None if there is none.
        vms: that there are now.
    """

    schema: Literal["mktme.provision-apply"]
    version: Literal[1]
    name: str
    well: bool
    results: tuple[ResultReport, ...]
    control_socket: str | None
    vms: tuple[VmReport, ...]


@dataclass(frozen=True, slots=True)
class DestroyReport:
    """The document of `mktme provision destroy`; otherwise as `ApplyReport`."""

    schema: Literal["mktme.provision-destroy"]
    version: Literal[1]
    name: str
    well: bool
    results: tuple[ResultReport, ...]


def plan_report(planned: wire.Planned) -> PlanReport:
    """A plan."""
    one: Plan = planned.plan
    return PlanReport(
        "mktme.provision-plan", 1, one.name, not one.is_empty, one.steps, vms(planned.state)
    )


def apply_report(name: str, results: tuple[Result, ...], state: State) -> ApplyReport:
    """What was done, and what there is now."""
    socket = None if state.platform is None else str(state.platform.control_socket)
    done = is_well(results)
    reports = tuple(map(result_report, results))
    return ApplyReport("mktme.provision-apply", 1, name, done, reports, socket, vms(state))


def destroy_report(name: str, results: tuple[Result, ...]) -> DestroyReport:
    """What was taken down."""
    reports = tuple(map(result_report, results))
    return DestroyReport("mktme.provision-destroy", 1, name, is_well(results), reports)


def is_well(results: tuple[Result, ...]) -> bool:
    """Whether all ended as wanted."""
    return all(one.outcome is Outcome.DONE for one in results)


def result_report(result: Result) -> ResultReport:
    """A step that was done."""
    return ResultReport(
        result.step.subject,
        result.step.action,
        result.outcome,
        result.reason,
        tuple(CheckReport(one.name, one.reason) for one in result.failed),
        round(result.duration_s, 3),
    )


def vms(state: State) -> tuple[VmReport, ...]:
    """The VMs that there are."""
    return tuple(map(vm_report, state.vms))


def vm_report(vm: VmState) -> VmReport:
    """A VM that there is."""
    facts: Facts = vm.facts
    return VmReport(
        name=vm.name,
        uuid=vm.uuid,
        keyid=vm.keyid,
        condition=vm.condition,
        trouble=vm.trouble,
        failed=vm.failed,
        image=facts.image,
        memory=facts.memory,
        vcpus=facts.vcpus,
        datapath=facts.datapath,
        algorithm=facts.algorithm,
        key=facts.key,
        policy=facts.policy,
        reference=facts.reference,
        secrets=tuple(one.text for one in facts.secrets),
    )
