# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's key from the key broker: evidence there, and a JWE back that the engine alone can open."""

from __future__ import annotations

from mktme.attest.result import Check, RefusedError, Verdict
from mktme.broker.client import BrokerClient
from mktme.broker.errors import DeniedError
from mktme.provision.attestation import Attester
from mktme.provision.errors import ProvisionError
from mktme.provision.tenants import Broker, VmSpec


def fetch_key(vm: Attester, spec: VmSpec, broker: Broker) -> bytes:
    """Attest a VM to its broker, and fetch its key.

    Args:
        vm: what to ask for evidence.
        spec: says what the broker calls the key.
        broker: whom to ask.

    Returns:
        A JWE (JSON), encrypted to the VM's recipient key.

    Raises:
        RefusedError: the broker does not release it; checks are called as the broker does.
        MktmeError: the broker cannot be asked.
    """
    if spec.resource is None:
        raise ProvisionError(f"{spec.name} has no key at the broker")
    try:
        with BrokerClient(broker.url, broker.trust) as client:
            client.attest(vm.uuid, vm.evidence, policy=spec.broker_policy)
            return client.resource(spec.resource)
    except DeniedError as error:
        names = error.checks or (error.kind,)
        raise RefusedError(
            Check(f"broker:{one}", Verdict.CONTRAINDICATED, str(error)) for one in names
        ) from error
