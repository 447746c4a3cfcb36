# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may do what: the starter and, if it shares, its user's processes; all others look on."""

from __future__ import annotations

import typing
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from mktme.datapath.shadow import Track
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess, EngineRefusedError
from mktme.service.server import CONTROL_SOCKET
from mktme.service.wire import Role

from ..conftest import Guests, wait_event
from ..fake_qemu import PAGE
from .raw_client import HELLO, HELLO_OBSERVER, RawClient
from .test_wire import REQUESTS

# Whoever adds a request thinks about who may send it: this list, or the class, is wrong else.
FOR_OBSERVERS = {wire.GetStatus, wire.ReadMsr, wire.GetEvidence, wire.GetIdentity}

COMMANDS = [one for one in REQUESTS if not isinstance(one, wire.Hello)]


@pytest.fixture
def control(engine: EngineProcess) -> Path:
    return engine.log_path.parent / CONTROL_SOCKET


@pytest.fixture
def observer(control: Path) -> Iterator[RawClient]:
    with RawClient(control) as observer:
        observer.send(HELLO_OBSERVER)
        assert isinstance(observer.reply(), wire.Welcome)
        yield observer


@pytest.mark.parametrize("command", typing.get_args(wire.Command), ids=lambda one: one.__name__)
def test_only_listed_requests_are_for_observers(command: type[wire.Command]) -> None:
    expected = Role.OBSERVER if command in FOR_OBSERVERS else Role.OWNER
    assert command.least_role is expected


def test_request_is_the_owners_unless_it_says_otherwise() -> None:
    class Novel(wire._Command, frozen=True):
        pass

    assert Novel.least_role is Role.OWNER


def steady(status: wire.Status) -> wire.Status:
    """A status without what changes by itself."""
    memory = wire.Memory(anonymous=0, file=0, shared=0, peak=0)
    return msgspec.structs.replace(status, memory=memory, cpu_s=0.0)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: type(one).__name__)
def test_observer_is_refused_what_is_the_owners(
    guests: Guests, observer: RawClient, command: wire.Command
) -> None:
    qemu, _ = guests.link()
    if "vm" in command.__struct_fields__:
        command = msgspec.structs.replace(command, vm=qemu.vm)
    before = steady(guests.client.status())
    observer.send(wire.frame(command))
    reply = observer.reply()
    if type(command) in FOR_OBSERVERS:
        # Nothing vouches for a fake QEMU: there is no evidence of it, for whoever asks.
        assert not isinstance(reply, wire.Failure) or reply.error == "MeasurementError"
    else:
        name = type(command).__name__
        assert reply == wire.Failure(
            error="RoleError",
            message=f"an observer may not send {name}",
            hint="only an owner may, as the process that started the engine is",
        )
    # It may go on, and nothing has changed: the drains' counters aside.
    observer.send(wire.frame(wire.GetStatus()))
    after = observer.reply()
    assert isinstance(after, wire.Status)
    without_traffic = [
        msgspec.structs.replace(
            status, vms=tuple(msgspec.structs.replace(vm, traffic=None) for vm in status.vms)
        )
        for status in (before, steady(after))
    ]
    assert without_traffic[0] == without_traffic[1]


def test_owner_is_not_refused(shared_engine: EngineProcess) -> None:
    """The control for the test above: the same requests, the same way, by an owner."""
    with RawClient(shared_engine.log_path.parent / CONTROL_SOCKET) as owner:
        owner.send(HELLO)
        assert isinstance(owner.reply(), wire.Welcome)
        for command in COMMANDS:
            owner.send(wire.frame(command))
            reply = owner.reply()
            assert reply is not None
            assert not (isinstance(reply, wire.Failure) and reply.error == "RoleError")


def test_starter_is_the_owner(engine: EngineProcess) -> None:
    assert engine.client.welcome.role is Role.OWNER


def test_nobody_becomes_an_owner_over_the_control_socket(control: Path) -> None:
    with pytest.raises(EngineRefusedError, match="there are observers only") as caught:
        EngineClient.connect(control, Role.OWNER)
    assert caught.value.error == "RoleError"
    assert caught.value.hint == (
        "ask to be an observer, or start the engine with --shared-ownership"
    )
    with EngineClient.connect(control) as client:  # which asks for no more than it is given
        assert client.welcome.role is Role.OBSERVER
        assert client.status().dram_bytes
        with pytest.raises(EngineRefusedError, match="may not send FlushVm") as caught:
            client.flush(uuid.uuid4())
        assert caught.value.error == "RoleError"


@pytest.mark.parametrize("again", [HELLO, HELLO_OBSERVER], ids=["owner", "observer"])
def test_hello_is_said_once(observer: RawClient, again: bytes) -> None:
    observer.send(again)
    reply = observer.reply()
    assert isinstance(reply, wire.Failure)
    assert (reply.error, reply.message) == ("ProtocolError", "Hello is said once")
    observer.send(wire.frame(wire.RemoveVm(vm=uuid.uuid4())))
    reply = observer.reply()
    assert isinstance(reply, wire.Failure)
    assert reply.error == "RoleError"


def test_ownership_can_be_shared(shared_engine: EngineProcess) -> None:
    control = shared_engine.log_path.parent / CONTROL_SOCKET
    vm = uuid.uuid4()
    with EngineClient.connect(control, Role.OWNER) as second:
        assert second.welcome.role is Role.OWNER
        second.add_vm(
            vm,
            name="vm",
            memory_bytes=PAGE,
            track=Track.PAGES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
        )
    # It took nothing with it, the engine least of all.
    assert vm in {one.vm for one in shared_engine.client.status().vms}
    shared_engine.client.remove_vm(vm)
    with EngineClient.connect(control, Role.OBSERVER) as third:
        assert third.welcome.role is Role.OBSERVER


def test_observers_are_told_of_events(control: Path, guests: Guests) -> None:
    with ExitStack() as stack:
        observers = [stack.enter_context(EngineClient.connect(control)) for _ in range(3)]
        qemu, _ = guests.link()
        qemu.close()
        for observer in observers:
            wait_event(observer, lambda event: event == wire.VmLinked(vm=qemu.vm))
            wait_event(observer, lambda event: event == wire.VmUnlinked(vm=qemu.vm))
