# SPDX-License-Identifier: GPL-2.0-or-later
"""Who proves what before it gets what: the order of steps, and what becomes of those that fail."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest

from mktme.attest.claims import KeySource
from mktme.attest.identity import Identity
from mktme.attest.result import Check, RefusedError, Verdict
from mktme.provision.apply import Outcome, Result
from mktme.provision.plan import PLATFORM, Action
from mktme.provision.state import Condition, SecretFact
from mktme.vm.console import VmError, VmLostError

from .bench import POLICY, FakeBench, FakeGuest, Quiet, Site
from .conftest import Want

SECRET = {"file": "token", "path": "/run/app/token"}
DISK = {"guest": "debian-12", "secrets": [SECRET]}
BROKER = {"url": "https://broker", "trust": "ca.pem"}


def outcomes(results: tuple[Result, ...]) -> dict[str, Outcome]:
    return {one.step.subject: one.outcome for one in results}


@pytest.fixture
def broker_ca(files: Path) -> None:
    (files / "ca.pem").write_bytes(Identity.create().root_pem())


def test_vm_proves_itself_before_and_after_it_runs_and_then_gets_its_secret(
    site: Site, want: Want
) -> None:
    results = site.provisioner.apply(want({"alice.web": DISK}), Quiet())
    assert outcomes(results) == {PLATFORM: Outcome.DONE, "alice.web": Outcome.DONE}
    guest = site.guest("alice.web")
    assert guest.said == ["evidence", "boot", "evidence", "hand over /run/app/token"]
    assert guest.secrets["/run/app/token"][1] == b"correct horse battery staple"


@pytest.mark.usefixtures("broker_ca")
def test_brokers_key_comes_before_anything_runs(site: Site, want: Want) -> None:
    vm = {"key": {"source": "broker", "resource": "alice/key/web"}}
    site.jwe = lambda vm, spec, _broker: vm.evidence(bytes(32)) and str(spec.resource).encode()
    site.provisioner.apply(want({"alice.web": vm}, broker=BROKER), Quiet())
    guest = site.guest("alice.web")
    assert guest.said == ["evidence", "release alice/key/web", "evidence", "boot", "evidence"]


@pytest.mark.usefixtures("broker_ca")
def test_vm_that_the_broker_refuses_never_runs(site: Site, want: Want) -> None:
    def refuse(*_request: object) -> bytes:
        raise RefusedError([Check("broker:launch:kernel", Verdict.CONTRAINDICATED, "denied")])

    site.jwe = refuse
    vm = DISK | {"key": {"source": "broker", "resource": "alice/key/web"}}
    results = site.provisioner.apply(want({"alice.web": vm}, broker=BROKER), Quiet())
    assert outcomes(results)["alice.web"] is Outcome.REFUSED
    assert [one.name for one in results[-1].failed] == ["broker:launch:kernel"]
    (guest,) = site.bench.all_guests
    assert guest.said == ["close"]


@pytest.mark.usefixtures("broker_ca")
def test_vm_that_kept_its_first_key_is_refused(site: Site, want: Want) -> None:
    # The policy allows both sources; who asked for the broker's key is to have that.
    site.prepare = lambda bench: setattr(bench, "make", _deaf)
    vm = DISK | {"key": {"source": "broker", "resource": "alice/key/web"}}
    results = site.provisioner.apply(want({"alice.web": vm}, broker=BROKER), Quiet())
    assert [one.name for one in results[-1].failed] == ["provisioned:key-source"]
    (guest,) = site.bench.all_guests
    assert guest.said == ["evidence", "close"]


def _deaf(guest: FakeGuest) -> None:
    guest.release = lambda jwe: None  # type: ignore[method-assign]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("on_refusal", ["remove", "hold"])
def test_refused_vm_gets_no_secret(site: Site, want: Want, when: str, on_refusal: str) -> None:
    def spoil(guest: FakeGuest) -> None:
        guest.kernel = b"\x99" * 32

    site.prepare = lambda bench: setattr(
        bench, "make" if when == "before" else "when_booted", spoil
    )
    deployment = want({"alice.web": DISK, "bob.db": {}}, **{"on-refusal": on_refusal})
    results = site.provisioner.apply(deployment, Quiet())
    assert outcomes(results)["alice.web"] is Outcome.REFUSED
    assert [one.name for one in results[1].failed] == ["launch:kernel"]
    guest = next(one for one in site.bench.all_guests if one.spec.name == "alice.web")
    ran = ["boot", "evidence"] if when == "after" else []
    last = {("remove", "before"): ["close"], ("remove", "after"): ["close"]}
    last |= {("hold", "before"): [], ("hold", "after"): ["hold"]}
    assert guest.said == ["evidence", *ran, *last[on_refusal, when]]
    assert guest.secrets == {}
    # Another tenant's VM is no worse off: but for this fake's kernel, it would run.
    assert outcomes(results)["bob.db"] is Outcome.REFUSED


def test_held_vm_goes_on_once_it_is_affirmed(site: Site, want: Want, files: Path) -> None:
    deployment = want({"alice.web": DISK}, **{"on-refusal": "hold"})
    (files / "policy.toml").write_text(POLICY.replace("integrity = false", "integrity = true"))
    site.provisioner.apply(deployment, Quiet())
    (state,) = site.provisioner.state().vms
    assert (state.condition, state.failed) == (Condition.HELD, ("integrity",))
    (step,) = (s for s in site.provisioner.plan(deployment).steps if s.subject == "alice.web")
    assert (step.action, step.reason) == (Action.UPDATE, "it is held")

    (files / "policy.toml").write_text(POLICY)
    results = site.provisioner.apply(deployment, Quiet())
    assert outcomes(results) == {"alice.web": Outcome.DONE}
    said = ["evidence", "evidence", "boot", "evidence", "hand over /run/app/token"]
    assert site.guest("alice.web").said == said
    assert site.provisioner.plan(deployment).is_empty


def test_held_vm_is_held_again_if_it_does_not_prove_itself_as_it_runs(
    site: Site, want: Want, files: Path
) -> None:
    deployment = want({"alice.web": {}}, **{"on-refusal": "hold"})
    (files / "policy.toml").write_text(POLICY.replace("integrity = false", "integrity = true"))
    site.provisioner.apply(deployment, Quiet())
    (files / "policy.toml").write_text(POLICY)
    site.bench.when_booted = lambda guest: setattr(guest, "kernel", b"\x99" * 32)
    results = site.provisioner.apply(deployment, Quiet())
    assert outcomes(results) == {"alice.web": Outcome.REFUSED}
    assert site.guest("alice.web").said[-3:] == ["boot", "evidence", "hold"]


def test_held_vm_that_does_not_come_up_is_taken_down(site: Site, want: Want, files: Path) -> None:
    deployment = want({"alice.web": {}}, **{"on-refusal": "hold"})
    (files / "policy.toml").write_text(POLICY.replace("integrity = false", "integrity = true"))
    site.provisioner.apply(deployment, Quiet())
    (files / "policy.toml").write_text(POLICY)

    def fail(_guest: FakeGuest) -> None:
        raise VmError("no shell in time")

    site.bench.when_booted = fail
    results = site.provisioner.apply(deployment, Quiet())
    assert outcomes(results) == {"alice.web": Outcome.FAILED}
    assert site.bench.all_guests[-1].said[-1] == "close"
    assert site.provisioner.state().vms == ()


def test_policy_that_was_not_appraised_by_is_still_to_be_applied(
    site: Site, want: Want, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = want({"alice.web": {}})
    site.provisioner.apply(deployment, Quiet())
    (files / "policy.toml").write_text(POLICY.replace("integrity = false", "integrity = true"))

    def fail(_nonce: bytes) -> bytes:
        raise VmError("no evidence now")

    with monkeypatch.context() as patch:
        patch.setattr(site.guest("alice.web"), "evidence", fail)
        assert outcomes(site.provisioner.apply(deployment, Quiet())) == {
            "alice.web": Outcome.FAILED
        }
    assert not site.provisioner.plan(deployment).is_empty
    results = site.provisioner.apply(deployment, Quiet())
    assert outcomes(results) == {"alice.web": Outcome.REFUSED}


def test_another_ca_is_drift(site: Site, want: Want, files: Path) -> None:
    site.provisioner.apply(want({"alice.web": {}}), Quiet())
    (files / "ca.pem").write_bytes(Identity.create().root_pem())
    pinned = want({"alice.web": {}}, trust=["ca.pem"])
    (step,) = (one for one in site.provisioner.plan(pinned).steps if one.subject != PLATFORM)
    assert [one.field for one in step.changes] == ["trust"]
    results = site.provisioner.apply(pinned, Quiet())
    assert [one.name for one in results[-1].failed] == ["chain"]


def test_step_for_which_there_is_no_room_fails_alone(site: Site, want: Want) -> None:
    def full(guest: FakeGuest) -> None:
        if guest.spec.name == "alice.web":
            raise OSError(errno.ENOSPC, "No space left on device")

    site.prepare = lambda bench: setattr(bench, "make", full)
    results = site.provisioner.apply(want({"alice.web": {}, "bob.db": {}}), Quiet())
    assert outcomes(results) == {
        PLATFORM: Outcome.DONE,
        "alice.web": Outcome.FAILED,
        "bob.db": Outcome.DONE,
    }


def test_vm_that_ran_is_stopped_when_its_policy_grows_stricter(
    site: Site, want: Want, files: Path
) -> None:
    deployment = want({"alice.web": DISK}, **{"on-refusal": "hold"})
    site.provisioner.apply(deployment, Quiet())
    guest = site.guest("alice.web")
    guest.said.clear()
    (files / "policy.toml").write_text(POLICY.replace("integrity = false", "integrity = true"))
    assert outcomes(site.provisioner.apply(deployment, Quiet())) == {"alice.web": Outcome.REFUSED}
    assert guest.said == ["evidence", "hold"]
    (files / "policy.toml").write_text(POLICY)
    assert outcomes(site.provisioner.apply(deployment, Quiet())) == {"alice.web": Outcome.DONE}
    assert guest.said == ["evidence", "hold", "evidence", "resume"]


def test_secrets_in_a_guest_follow_their_files(site: Site, want: Want, files: Path) -> None:
    deployment = want({"alice.web": DISK})
    site.provisioner.apply(deployment, Quiet())
    guest = site.guest("alice.web")
    guest.said.clear()

    (files / "token").write_text("another")
    (step,) = (s for s in site.provisioner.plan(deployment).steps if s.subject == "alice.web")
    assert step.action is Action.UPDATE
    (change,) = step.changes
    assert (change.field, change.new) == (
        "secrets",
        "/run/app/token (root, 0600): other contents",
    )
    assert "another" not in str(step)
    site.provisioner.apply(deployment, Quiet())
    assert guest.said == ["evidence", "hand over /run/app/token"]
    assert site.provisioner.plan(deployment).is_empty

    guest.secrets.clear()  # the guest removed it
    assert not site.provisioner.plan(deployment).is_empty
    site.provisioner.apply(deployment, Quiet())
    assert guest.secrets["/run/app/token"][1] == b"another"

    site.provisioner.apply(want({"alice.web": {"guest": "debian-12"}}), Quiet())
    assert guest.said[-1] == "withdraw /run/app/token"
    assert guest.secrets == {}


def test_other_vms_go_on_when_one_fails(site: Site, want: Want) -> None:
    site.prepare = lambda bench: bench.fails.add("alice.web")
    deployment = want({"alice.web": {}, "bob.db": {}})
    results = site.provisioner.apply(deployment, Quiet())
    assert outcomes(results) == {
        PLATFORM: Outcome.DONE,
        "alice.web": Outcome.FAILED,
        "bob.db": Outcome.DONE,
    }
    assert (results[1].reason, results[1].hint) == (
        "alice.web does not come up",
        "make it come up",
    )
    site.bench.fails.clear()
    assert outcomes(site.provisioner.apply(deployment, Quiet())) == {"alice.web": Outcome.DONE}


def test_without_a_platform_nothing_is_tried(site: Site, want: Want) -> None:
    def fail(_bench: FakeBench) -> None:
        raise RefusedError([])

    site.prepare = fail
    results = site.provisioner.apply(want(), Quiet())
    assert outcomes(results) == {PLATFORM: Outcome.REFUSED, "alice.web": Outcome.SKIPPED}


def test_lost_vm_is_replaced_and_others_stay(site: Site, want: Want) -> None:
    deployment = want({"alice.web": {}, "bob.db": {}})
    site.provisioner.apply(deployment, Quiet())
    lost, other = site.guest("alice.web"), site.guest("bob.db")
    lost.lost = "its QEMU ended"
    results = site.provisioner.apply(deployment, Quiet())
    assert [(one.step.action, one.step.reason) for one in results] == [
        (Action.REPLACE, "it is lost: its QEMU ended")
    ]
    assert lost.said[-1] == "close"
    assert site.guest("bob.db") is other
    assert site.guest("alice.web") is not lost


def test_guest_that_does_not_answer_is_not_lost_for_that(site: Site, want: Want) -> None:
    deployment = want({"alice.web": DISK})
    site.provisioner.apply(deployment, Quiet())

    def silent(secrets: object, marks: object) -> tuple[SecretFact, ...]:
        raise VmLostError("its sshd does not answer")

    site.guest("alice.web").look = silent  # type: ignore[method-assign]
    (state,) = site.provisioner.state().vms
    assert (state.condition, state.facts.secrets) == (Condition.RUNNING, ())
    (result,) = site.provisioner.apply(deployment, Quiet())
    assert (result.step.action, result.outcome) == (Action.UPDATE, Outcome.FAILED)
    assert site.guest("alice.web").running


def test_other_platform_takes_all_vms_along(site: Site, want: Want, files: Path) -> None:
    site.provisioner.apply(want({"alice.web": {}, "bob.db": {}}), Quiet())
    first = site.bench
    (files / "platform.toml").write_text("keyid-bits = 4\n")
    deployment = want({"alice.web": {}, "bob.db": {}}, platform="platform.toml")
    results = site.provisioner.apply(deployment, Quiet())
    assert [one.step.action for one in results] == [Action.REPLACE] * 3
    assert first.ended.is_set()
    assert site.bench is not first
    assert site.provisioner.plan(deployment).is_empty


def test_no_further_step_is_begun_that_nobody_waits_for(site: Site, want: Want) -> None:
    tell = Quiet()
    results = site.provisioner.apply(
        want({"alice.web": {}, "bob.db": {}}), tell, go_on=lambda: len(tell.steps) < 2
    )
    assert list(outcomes(results).values()) == [Outcome.DONE, Outcome.DONE, Outcome.SKIPPED]


def test_destroy_takes_all_down(site: Site, want: Want) -> None:
    site.provisioner.apply(want({"alice.web": {}, "bob.db": {}}), Quiet())
    results = site.provisioner.destroy(Quiet())
    assert list(outcomes(results)) == ["alice.web", "bob.db", PLATFORM]
    assert set(outcomes(results).values()) == {Outcome.DONE}
    assert site.bench.guests == []
    assert site.bench.ended.is_set()
    assert site.provisioner.state().platform is None
    assert site.provisioner.destroy(Quiet()) == ()


def test_evidence_of_another_platform_is_refused(site: Site, want: Want, files: Path) -> None:
    (files / "root.pem").write_bytes(Identity.create().root_pem())
    results = site.provisioner.apply(want(trust=["root.pem"]), Quiet())
    assert [one.name for one in results[-1].failed] == ["chain"]


@pytest.mark.parametrize("found", ["own", "another"])
def test_of_a_seed_only_the_one_that_was_made_is_good(site: Site, want: Want, found: str) -> None:
    """Whoever gives the guest another one may log in to it."""

    def seed(guest: FakeGuest) -> None:
        guest.own = {"disk1": b"\x77" * 32}
        guest.seed = b"\x77" * 32 if found == "own" else b"\x78" * 32

    site.prepare = lambda bench: setattr(bench, "make", seed)
    results = site.provisioner.apply(want(), Quiet())
    failed = [] if found == "own" else ["launch:disk1"]
    assert [one.name for one in results[-1].failed] == failed


def test_vm_that_ran_before_it_was_let_is_refused(site: Site, want: Want) -> None:
    site.prepare = lambda bench: setattr(bench, "make", lambda one: setattr(one, "running", True))
    results = site.provisioner.apply(want(), Quiet())
    assert [one.name for one in results[-1].failed] == ["provisioned:running"]


def test_state_says_nothing_of_a_secret(site: Site, want: Want) -> None:
    site.provisioner.apply(want({"alice.web": DISK}), Quiet())
    state = site.provisioner.state()
    assert "correct horse" not in repr(dataclasses.asdict(state))
    assert state.vms[0].facts.key == KeySource.RANDOM.value
