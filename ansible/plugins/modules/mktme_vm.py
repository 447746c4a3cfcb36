#!/usr/bin/python
# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: one VM of a deployment of `mktme provision`."""

from __future__ import annotations

DOCUMENTATION = r"""
module: mktme_vm
short_description: An encrypted VM, attested before it gets a secret
version_added: 0.1.0
description:
  - Makes a VM on this machine's mktme platform what is wanted, as C(mktme provision apply) does, or
    takes it down.
  - Its memory is encrypted under a KeyID of its own. It is attested before its first instruction
    and again when it runs. Only then it is handed its secrets. A VM whose evidence is refused gets
    none, and the task fails with the checks that did.
  - Platform and VMs are held by a process that the first VM starts, and that ends with the last.
  - What cannot be changed of a running VM replaces it. Page ranges, policy, reference values and
    secrets change in place.
  - No secret and no key passes through Ansible; both are named by files on the managed machine, or
    come from the key broker.
author:
  - The mktme authors (@mktme)
requirements:
  - mktme, in the Python that C(ansible_python_interpreter) names
attributes:
  check_mode:
    description: Tells what would change, and changes nothing.
    support: full
  diff_mode:
    description: Shows what of the VM differs, fact by fact.
    support: full
options:
  deployment:
    description: Which deployment it belongs to. One process holds all VMs of one.
    type: str
    default: default
  tenant:
    description: Whose VM it is.
    type: str
    required: true
  name:
    description: What the tenant calls it.
    type: str
    required: true
  state:
    description: Whether it is to be there.
    type: str
    choices: [present, absent]
    default: present
  guest:
    description: A guest of mktme's recipes, such as V(tiny) or V(debian-12). Else O(image).
    type: str
  image:
    description: A cloud image of your own, qcow2 or raw. It is never written to.
    type: path
  memory:
    description: Its RAM.
    type: str
    default: 512M
  vcpus:
    description: How many.
    type: int
    default: 1
  machine:
    description: Its chipset.
    type: str
    choices: [q35, pc]
    default: q35
  firmware:
    description: What boots its disk.
    type: str
    choices: [bios, uefi]
    default: bios
  datapath:
    description: How its memory is encrypted.
    type: str
    choices: [shadow, inline]
    default: shadow
  track:
    description: What tells that memory was written. Without, what is usual for O(datapath).
    type: str
    choices: [stores, pages, stores+pages]
  window:
    description: With O(datapath=inline), the most plaintext there may be, as V(128M) or V(25%).
    type: str
  algorithm:
    description: Its cipher.
    type: str
    choices: [aes-xts-128, aes-xts-256, aes-xts-128-integrity]
    default: aes-xts-128
  key:
    description: Where its key comes from.
    type: dict
    suboptions:
      source:
        description: Drawn by the platform, or released by the key broker against evidence.
        type: str
        choices: [random, broker]
        default: random
      resource:
        description: What the broker calls it, C(repository/type/tag).
        type: str
      policy:
        description: What the broker is to appraise it by, C(tenant/policy).
        type: str
  pages:
    description: Pages under another KeyID than its own, such as V(16M@64M=shared).
    type: list
    elements: str
    default: []
  policy:
    description: What its evidence must satisfy, a policy.toml. Required unless it is to be absent.
    type: path
  reference:
    description: Which digests are good, a reference.json. Required unless it is to be absent.
    type: path
  secrets:
    description: What it is handed once it has proved itself.
    type: list
    elements: dict
    default: []
    suboptions:
      file:
        description: On the managed machine, readable by its user alone.
        type: path
        required: true
      path:
        description: In the guest. Below C(/run) it stays in encrypted memory.
        type: str
        required: true
      owner:
        description: In the guest, C(user) or C(user:group).
        type: str
        default: root
      mode:
        description: In the guest.
        type: str
        default: "0600"
  boot_timeout:
    description: How long it may take to its shell, seconds.
    type: float
  platform:
    description: The platform, a platform.toml. All VMs of a deployment have the same.
    type: path
  emulator:
    description: Another QEMU, a path or V(qemu11). All VMs of a deployment have the same.
    type: str
  ca:
    description: Directory of the platform CA. All VMs of a deployment have the same.
    type: path
  trust:
    description: CAs that evidence must come from. Without, the platform's own.
    type: list
    elements: path
    default: []
  on_refusal:
    description: What becomes of a VM whose evidence is refused.
    type: str
    choices: [remove, hold]
    default: remove
  broker:
    description: The key broker.
    type: dict
    suboptions:
      url:
        description: C(https://host:port).
        type: str
        required: true
      trust:
        description: The CA of its TLS certificate.
        type: path
        required: true
seealso:
  - module: mktme.bench.mktme_attest
"""

EXAMPLES = r"""
- name: Alice's web server runs, proved it, and has its token
  mktme.bench.mktme_vm:
    deployment: bench
    tenant: alice
    name: web
    guest: debian-12
    memory: 1G
    policy: /etc/mktme/alice.toml
    reference: /etc/mktme/debian-12.json
    secrets:
      - file: /etc/mktme/secrets/token
        path: /run/app/token

- name: Bob's database has a key of the broker's
  mktme.bench.mktme_vm:
    deployment: bench
    tenant: bob
    name: db
    guest: tiny
    datapath: inline
    algorithm: aes-xts-128-integrity
    key:
      source: broker
      resource: bob/key/db
    policy: /etc/mktme/strict.toml
    reference: /etc/mktme/tiny.json
    ca: /etc/mktme/ca
    broker:
      url: https://broker.example:8443
      trust: /etc/mktme/broker.pem

- name: It is not needed any more
  mktme.bench.mktme_vm:
    deployment: bench
    tenant: bob
    name: db
    state: absent
"""

RETURN = r"""
action:
  description: What was done to the VM, or would be.
  type: str
  returned: always
  sample: create
reason:
  description: Why just that, where the changes do not say it.
  type: str
  returned: always
changes:
  description: How the VM differed from what is wanted.
  type: list
  elements: dict
  returned: always
  sample: [{"field": "memory", "old": "512M", "new": "1G"}]
vm:
  description: The VM as it is now.
  type: dict
  returned: when there is one
  sample: {"name": "alice.web", "keyid": 1, "condition": "running", "key": "random"}
failed_checks:
  description: The checks that refused its evidence.
  type: list
  elements: dict
  returned: when it was refused
  sample: [{"name": "launch:kernel", "reason": "5d41402abc4b2a76... is not in the reference"}]
control_socket:
  description: Where observers connect to the platform's engine.
  type: str
  returned: when a platform runs
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mktme.bench.plugins.module_utils.mktme import (
    DEPLOYMENT,
    MKTME_ERROR,
    Silent,
    absolute,
    failing,
    plain,
    require_mktme,
)

if MKTME_ERROR is None:
    from pathlib import Path

    from mktme.provision.apply import Outcome
    from mktme.provision.client import Client, plan_for
    from mktme.provision.plan import PLATFORM, Action, Step
    from mktme.provision.report import CheckReport, vm_report
    from mktme.provision.tenants import Deployment
    from mktme.provision.tenants_file import deployment

_OPTIONS: dict[str, dict[str, Any]] = dict(
    deployment=DEPLOYMENT,
    tenant=dict(type="str", required=True),
    name=dict(type="str", required=True),
    state=dict(type="str", choices=["present", "absent"], default="present"),
    guest=dict(type="str"),
    image=dict(type="path"),
    memory=dict(type="str", default="512M"),
    vcpus=dict(type="int", default=1),
    machine=dict(type="str", choices=["q35", "pc"], default="q35"),
    firmware=dict(type="str", choices=["bios", "uefi"], default="bios"),
    datapath=dict(type="str", choices=["shadow", "inline"], default="shadow"),
    track=dict(type="str", choices=["stores", "pages", "stores+pages"]),
    window=dict(type="str"),
    algorithm=dict(
        type="str",
        choices=["aes-xts-128", "aes-xts-256", "aes-xts-128-integrity"],
        default="aes-xts-128",
    ),
    # Neither holds a key or a secret: it says where one comes from.
    key=dict(
        type="dict",
        no_log=False,
        options=dict(
            source=dict(type="str", choices=["random", "broker"], default="random"),
            resource=dict(type="str"),
            policy=dict(type="str"),
        ),
    ),
    pages=dict(type="list", elements="str", default=[]),
    policy=dict(type="path"),
    reference=dict(type="path"),
    secrets=dict(
        type="list",
        elements="dict",
        default=[],
        no_log=False,
        options=dict(
            file=dict(type="path", required=True),
            path=dict(type="str", required=True),
            owner=dict(type="str", default="root"),
            mode=dict(type="str", default="0600"),
        ),
    ),
    boot_timeout=dict(type="float"),
    platform=dict(type="path"),
    emulator=dict(type="str"),
    ca=dict(type="path"),
    trust=dict(type="list", elements="path", default=[]),
    on_refusal=dict(type="str", choices=["remove", "hold"], default="remove"),
    broker=dict(
        type="dict",
        options=dict(
            url=dict(type="str", required=True),
            trust=dict(type="path", required=True),
        ),
    ),
)
_DEPLOYMENTS = ("platform", "emulator", "ca", "trust", "on_refusal", "broker")
_NOT_THE_VMS = (*_DEPLOYMENTS, "deployment", "tenant", "name", "state")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=_OPTIONS,
        supports_check_mode=True,
        mutually_exclusive=[("guest", "image")],
        required_if=[
            ("state", "present", ("policy", "reference")),
            ("state", "present", ("guest", "image"), True),
        ],
    )
    require_mktme(module)
    with failing(module):
        run(module)


def run(module: AnsibleModule) -> None:
    """Find what is to be done, do it, and end the module."""
    parameters = module.params
    wanted = _wanted(parameters)
    name = f"{parameters['tenant']}.{parameters['name']}"
    only = frozenset((name,))
    planned = plan_for(wanted, only)
    steps = {one.subject: one for one in planned.plan.steps}
    step = steps.get(name, Step(Action.NOTHING, name))
    result: dict[str, Any] = dict(
        changed=not planned.plan.is_empty,
        action=step.action.value,
        reason=step.reason,
        changes=plain(step.changes),
        diff=_diff(step),
    )
    state = planned.state
    if result["changed"] and not module.check_mode:
        with Client.obtain(wanted.name) as client:
            applied = client.apply(wanted, Silent(module), only)
        state = applied.state
    there = state.vm(name)
    if there is not None:
        result["vm"] = plain(vm_report(there))
    if state.platform is not None:
        result["control_socket"] = str(state.platform.control_socket)
    if result["changed"] and not module.check_mode:
        for one in applied.results:
            if one.outcome is not Outcome.DONE:
                what = "platform: " if one.step.subject == PLATFORM else f"{name}: "
                hint = "" if one.hint is None else f"; {one.hint}"
                result["failed_checks"] = plain(
                    [CheckReport(check.name, check.reason) for check in one.failed]
                )
                module.fail_json(msg=f"{what}{one.reason}{hint}", **result)
    module.exit_json(**result)


def _wanted(parameters: dict[str, Any]) -> Deployment:
    """A deployment of this one VM, checked as a tenants.toml is."""
    if parameters["state"] == "absent":
        return Deployment(name=parameters["deployment"])
    table = _table(parameters, _DEPLOYMENTS)
    vm = _table(parameters, set(_OPTIONS) - set(_NOT_THE_VMS))
    tenant = {"vms": {parameters["name"]: vm}}
    table |= {"name": parameters["deployment"], "tenants": {parameters["tenant"]: tenant}}
    return deployment(table, Path.cwd())


def _table(parameters: dict[str, Any], names: Any) -> dict[str, Any]:
    """Options as tenants.toml has them: nothing that is not set, and no "_"."""
    return {
        one.replace("_", "-"): _value(_OPTIONS[one], parameters[one])
        for one in sorted(names)
        if parameters[one] is not None
    }


def _value(option: dict[str, Any], value: Any) -> Any:
    match option["type"], value:
        case "path", str():
            return absolute(value)
        case "dict", dict():
            return {
                name: _value(option["options"][name], one)
                for name, one in value.items()
                if one is not None
            }
        case "list", list():
            element = option | {"type": option["elements"]}
            return [_value(element, one) for one in value]
    return value


def _diff(step: Step) -> dict[str, str]:
    """What differs, for ``--diff``."""
    header = f"{step.subject}: {step.action.value}"

    def side(which: str) -> str:
        return "".join(f"{one.field}: {getattr(one, which)}\n" for one in step.changes)

    before = "" if step.action is Action.CREATE else side("old")
    if step.action is Action.DELETE:
        before = f"{step.subject}\n"
    return dict(before_header=header, after_header=header, before=before, after=side("new"))


if __name__ == "__main__":
    main()
