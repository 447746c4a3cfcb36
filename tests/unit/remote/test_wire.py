# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages between two hosts survive the wire, and nothing else does."""

from __future__ import annotations

import uuid
from typing import Final

import pytest

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.window import Policy
from mktme.engine.xts import Algorithm
from mktme.proof.confidentiality import CanarySearch
from mktme.proof.held import HeldProof
from mktme.proof.transparency import MemoryComparison
from mktme.remote import wire
from mktme.vm.arrival import Place, Side
from mktme.vm.hardware import Machine
from mktme.vm.pages import GuestPages, PageUse

from ..vm.test_domain_xml import IMAGE

SIDE: Final = Side("qemu:///system", "host-b", (10, 0, 2), "0.1.0", 1)
PLACE: Final = Place("/run/console", "/usr/bin/qemu", "/plugin.so,vm=x", "/vmlinuz", "/initrd")
PROOF: Final = HeldProof(
    MemoryComparison(10, 5, 0, 0, 0, 0),
    CanarySearch(4096, 1 << 20, 0, None),
    1 << 30,
    bytes(range(256)) * 16,
    4,
)
EXPECT: Final = wire.Expect(
    vm=uuid.UUID(int=7),
    name="alice",
    image=wire.Image(
        name="tiny",
        cmdline="quiet",
        manifest=IMAGE.manifest,
        kernel=b"\x00kernel\xff",
        initrd=b"initrd\n",
    ),
    memory_bytes=256 << 20,
    vcpus=1,
    datapath=DataPath.INLINE,
    track=Track.STORES,
    window_bytes=64 << 20,
    policy=Policy.TWO_QUEUES,
    algorithm=Algorithm.AES_XTS_256,
    encrypted=True,
    pages=(GuestPages(64 << 20, 1 << 20, PageUse.SHARED),),
    check_tlb=False,
    machine=Machine.Q35,
)
REQUESTS: Final[list[wire.Request]] = [
    wire.Open(connect="qemu:///system", dram_bytes=1 << 30, exchange="/tmp/mktme-move-1"),
    EXPECT,
    wire.Moved(),
    wire.NotMoved(why="it was cancelled"),
    wire.Run(command="echo 'a\nb'", timeout_s=2.5, check=True),
    wire.Prove(canary=bytes(range(64))),
    wire.Leave(),
    wire.Beat(),
]
REPLIES: Final[list[wire.Reply]] = [
    wire.Opened(side=SIDE),
    wire.Expecting(place=PLACE),
    wire.Arrived(keyid=3, base=2 << 20),
    wire.Ran(output="\x1b[1m\u2028\n", status=1),
    wire.Proven(proof=PROOF),
    wire.Done(),
    wire.Failure(error="VmError", message="no", hint=None),
    wire.Note(line="tracking by pages alone"),
    wire.Trouble(why="libvirt is gone"),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: type(one).__name__)
def test_requests(request_: wire.Request) -> None:
    line = wire.line_of(request_)
    assert line.index(b"\n") == len(line) - 1
    assert wire.decode_request(line) == request_
    with pytest.raises(wire.WireError):
        wire.decode_reply(line)


@pytest.mark.parametrize("reply", REPLIES, ids=lambda one: type(one).__name__)
def test_replies(reply: wire.Reply) -> None:
    line = wire.line_of(reply)
    assert line.index(b"\n") == len(line) - 1
    assert wire.decode_reply(line) == reply
    with pytest.raises(wire.WireError):
        wire.decode_request(line)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"Welcome to host\n",
        b"[" * 3000,
        b'{"type":"Moved","more":1}',
        b'{"type":"Run","command":"id","timeout_s":-1,"check":true}',
        b'{"type":"Prove","canary":"AAAA"}',
        b'{"type":"Open","connect":"","dram_bytes":0,"exchange":""}',
        b'{"type":"Note","line":"\xff"}',
    ],
)
def test_what_is_no_message(line: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_request(line)
    with pytest.raises(wire.WireError):
        wire.decode_reply(line)
    assert wire.decode_greeting(line) is None


def test_greeting_of_a_later_version_is_understood() -> None:
    line = b'{"type":"Greeting","protocol":9,"mktme":"2.0","capabilities":["tls"]}\n'
    assert wire.decode_greeting(line) == wire.Greeting(protocol=9, mktme="2.0")
    assert wire.decode_greeting(wire.line_of(wire.greeting())) == wire.greeting()
