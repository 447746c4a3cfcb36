# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme provision`, and the Ansible collection: VMs from a file, which prove themselves first."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from mktme.attest.claims import decode_claims
from mktme.attest.reference import Reference
from mktme.attest.token import Token
from mktme.broker.directory import create
from mktme.broker.store import Kind, Terms
from mktme.cli import ExitCode
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.platform_report import KeyIdReport
from mktme.provision.apply import Outcome
from mktme.provision.plan import PLATFORM, Action
from mktme.provision.report import ApplyReport, DestroyReport, PlanReport
from mktme.provision.state import Condition
from mktme.service.client import EngineClient
from mktme.vm.config import DISK_BOOT_TIMEOUT_S

from ..unit.broker.server import serving
from .conftest import COMMAND_TIMEOUT_S, Command

COLLECTION = Path(__file__).parents[2] / "ansible"
POLICY = """\
name = "shadow too"
data-paths = ["shadow", "inline"]
integrity = false
"""
NOTHING = Reference(frozenset(), {})


class Site:
    """A tenants.toml, and the command that makes it so."""

    def __init__(self, command: Command, directory: Path) -> None:
        self.command = command
        self.directory = directory
        self.vms: dict[str, dict[str, str]] = {}
        self.top: list[str] = []
        (directory / "policy.toml").write_text(POLICY)

    @property
    def file(self) -> Path:
        """tenants.toml, as it is wanted now."""
        lines = ['name = "live"', 'on-refusal = "hold"', *self.top]
        for name, settings in self.vms.items():
            tenant, vm = name.split(".")
            appraised = {"policy": '"policy.toml"', "reference": f'"{name}.json"'}
            lines += [f"[tenants.{tenant}.vms.{vm}]"]
            lines += [f"{key} = {value}" for key, value in (appraised | settings).items()]
            reference = self.directory / f"{name}.json"
            if not reference.exists():
                reference.write_bytes(NOTHING.encode())
        path = self.directory / "tenants.toml"
        path.write_text("\n".join(lines))
        return path

    def plan(self) -> PlanReport:
        status, out, err = self.command.run(
            "provision", "plan", "-f", str(self.file), "--json", "--exit-code"
        )
        report = msgspec.json.decode(out, type=PlanReport)
        assert status == (ExitCode.CHANGES if report.changes else ExitCode.OK), err
        return report

    def apply(self, expected: ExitCode = ExitCode.OK) -> ApplyReport:
        status, out, err = self.command.run("provision", "apply", "-f", str(self.file), "--json")
        assert status == expected, err + out
        return msgspec.json.decode(out, type=ApplyReport)

    def destroy(self) -> DestroyReport:
        status, out, err = self.command.run("provision", "destroy", "-f", str(self.file), "--json")
        assert status == ExitCode.OK, err + out
        return msgspec.json.decode(out, type=DestroyReport)

    def learn(self, report: ApplyReport) -> None:
        """Take what is held now for good, beside what was before."""
        assert report.control_socket is not None
        with EngineClient.connect(Path(report.control_socket)) as engine:
            for vm in report.vms:
                path = self.directory / f"{vm.name}.json"
                values = Reference.load(path).also(launched(engine, vm.uuid))
                path.write_bytes(values.encode())

    def uuids(self, report: ApplyReport) -> dict[str, UUID]:
        return {one.name: one.uuid for one in report.vms}


def launched(engine: EngineClient, vm: UUID) -> Reference:
    """What a VM was launched from, as its evidence says."""
    token = Token.parse(engine.evidence(secrets.token_bytes(32), vm))
    evidence = decode_claims(token.verify(token.key()))
    claims = evidence.vm(vm)
    assert claims is not None
    return Reference.of(evidence, claims)


@pytest.fixture
def site(command: Command, tmp_path: Path) -> Site:
    return Site(command, tmp_path)


def test_two_tenants_from_a_file(site: Site) -> None:
    web = {"guest": '"tiny"', "memory": '"192M"', "pages": "[]"}
    db = {"guest": '"tiny"', "memory": '"192M"', "datapath": '"inline"'}
    site.vms = {"alice.web": web, "bob.db": db}

    # Nothing is known of what they are launched from: they are held before their first instruction.
    report = site.apply(ExitCode.PROOF_FAILED)
    assert {one.condition for one in report.vms} == {Condition.HELD}
    refused = report.results[1]
    assert (refused.subject, refused.outcome) == ("alice.web", Outcome.REFUSED)
    assert "launch:kernel" in {one.name for one in refused.failed}
    site.learn(report)
    web["memory"] = '"256M"'
    report = site.apply(ExitCode.PROOF_FAILED)
    assert [one.condition for one in report.vms] == [Condition.HELD, Condition.RUNNING]
    site.learn(report)

    applied = site.apply()
    assert {one.condition for one in applied.vms} == {Condition.RUNNING}
    assert len({one.keyid for one in applied.vms}) == 2
    assert {one.action for one in site.plan().steps} == {Action.NOTHING}

    web["memory"] = '"192M"'
    drift = {one.subject: one for one in site.plan().steps}
    assert drift["alice.web"].action is Action.REPLACE
    assert [(one.field, one.old, one.new) for one in drift["alice.web"].changes] == [
        ("memory", "256M", "192M")
    ]
    assert {drift["bob.db"].action, drift[PLATFORM].action} == {Action.NOTHING}
    again = site.apply()
    assert [(one.subject, one.action) for one in again.results] == [("alice.web", Action.REPLACE)]
    before, after = site.uuids(applied), site.uuids(again)
    assert before["bob.db"] == after["bob.db"]
    assert before["alice.web"] != after["alice.web"]

    web["pages"] = '["1M@64M=shared"]'  # which the policy does not allow
    refused = site.apply(ExitCode.PROOF_FAILED).results[0]
    assert (refused.action, [one.name for one in refused.failed]) == (
        Action.UPDATE,
        ["exceptions"],
    )
    web["pages"] = "[]"
    (healed,) = site.apply().results
    assert (healed.subject, healed.action) == ("alice.web", Action.UPDATE)

    assert [one.subject for one in site.destroy().results] == ["alice.web", "bob.db", PLATFORM]
    site.command.assert_nothing_left()
    assert site.destroy().results == ()


def test_what_is_killed_is_noticed(site: Site) -> None:
    """VMs that are held do as well: none needs to boot for this."""
    site.vms = {"alice.web": {"guest": '"tiny"', "memory": '"192M"'}}
    report = site.apply(ExitCode.PROOF_FAILED)
    assert report.vms[0].condition is Condition.HELD

    (qemu,) = site.command.processes("qemu-system-x86_64")
    descriptor = os.pidfd_open(qemu)
    os.kill(qemu, signal.SIGKILL)
    site.command.wait_ended(descriptor)
    (step,) = (one for one in site.plan().steps if one.subject == "alice.web")
    assert (step.action, step.reason) == (Action.REPLACE, "it is lost: its QEMU ended")
    assert site.apply(ExitCode.PROOF_FAILED).vms[0].condition is Condition.HELD

    (engine,) = site.command.processes("mktme.service")
    os.kill(engine, signal.SIGKILL)
    site.command.assert_nothing_left()
    assert site.plan().steps[0].action is Action.CREATE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_provisioner_that_is_ended_leaves_nothing(site: Site, number: signal.Signals) -> None:
    site.vms = {"alice.web": {"guest": '"tiny"', "memory": '"192M"'}}
    report = site.apply(ExitCode.PROOF_FAILED)
    assert report.control_socket is not None
    run_dir = Path(report.control_socket).parent
    (provisioner,) = provisioners(site.command)
    descriptor = os.pidfd_open(provisioner)
    os.kill(provisioner, number)
    site.command.wait_ended(descriptor)
    site.command.assert_nothing_left()
    assert not run_dir.exists()


def test_vm_boots_under_the_brokers_key(site: Site, tmp_path: Path) -> None:
    """The broker pins a CA before there is a platform; nothing of its key is in any answer."""
    algorithm = Algorithm.AES_XTS_128_INTEGRITY
    key = secrets.token_bytes(algorithm.key_bytes)
    status, _, err = site.command.run("ca", "create", str(tmp_path / "ca"))
    assert status == ExitCode.OK, err
    (tmp_path / "strict.toml").write_text("")
    directory = create(tmp_path / "broker")
    directory.put(Kind.TRUST, "bob", "platforms", (tmp_path / "ca" / "ca.pem").read_bytes())
    directory.put(Kind.POLICY, "bob", "strict", b"")
    directory.put(Kind.REFERENCE, "bob", "strict", NOTHING.encode())
    directory.put(Kind.RESOURCE, "bob", "bob/key/db", key, Terms("strict", "bob.db"))
    with serving(directory.path, "--workers", "1") as server:
        released = 'source = "broker", resource = "bob/key/db", policy = "bob/strict"'
        settings = {
            "guest": '"tiny"',
            "memory": '"192M"',
            "datapath": '"inline"',
            "track": '"stores"',
            "algorithm": f'"{algorithm.value}"',
            "key": f"{{ {released} }}",
            "policy": '"strict.toml"',
        }
        site.vms = {"bob.db": settings}
        broker = f'broker = {{ url = "{server.url}", trust = "{directory.ca}" }}'
        site.top = ['ca = "ca"', 'trust = ["ca/ca.pem"]', broker]

        held = site.apply(ExitCode.PROOF_FAILED)
        assert "broker:launch:kernel" in {one.name for one in held.results[-1].failed}
        assert (held.vms[0].condition, held.vms[0].key) == (Condition.HELD, "random")
        site.learn(held)
        good = (tmp_path / "bob.db.json").read_bytes()
        directory.put(Kind.REFERENCE, "bob", "strict", good)

        (done,) = site.apply().results
        assert (done.subject, done.outcome) == ("bob.db", Outcome.DONE)
        planned = site.plan()
        assert not planned.changes
        assert planned.vms[0].key == "broker bob/key/db"
    status, out, _ = site.command.run("keyid", "list", "--json")
    assert status == ExitCode.OK
    rows = msgspec.json.decode(out, type=KeyIdReport).keyids
    assert {one.vm: one.mode for one in rows if one.keyid} == {"bob.db": KeyMode.DIRECT}
    site.destroy()
    site.command.assert_nothing_left()


def provisioners(command: Command) -> list[int]:
    """Processes that hold VMs of this test's: they have its TMPDIR, if not in their arguments."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (directory / "cmdline").read_bytes()
            environment = (directory / "environ").read_bytes()
            is_ours = f"TMPDIR={command.tmpdir}\0".encode() in environment
            if is_ours and b"mktme.provision.daemon" in arguments:
                found.append(int(directory.name))
    return found


@pytest.mark.nightly
@pytest.mark.timeout(2 * DISK_BOOT_TIMEOUT_S)
def test_secret_over_ssh(site: Site) -> None:
    site.command.timeout_s = DISK_BOOT_TIMEOUT_S
    secret = site.directory / "token"
    secret.touch(mode=0o600)
    secret.write_text("correct horse battery staple")
    settings = {
        "guest": '"debian-12"',
        "memory": '"512M"',
        "track": '"pages"',
        "secrets": f'[{{ file = "{secret}", path = "/run/app/token", mode = "0400" }}]',
    }
    site.vms = {"alice.web": settings}
    site.learn(site.apply(ExitCode.PROOF_FAILED))
    site.destroy()

    # Another instance has another layer, seed and port: it is the same launch all the same.
    applied = site.apply()
    assert applied.vms[0].secrets == ("/run/app/token (root, 0400)",)
    assert not site.plan().changes
    secret.write_text("another")
    (step,) = (one for one in site.plan().steps if one.action is Action.UPDATE)
    assert step.changes[0].new == "/run/app/token (root, 0400): other contents"
    assert site.apply().vms[0].secrets == ("/run/app/token (root, 0400)",)
    assert not site.plan().changes
    settings["secrets"] = "[]"
    assert site.apply().vms[0].secrets == ()
    site.destroy()
    site.command.assert_nothing_left()


# --- Ansible ------------------------------------------------------------------------------------


class Playbook:
    """Runs of ansible-playbook with the collection as it is installed, in the command's TMPDIR."""

    def __init__(self, command: Command, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {
            "TMPDIR": str(command.tmpdir),
            "ANSIBLE_HOME": str(directory / "ansible"),
            "ANSIBLE_COLLECTIONS_PATH": str(directory / "collections"),
            "ANSIBLE_REMOTE_TMP": str(directory / "remote"),
            "ANSIBLE_LOCAL_TEMP": str(directory / "local"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_NOCOLOR": "1",
        }
        self.run_tool(
            "ansible-galaxy",
            *("collection", "install", "--offline", str(COLLECTION)),
            *("-p", str(directory / "collections")),
        )
        self.playbooks = directory / "collections/ansible_collections/mktme/bench/playbooks"

    def run_tool(self, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).parent / tool), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def run(self, variables: dict[str, Any], *options: str) -> tuple[dict[str, int], str]:
        """Run the example; returns its recap, and all that it said."""
        done = self.run_tool(
            "ansible-playbook",
            *("-i", str(self.playbooks / "inventory.yml"), str(self.playbooks / "example.yml")),
            *("-e", json.dumps(variables), *options),
        )
        recap = re.search(r"localhost +: (.*)", done.stdout)
        assert recap is not None, done.stdout + done.stderr
        counts = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", recap[1])}
        assert (done.returncode == 0) == (counts["failed"] == 0)
        return counts, done.stdout + done.stderr


def test_playbook(site: Site, command: Command, tmp_path: Path) -> None:
    site.vms = {"alice.web": {"guest": '"tiny"', "memory": '"192M"'}}
    site.learn(site.apply(ExitCode.PROOF_FAILED))
    site.destroy()
    command.assert_nothing_left()

    playbook = Playbook(command, tmp_path)
    vm = {"tenant": "alice", "name": "web", "datapath": "shadow"}
    vm["reference"] = str(tmp_path / "alice.web.json")
    variables = {"config": str(tmp_path), "memory": "192M", "vms": [vm]}

    counts, said = playbook.run(variables, "--check", "--diff")
    assert (counts["changed"], counts["failed"]) == (1, 0), said
    assert "+memory: 192M" in said
    command.assert_nothing_left()

    counts, said = playbook.run(variables)
    assert (counts["changed"], counts["failed"], counts["ok"]) == (1, 0, 2), said
    assert len(command.processes("qemu-system-x86_64")) == 1
    counts, said = playbook.run(variables)
    assert (counts["changed"], counts["failed"], counts["ok"]) == (0, 0, 2), said

    other = tmp_path / "other.json"
    good = (tmp_path / "alice.web.json").read_text()
    other.write_text(re.sub(r"[0-9a-f]{64}", "0" * 64, good))
    attested = playbook.run_tool(
        "ansible",
        *("localhost", "-c", "local", "-e", f"ansible_python_interpreter={sys.executable}"),
        *("-m", "mktme.bench.mktme_attest", "-a"),
        f"deployment=example tenant=alice name=web policy={tmp_path}/policy.toml reference={other}",
    )
    failed = attested.stdout.partition('"failed_checks": [')[2].partition("]")[0]
    assert "launch:kernel" in failed, attested.stdout + attested.stderr
    assert attested.returncode != 0

    # A changed reference is drift, too: the VM is attested anew, refused, and gone.
    counts, said = playbook.run(variables | {"vms": [vm | {"reference": str(other)}]})
    assert counts["failed"] == 1, said
    assert "launch:kernel" in said
    command.assert_nothing_left()  # it was the only VM
    counts, said = playbook.run(variables | {"state": "absent"})
    assert (counts["changed"], counts["failed"]) == (0, 0), said
