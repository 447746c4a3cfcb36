# SPDX-License-Identifier: GPL-2.0-or-later
"""Fake QEMUs on a real engine as the proofs see VMs: everything but libvirt's side of them."""

from __future__ import annotations

import subprocess
import sys
import uuid
from contextlib import ExitStack
from types import SimpleNamespace
from typing import cast

from mktme.datapath.shadow import Track
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient
from mktme.vm.config import VmConfig
from mktme.vm.domain import Domain
from mktme.vm.platform import Vm

from .. import fake_qemu
from ..fake_qemu import PAGE, FakeQemu
from ..vm.test_domain_xml import IMAGE


def vm_of(
    engine: EngineClient,
    one: uuid.UUID,
    added: wire.VmAdded,
    memory_bytes: int,
    name: str = "alice",
) -> Vm:
    """A VM of the engine's."""
    domain = cast("Domain", SimpleNamespace(label=name))
    return Vm(
        uuid=one,
        config=VmConfig(IMAGE, memory_bytes=memory_bytes),
        domain=domain,
        engine=engine,
        keyid=added.keyid,
        base=added.base,
    )


def vm_of_qemu(engine: EngineClient, qemu: FakeQemu, added: wire.VmAdded) -> Vm:
    """A VM whose QEMU is in this process."""
    return vm_of(engine, qemu.vm, added, qemu.ram_bytes)


def launch(
    engine: EngineClient,
    stack: ExitStack,
    name: str,
    canary: bytes,
    *,
    mode: KeyMode = KeyMode.RANDOM,
    pages: int = 64,
) -> Vm:
    """A VM in a process of its own that holds a page of `canary`, flushed."""
    one = uuid.uuid4()
    added = engine.add_vm(
        one,
        name=name,
        memory_bytes=pages * PAGE,
        track=Track.STORES_AND_PAGES,
        algorithm=Algorithm.AES_XTS_128,
        mode=mode,
    )
    stack.callback(engine.remove_vm, one)
    arguments = [engine.welcome.link_socket, str(one), str(pages), canary.hex()]
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, fake_qemu.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"linked\n"
    engine.flush(one)
    return vm_of(engine, one, added, pages * PAGE, name)
