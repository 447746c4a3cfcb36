#!/usr/bin/python
# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: confirm that a VM runs protected, before it is trusted with anything."""

from __future__ import annotations

DOCUMENTATION = r"""
module: mktme_attest
short_description: Confirm by remote attestation that a VM runs protected
version_added: 0.1.0
description:
  - Asks the engine of a running mktme platform for evidence of a VM, with a fresh nonce, and
    appraises it - signature and certificates, freshness, launch measurement, policy.
  - The task fails unless all of it is affirmed, and says which checks did not.
  - It changes nothing, so it does the same in check mode.
author:
  - The mktme authors (@mktme)
requirements:
  - mktme, in the Python that C(ansible_python_interpreter) names
attributes:
  check_mode:
    description: It changes nothing in any case.
    support: full
  diff_mode:
    description: There is no difference to show.
    support: none
options:
  deployment:
    description: Which deployment the VM belongs to.
    type: str
    default: default
  tenant:
    description: Whose VM it is. With O(name), instead of O(engine) and O(uuid).
    type: str
  name:
    description: What the tenant calls it.
    type: str
  engine:
    description: Control socket of the engine, of a VM that no deployment has.
    type: path
  uuid:
    description: The VM's UUID at this engine.
    type: str
  policy:
    description: What its evidence must satisfy, a policy.toml.
    type: path
    required: true
  reference:
    description: Which digests are good, a reference.json.
    type: path
    required: true
  trust:
    description:
      - CAs that evidence must come from, PEM.
      - Without, it is the CA that the engine itself names. That shows that the evidence is this
        engine's, and not that the engine is one to be trusted.
    type: list
    elements: path
    default: []
seealso:
  - module: mktme.bench.mktme_vm
"""

EXAMPLES = r"""
- name: Alice's web server runs protected
  mktme.bench.mktme_attest:
    deployment: bench
    tenant: alice
    name: web
    policy: /etc/mktme/alice.toml
    reference: /etc/mktme/debian-12.json
    trust: [/etc/mktme/ca/ca.pem]
  register: attested

- name: By whose word
  ansible.builtin.debug:
    msg: "{{ attested.verdict }}: {{ attested.checks | map(attribute='name') | join(', ') }}"
"""

RETURN = r"""
verdict:
  description: The worst of all checks.
  type: str
  returned: always
  sample: affirming
checks:
  description: All that was looked at.
  type: list
  elements: dict
  returned: always
  sample: [{"name": "freshness", "verdict": "affirming", "reason": "it has the nonce ..."}]
failed_checks:
  description: Names of the checks that did not affirm.
  type: list
  elements: str
  returned: always
  sample: []
uuid:
  description: Which VM it was about.
  type: str
  returned: always
ear:
  description: The result as an Entity Attestation Result (draft-ietf-rats-ear).
  type: dict
  returned: always
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mktme.bench.plugins.module_utils.mktme import (
    DEPLOYMENT,
    MKTME_ERROR,
    absolute,
    failing,
    plain,
    require_mktme,
)

if MKTME_ERROR is None:
    import secrets
    from pathlib import Path
    from uuid import UUID

    from mktme.attest.identity import Trust, load_trust
    from mktme.attest.policy import Policy
    from mktme.attest.reference import Reference
    from mktme.attest.result import ear
    from mktme.attest.verify import verify
    from mktme.provision.attestation import NONCE_BYTES, engine_roots
    from mktme.provision.client import Client
    from mktme.provision.errors import ProvisionError
    from mktme.service.client import EngineClient

_OPTIONS: dict[str, dict[str, Any]] = dict(
    deployment=DEPLOYMENT,
    tenant=dict(type="str"),
    name=dict(type="str"),
    engine=dict(type="path"),
    uuid=dict(type="str"),
    policy=dict(type="path", required=True),
    reference=dict(type="path", required=True),
    trust=dict(type="list", elements="path", default=[]),
)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=_OPTIONS,
        supports_check_mode=True,
        required_together=[("tenant", "name"), ("engine", "uuid")],
        required_one_of=[("tenant", "engine")],
        mutually_exclusive=[("tenant", "engine")],
    )
    require_mktme(module)
    with failing(module):
        run(module)


def run(module: AnsibleModule) -> None:
    """Ask, appraise, and end the module."""
    parameters = module.params
    policy = Policy.load(Path(absolute(parameters["policy"])))
    reference = Reference.load(Path(absolute(parameters["reference"])))
    pinned = load_trust(Path(absolute(one)) for one in parameters["trust"])
    control_socket, uuid = _subject(module)
    nonce = secrets.token_bytes(NONCE_BYTES)
    with EngineClient.connect(control_socket) as engine:
        token = engine.evidence(nonce, uuid)
        trust: Trust = pinned if pinned.roots else engine_roots(engine)
    appraisal = verify(token, trust=trust, policy=policy, reference=reference, nonce=nonce, vm=uuid)
    failed = [one.name for one in appraisal.failed]
    result = dict(
        changed=False,
        verdict=appraisal.verdict.value,
        checks=plain(appraisal.checks),
        failed_checks=failed,
        uuid=str(uuid),
        ear=ear(appraisal),
    )
    if failed:
        module.fail_json(msg=f"the evidence is refused: {', '.join(failed)}", **result)
    module.exit_json(**result)


def _subject(module: AnsibleModule) -> tuple[Path, UUID]:
    """Whom to ask, and about which VM."""
    parameters = module.params
    if parameters["engine"] is not None:
        try:
            return Path(absolute(parameters["engine"])), UUID(parameters["uuid"])
        except ValueError:
            module.fail_json(msg=f"{parameters['uuid']} is no UUID")
    name = f"{parameters['tenant']}.{parameters['name']}"
    client = Client.find(parameters["deployment"])
    if client is None:
        raise ProvisionError(
            f"there is no deployment {parameters['deployment']}",
            hint="mktme.bench.mktme_vm makes one, and mktme provision apply does",
        )
    with client:
        state = client.state()
    there = state.vm(name)
    if there is None or state.platform is None:
        raise ProvisionError(f"{parameters['deployment']} has no VM {name}")
    return state.platform.control_socket, there.uuid


if __name__ == "__main__":
    main()
