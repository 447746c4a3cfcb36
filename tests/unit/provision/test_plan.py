# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans: what is compared with what, and that what was applied needs nothing more."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mktme.provision.errors import ProvisionError, TenantsError
from mktme.provision.plan import PLATFORM, Action, Change, Plan, Step, plan
from mktme.provision.state import State, wanted
from mktme.provision.tenants import DRAM_LEAST_BYTES, Deployment
from mktme.provision.tenants_file import deployment

from .bench import Quiet, Site, write_files
from .conftest import Want


def step(found: Plan, subject: str = "alice.web") -> Step:
    (one,) = (each for each in found.steps if each.subject == subject)
    return one


def test_what_is_not_there_is_created(want: Want) -> None:
    found = plan(wanted(want({"alice.web": {}, "bob.db": {"datapath": "inline"}})), State())
    assert [(one.action, one.subject) for one in found.steps] == [
        (Action.CREATE, PLATFORM),
        (Action.CREATE, "alice.web"),
        (Action.CREATE, "bob.db"),
    ]
    assert Change("window", "-", "64M") in step(found, "bob.db").changes
    assert Change("dram", "-", "4G") in step(found, PLATFORM).changes


def test_what_nobody_wants_goes_first(site: Site, want: Want) -> None:
    site.provisioner.apply(want({"alice.web": {}, "bob.db": {}}), Quiet())
    found = site.provisioner.plan(want({"alice.web": {}, "carol.ci": {}}))
    assert [(one.action, one.subject) for one in found.steps[1:]] == [
        (Action.DELETE, "bob.db"),
        (Action.CREATE, "carol.ci"),
        (Action.NOTHING, "alice.web"),
    ]


@pytest.mark.parametrize(
    ("changes", "action", "drift", "reason"),
    [
        (
            {"memory": "512M"},
            Action.REPLACE,
            [Change("memory", "256M", "512M")],
            "memory cannot change in place",
        ),
        (
            {"vcpus": 2, "algorithm": "aes-xts-256"},
            Action.REPLACE,
            [Change("vcpus", "1", "2"), Change("algorithm", "aes-xts-128", "aes-xts-256")],
            "vcpus and algorithm cannot change in place",
        ),
        (
            {"pages": ["16M@64M=shared", "16M@80M=shared"]},
            Action.UPDATE,
            [Change("pages", "-", "32M@64M=shared")],
            "",
        ),
        ({"boot-timeout": 30}, Action.NOTHING, [], ""),
    ],
)
def test_drift_is_shown_field_by_field(
    site: Site,
    want: Want,
    changes: dict[str, Any],
    action: Action,
    drift: list[Change],
    reason: str,
) -> None:
    site.provisioner.apply(want(), Quiet())
    found = step(site.provisioner.plan(want({"alice.web": changes})))
    assert (found.action, list(found.changes), found.reason) == (action, drift, reason)


def test_changed_policy_is_an_update(site: Site, want: Want, files: Path) -> None:
    site.provisioner.apply(want(), Quiet())
    with (files / "policy.toml").open("a") as file:
        file.write("clock-skew-s = 10\n")
    found = step(site.provisioner.plan(want()))
    assert found.action is Action.UPDATE
    assert [one.field for one in found.changes] == ["policy"]


def test_platform_that_is_larger_than_needed_stays(site: Site, want: Want, files: Path) -> None:
    site.provisioner.apply(want(), Quiet())
    more: dict[str, dict[str, Any]] = {
        f"alice.vm{number}": {} for number in range(DRAM_LEAST_BYTES // (256 << 20) + 1)
    }
    some = dict(list(more.items())[:-1])
    assert step(site.provisioner.plan(want(some)), PLATFORM).action is Action.NOTHING
    found = site.provisioner.plan(want(more))
    assert step(found, PLATFORM).changes == (Change("dram", "4G", "4352M"),)
    assert step(found, PLATFORM).action is Action.REPLACE


def test_others_are_left_alone_when_it_is_about_one(site: Site, want: Want) -> None:
    site.provisioner.apply(want({"alice.web": {}, "bob.db": {}}), Quiet())
    changed = want({"alice.web": {"memory": "512M"}})
    only = frozenset({"alice.web"})
    found = site.provisioner.plan(changed, only)
    assert [one.subject for one in found.steps] == [PLATFORM, "alice.web"]
    site.provisioner.apply(changed, Quiet(), only)
    assert {one.name for one in site.provisioner.state().vms} == {"alice.web", "bob.db"}

    gone = site.provisioner.plan(Deployment(name="bench"), frozenset({"bob.db"}))
    assert [(one.action, one.subject) for one in gone.steps] == [
        (Action.NOTHING, PLATFORM),
        (Action.DELETE, "bob.db"),
    ]


def test_one_vm_does_not_replace_the_platform_of_others(
    site: Site, want: Want, files: Path
) -> None:
    site.provisioner.apply(want({"alice.web": {}, "bob.db": {}}), Quiet())
    (files / "platform.toml").write_text("keyid-bits = 4\n")
    other = want({"alice.web": {}}, platform="platform.toml")
    with pytest.raises(ProvisionError, match="keyid-bits 6 -> 4") as caught:
        site.provisioner.plan(other, frozenset({"alice.web"}))
    assert caught.value.hint is not None


# --- what was applied needs nothing more --------------------------------------------------------


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as one:
        write_files(Path(one))
        yield Path(one)


names = st.sampled_from(["web", "db", "ci"])
vms = st.fixed_dictionaries(
    {"memory": st.sampled_from(["192M", "256M", "512M"])},
    optional={
        "vcpus": st.integers(1, 3),
        "datapath": st.sampled_from(["shadow", "inline"]),
        "window": st.sampled_from(["25%", "64M"]),
        "algorithm": st.sampled_from(["aes-xts-128", "aes-xts-256", "aes-xts-128-integrity"]),
        "pages": st.lists(
            st.integers(0, 9).flatmap(
                lambda at: st.sampled_from(["shared", "no-encrypt", "other-key"]).map(
                    lambda use: f"16M@{at * 16}M={use}"
                )
            ),
            max_size=3,
        ),
        "boot-timeout": st.integers(1, 100),
    },
)
disk_vms = st.fixed_dictionaries(
    {"guest": st.just("debian-12"), "memory": st.just("512M")},
    optional={
        "secrets": st.lists(st.sampled_from(["/run/a", "/run/b"]), unique=True).map(
            lambda paths: [{"file": "token", "path": one} for one in paths]
        )
    },
)
tenants = st.dictionaries(
    st.sampled_from(["alice", "bob"]),
    st.dictionaries(names, vms.map(lambda one: {"guest": "tiny"} | one) | disk_vms, min_size=1),
    min_size=1,
)


def parsed(tables: dict[str, Any], where: Path) -> Deployment | None:
    appraised = {"policy": "policy.toml", "reference": "reference.json"}
    wanted_ = {name: appraised | {"vms": of} for name, of in tables.items()}
    try:
        return deployment({"name": "bench", "tenants": wanted_}, where)
    except TenantsError:  # a window of the shadow data path, ranges that overlap, ...
        return None


@settings(max_examples=60)
@given(first=tenants, second=tenants)
def test_plan_of_what_was_applied_is_empty(first: dict[str, Any], second: dict[str, Any]) -> None:
    with directory() as where:
        site = Site()
        for tables in (first, second):
            one = parsed(tables, where)
            if one is None:
                continue
            before = site.provisioner.plan(one)
            results = site.provisioner.apply(one, Quiet())
            done = [each.step for each in results]
            assert done == [each for each in before.steps if each.action is not Action.NOTHING]
            assert {each.outcome.value for each in results} <= {"done"}
            after = site.provisioner.plan(one)
            assert after.is_empty
            assert len(after.steps) == len(one.vms) + 1
        site.provisioner.close()
