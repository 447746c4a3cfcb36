# SPDX-License-Identifier: GPL-2.0-or-later
"""What is to be done: steps from what there is to what is wanted. A pure function, and its words.

Steps come in the order in which they are done: the platform, then VMs that go (their KeyIDs and
their DRAM are free then), VMs that come, and those that change in place.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

import msgspec

from mktme.provision.errors import ProvisionError
from mktme.provision.state import (
    IN_PLACE,
    Condition,
    Facts,
    PlatformState,
    SecretFact,
    State,
    VmState,
    Wanted,
    size_text,
)
from mktme.provision.tenants import Deployment
from mktme.vm.config import region_bytes

PLATFORM: Final = "platform"
"""Subject of the platform's step; VMs' names have a dot."""
_NONE: Final = "-"


class Action(enum.Enum):
    """What is done to a VM or the platform."""

    CREATE = "create"
    REPLACE = "replace"
    """Taken down, and made anew: its memory is gone."""
    UPDATE = "update"
    """Changed while it runs, and attested anew."""
    DELETE = "delete"
    NOTHING = "unchanged"


@dataclass(frozen=True, slots=True)
class Change:
    """Drift of one fact.

    Attributes:
        old: what is; "-" for nothing.
        new: what is wanted.
    """

    field: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do.

    Attributes:
        subject: a VM, ``tenant.vm``, or `PLATFORM`.
        reason: why just this, where the changes do not say it.
        changes: what differs.
    """

    action: Action
    subject: str
    reason: str = ""
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps, in their order; those that do nothing come last."""

    name: str
    steps: tuple[Step, ...]

    @property
    def is_empty(self) -> bool:
        """Whether all is as wanted."""
        return all(one.action is Action.NOTHING for one in self.steps)

    def count(self, action: Action) -> int:
        """How many VMs it does this to."""
        return sum(one.action is action and one.subject != PLATFORM for one in self.steps)


_ORDER: Final = (Action.DELETE, Action.REPLACE, Action.CREATE, Action.UPDATE, Action.NOTHING)


def plan(wanted: Wanted, state: State, only: frozenset[str] | None = None) -> Plan:
    """Find the steps from what there is to what is wanted.

    Args:
        wanted: what is wanted.
        state: what there is.
        only: VMs that it is about; others stay as they are, and so does the platform. None: all.

    Raises:
        ProvisionError: with `only`, the platform would have to be another one.
    """
    deployment = wanted.deployment
    platform = _platform_step(deployment, state, only)
    replaced = platform is not None and platform.action is Action.REPLACE
    if only is not None and replaced and platform is not None:
        what = ", ".join(f"{one.field} {one.old} -> {one.new}" for one in platform.changes)
        raise ProvisionError(
            f"the platform that runs is another one: {what}",
            hint=f"mktme provision apply replaces it, with all VMs on it; {deployment.name} has"
            f" {len(state.vms)}",
        )
    steps = [
        step for step in _vm_steps(wanted, state, replaced) if only is None or step.subject in only
    ]
    steps.sort(key=lambda one: (_ORDER.index(one.action), one.subject))
    return Plan(deployment.name, (() if platform is None else (platform,)) + tuple(steps))


def _vm_steps(wanted: Wanted, state: State, replaced: bool) -> Iterator[Step]:
    names = [one.name for one in wanted.deployment.vms]
    for one in state.vms:
        if one.name not in names:
            yield Step(Action.DELETE, one.name, "nobody wants it any more")
    for name, facts in zip(names, wanted.facts, strict=True):
        there = state.vm(name)
        if there is None:
            yield Step(Action.CREATE, name, changes=_all(facts))
        else:
            yield _compared(there, facts, replaced)


def _compared(there: VmState, facts: Facts, replaced: bool) -> Step:
    changes = _changes(there.facts, facts)
    lasting = [one.field for one in changes if one.field not in IN_PLACE]
    if replaced:
        return Step(Action.REPLACE, there.name, "its platform is replaced", changes)
    if there.condition is Condition.LOST:
        return Step(Action.REPLACE, there.name, f"it is lost: {there.trouble}", changes)
    if lasting:
        what = " and ".join(filter(None, [", ".join(lasting[:-1]), lasting[-1]]))
        return Step(Action.REPLACE, there.name, f"{what} cannot change in place", changes)
    if there.condition is Condition.HELD:
        return Step(Action.UPDATE, there.name, "it is held", changes)
    if changes:
        return Step(Action.UPDATE, there.name, "", changes)
    return Step(Action.NOTHING, there.name)


def _platform_step(
    deployment: Deployment, state: State, only: frozenset[str] | None
) -> Step | None:
    there = state.platform
    if there is None:
        if not deployment.vms:
            return None
        dram = Change("dram", _NONE, size_text(deployment.dram_bytes))
        return Step(Action.CREATE, PLATFORM, changes=(dram,))
    if only is not None and not deployment.vms:
        return Step(Action.NOTHING, PLATFORM)
    staying = sum(
        region_bytes(one.memory_bytes)
        for one in state.vms
        if only is not None and one.name not in only
    )
    changes = tuple(_platform_changes(deployment, there, staying))
    return Step(Action.REPLACE if changes else Action.NOTHING, PLATFORM, changes=changes)


def _platform_changes(
    deployment: Deployment, there: PlatformState, staying: int
) -> Iterator[Change]:
    for one in msgspec.structs.fields(deployment.platform):
        if one.name == "dram":
            continue
        old, new = getattr(there.config, one.name), getattr(deployment.platform, one.name)
        if old != new:
            yield Change(one.encode_name, _text(old), _text(new))
    for name in ("emulator", "ca"):
        old, new = getattr(there, name), getattr(deployment, name)
        if old != new:
            yield Change(name, _text(old), _text(new))
    # A larger one than needed does as well, unless its file says what it is to be.
    need = deployment.platform.dram or deployment.need_bytes + staying
    if need > there.dram_bytes or (deployment.platform.dram and need != there.dram_bytes):
        yield Change("dram", size_text(there.dram_bytes), size_text(need))


def _changes(old: Facts, new: Facts) -> tuple[Change, ...]:
    return tuple(
        Change(one.name, _text(getattr(old, one.name)), _text(getattr(new, one.name)))
        if one.name != "secrets"
        else _secrets_change(old.secrets, new.secrets)
        for one in fields(Facts)
        if getattr(old, one.name) != getattr(new, one.name)
    )


def _secrets_change(old: tuple[SecretFact, ...], new: tuple[SecretFact, ...]) -> Change:
    """Which secrets differ; of contents, no more than that they do."""
    before, after = {one.text: one.mark for one in old}, {one.text: one.mark for one in new}
    if before.keys() == after.keys():
        text = ", ".join(text for text in after if before[text] != after[text])
        return Change("secrets", text, f"{text}: other contents")
    return Change("secrets", ", ".join(before) or _NONE, ", ".join(after) or _NONE)


def _all(facts: Facts) -> tuple[Change, ...]:
    """What a VM is to be that is not there yet."""
    return tuple(
        Change(one.name, _NONE, text)
        for one in fields(Facts)
        if (text := _text(getattr(facts, one.name))) != _NONE
    )


def _text(value: object) -> str:
    match value:
        case None | ():
            return _NONE
        case enum.Enum():
            return str(value.value)
        case bool():
            return str(value).lower()
        case tuple():
            return ", ".join(_text(one) for one in value)
        case SecretFact():
            return value.text
    return str(value)
