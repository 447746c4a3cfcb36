# SPDX-License-Identifier: GPL-2.0-or-later
"""The control protocol's messages: each survives the wire, nothing else is taken for one."""

from __future__ import annotations

import typing
import uuid
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import ShadowCounters, Track
from mktme.datapath.window import Policy
from mktme.engine.firmware import Exclusion, PlatformConfig
from mktme.engine.integrity import Violation
from mktme.engine.keys import KeyMode
from mktme.engine.package import PowerEvent
from mktme.engine.secret import KeyMemory
from mktme.engine.sidecar import CaptureRecord, GuestSegment, PageRange
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.custody import Custody
from mktme.service.wire import ProtocolError

VM = uuid.UUID("6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11")

ADD_VM = wire.AddVm(
    vm=VM,
    name="alice",
    memory_bytes=512 << 20,
    track=Track.STORES_AND_PAGES,
    algorithm=Algorithm.AES_XTS_256,
    mode=KeyMode.DIRECT,
    key_file="/run/key",
)
REQUESTS: list[wire.Request] = [
    wire.Hello(version=2),
    wire.GetStatus(),
    ADD_VM,
    wire.AddVtpm(vm=VM),
    wire.RemoveVm(vm=VM),
    wire.FlushVm(vm=VM),
    wire.ReadVm(vm=VM, ram_offset=4096, size_bytes=8192),
    wire.ReadVm(vm=VM, ram_offset=0, size_bytes=2**63, keyid=63),
    wire.ReadMarks(vm=VM, first_page=1, page_count=2),
    wire.WriteSidecar(),
    wire.StartCapture(path="/copy", vms=(VM,)),
    wire.VmsHeld(capture=1, problem="it is gone"),
    wire.VmsReleased(capture=1, pause_ns=250_000_000),
    wire.CancelCapture(capture=1),
    wire.DecryptLines(keyid=5, address=64, data=bytes(64), entries=bytes(4)),
    wire.ReadDram(address=4096, size_bytes=8192, keyid=0),
    wire.WriteDram(address=4096, data=bytes(64), keyid=5),
    wire.ReadMsr(msr=0x982),
    wire.WriteMsr(msr=0x982, value=2**64 - 1),
    wire.ExecutePconfig(leaf=0, address=0, program=bytes(192)),
    wire.ProgramKey(mode=KeyMode.RANDOM, algorithm=Algorithm.AES_XTS_128, keyid=5, vm=VM),
    wire.ClearKey(keyid=5),
    wire.AssignPages(vm=VM, ram_offset=4096, size_bytes=8192, keyid=0),
    wire.ReleasePage(vm=VM, ram_offset=4096),
    wire.DiscardMemory(vm=VM, ram_offset=4096, size_bytes=8192),
    wire.PowerPlatform(event=PowerEvent.WARM_RESET),
    wire.DescribeDomain(vm=VM, xml="<domain/>"),
    wire.GetEvidence(nonce=bytes(8), vm=VM, report_data=b"\x01" * 64),
    wire.GetIdentity(),
    wire.ReleaseKey(vm=VM, jwe=b"a.b.c.d.e"),
]
TRAFFIC = wire.Traffic(
    drains=1,
    drain_s=0.5,
    interval_s=0.1,
    pending_pages=2,
    pages_written=3,
    pages_vanished=4,
    lines_marked=5,
    lines_encrypted=6,
    lines_stored=7,
    lines_other=8,
    tlb_misses=9,
)
VM_STATUS = wire.VmStatus(
    vm=VM,
    name="alice",
    keyid=1,
    base=2 << 20,
    memory_bytes=512 << 20,
    track=Track.PAGES,
    linked=True,
    further_keyids=(5,),
    pages=(PageRange(base=2 << 20, size_bytes=512 << 20, keyid=1),),
    qemu_pid=1234,
    plugin_api=4,
    segments=(GuestSegment(guest_physical=0, ram_offset=0, size_bytes=512 << 20),),
    traffic=TRAFFIC,
)
INLINE_STATUS = wire.VmStatus(
    vm=VM,
    name="bob",
    keyid=2,
    base=0,
    memory_bytes=512 << 20,
    track=None,
    linked=True,
    datapath=DataPath.INLINE,
    paging=wire.Paging(
        service_s=0.5,
        policy=Policy.FIFO,
        window_bytes=4 << 20,
        resident_bytes=1,
        peak_bytes=2,
        faults=3,
        pages_fetched=4,
        pages_read_ahead=5,
        pages_evicted=6,
        lines_written=7,
        lines_stored=8,
        pages_vanished=9,
        pages_poisoned=10,
    ),
)
REPLIES: list[wire.Reply] = [
    wire.Welcome(
        version=3,
        role=wire.Role.OBSERVER,
        engine_pid=2,
        dram_path="/dram",
        link_socket="/link.sock",
        mktme_version="0.1.0",
        link_version=1,
    ),
    wire.Done(),
    wire.Failure(error="KeyMaterialError", message="no key", hint="make one"),
    wire.VmAdded(keyid=1, base=2 << 20),
    wire.VtpmAdded(socket="/run/tpm", endorsement_key=bytes(32)),
    wire.KeyProgrammed(keyid=5),
    wire.MsrValue(value=2**64 - 1),
    wire.PconfigDone(status=5),
    wire.Status(
        platform=PlatformConfig(exclusion=Exclusion(base=0, size_bytes=1 << 20)),
        custody=Custody(
            dumpable=False, core_limit_bytes=0, memory_locked="all", key_memory=KeyMemory.SECRET
        ),
        keys=(
            wire.KeyStatus(
                keyid=0,
                mode=KeyMode.PLATFORM,
                algorithm=Algorithm.AES_XTS_128,
                vm=None,
                pages=3,
            ),
            wire.KeyStatus(keyid=1, mode=KeyMode.NO_ENCRYPT, algorithm=None, vm=VM, pages=4),
        ),
        vms=(VM_STATUS, INLINE_STATUS),
        dram_bytes=1 << 30,
        memory=wire.Memory(anonymous=1, file=2, shared=3, peak=4),
        cpu_s=0.25,
        keyids_free=61,
    ),
    wire.Data(data=bytes(range(256))),
    wire.SidecarWritten(path="/dram.json"),
    wire.Evidence(token=b"\xd2"),
    wire.Identity(ueid=bytes(33), root="PEM"),
    wire.CaptureStarted(capture=1),
    wire.Decrypted(data=bytes(64), bad=b"\1"),
]
EVENTS: list[wire.Event] = [
    wire.VmLinked(vm=VM),
    wire.VmUnlinked(vm=VM),
    wire.LinkRefused(reason="no"),
    wire.DramFull(vm=VM, message="full"),
    wire.DramCaughtUp(vm=VM),
    wire.VmFault(vm=VM, message="gone"),
    wire.PagePoisoned(
        vm=VM,
        ram_offset=4096,
        address=(2 << 20) + 4160,
        keyid=1,
        lines=2,
        kind=Violation.MISMATCH,
    ),
    wire.HoldVms(capture=1, vms=(VM,)),
    wire.CaptureDone(
        capture=1,
        path="/copy",
        record=CaptureRecord(
            captured_at="2026-01-01T00:00:00.000+00:00",
            method="reflink",
            vms=None,
            pause_s=0.25,
            total_s=1.5,
            data_bytes=8192,
            saved_bytes=0,
            sha256="0" * 64,
            mac_sha256=None,
        ),
    ),
    wire.CaptureFailed(capture=1, error="OutputError", message="full", hint="make space"),
]


def test_samples_are_of_every_message() -> None:
    assert {type(one) for one in REQUESTS} == set(typing.get_args(wire.Request))
    assert {type(one) for one in REPLIES} == set(typing.get_args(wire.Reply))
    assert {type(one) for one in EVENTS} == set(typing.get_args(wire.Event))


def body(message: wire.Message) -> bytes:
    frame = wire.frame(message)
    assert int.from_bytes(frame[: wire.LENGTH_BYTES], "little") == len(frame) - wire.LENGTH_BYTES
    return frame[wire.LENGTH_BYTES :]


def name_of(message: wire.Message) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", REQUESTS, ids=name_of)
def test_request_survives_the_wire(message: wire.Request) -> None:
    assert wire.decode_request(body(message)) == message
    with pytest.raises(ProtocolError, match="Invalid value"):
        wire.decode_reply(body(message))


@pytest.mark.parametrize("message", [*REPLIES, *EVENTS], ids=name_of)
def test_reply_survives_the_wire(message: wire.Reply | wire.Event) -> None:
    assert wire.decode_reply(body(message)) == message
    with pytest.raises(ProtocolError, match="Invalid value"):
        wire.decode_request(body(message))


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ADD_VM.name = "bob"  # type: ignore[misc]


def test_the_engines_counters_are_what_traffic_reports() -> None:
    counters = set(ShadowCounters.__dataclass_fields__)
    assert counters < set(wire.Traffic.__struct_fields__)


def test_the_largest_messages_fit_their_limits() -> None:
    assert len(wire.frame(wire.Data(data=bytes(wire.READ_MAX_BYTES)))) < wire.REPLY_MAX_BYTES
    # A character takes four bytes of UTF-8 at most, a path PATH_MAX.
    name = "\U0001f512" * wire.NAME_MAX_CHARACTERS
    longest = msgspec.structs.replace(ADD_VM, name=name, key_file="/" * 4096)
    assert len(wire.frame(longest)) < wire.REQUEST_MAX_BYTES


ADD: dict[str, Any] = msgspec.msgpack.decode(body(ADD_VM))
UNFIT: dict[str, tuple[Any, str]] = {
    "no message": (None, "Expected `object`"),
    "a list": ([], "Expected `object`"),
    "no type": ({}, "missing required field `type`"),
    "unknown type": ({"type": "Shutdown"}, "Invalid value 'Shutdown'"),
    "type of a reply": ({"type": "Done"}, "Invalid value 'Done'"),
    "type is a number": ({"type": 1}, r"Expected `str`, got `int` - at `\$.type`"),
    "missing field": ({"type": "Hello"}, "missing required field `version`"),
    "unknown field": ({"type": "GetStatus", "verbose": True}, "unknown field `verbose`"),
    "a key": (ADD | {"key": b"0" * 32}, "unknown field `key`"),
    "text for a number": (ADD | {"memory_bytes": "512M"}, r"got `str` - at `\$.memory_bytes`"),
    "a fraction": (ADD | {"memory_bytes": 0.5}, r"got `float` - at `\$.memory_bytes`"),
    "true for a number": (ADD | {"memory_bytes": True}, r"got `bool` - at `\$.memory_bytes`"),
    "nothing for a number": (ADD | {"memory_bytes": None}, r"got `None` - at `\$.memory_bytes`"),
    "unknown algorithm": (ADD | {"algorithm": "rot13"}, "Invalid enum value 'rot13'"),
    "unknown mode": (ADD | {"mode": "DIRECT"}, "Invalid enum value 'DIRECT'"),
    "no UUID": (ADD | {"vm": "alice"}, r"Invalid UUID - at `\$.vm`"),
    "unknown role": ({"type": "Hello", "version": 2, "role": "root"}, "Invalid enum value 'root'"),
    "a name too long": (ADD | {"name": "x" * 256}, r"length <= 255 - at `\$.name`"),
    "bytes for a path": (ADD | {"key_file": b"/key"}, r"got `bytes` - at `\$.key_file`"),
}


@pytest.mark.parametrize(("fields", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_unfit_request_is_refused(fields: Any, message: str) -> None:
    wire.decode_request(msgspec.msgpack.encode(ADD))  # it is the field
    with pytest.raises(ProtocolError, match=message):
        wire.decode_request(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("message", [*REQUESTS[:3], *REPLIES[:5]], ids=name_of)
def test_cut_message_is_refused(message: wire.Message) -> None:
    whole = body(message)
    decode = wire.decode_request if message in REQUESTS else wire.decode_reply
    decode(whole)
    for end in range(len(whole)):
        with pytest.raises(ProtocolError):
            decode(whole[:end])
    with pytest.raises(ProtocolError, match="trailing"):
        decode(whole + b"\xc0")


def test_reply_with_a_platform_that_cannot_be_is_refused() -> None:
    (status,) = (reply for reply in REPLIES if isinstance(reply, wire.Status))
    fields: dict[str, Any] = msgspec.msgpack.decode(body(status))
    fields["platform"]["keyid-bits"] = 16
    with pytest.raises(ProtocolError, match="keyid-bits: 16 is out of range"):
        wire.decode_reply(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", "\u202e"])
def test_refusal_is_one_line_whatever_the_peer_sent(text: str) -> None:
    for fields in ({"type": text}, {"type": "GetStatus", text: 0}):
        with pytest.raises(ProtocolError) as caught:
            wire.decode_request(msgspec.msgpack.encode(fields))
        assert str(caught.value).isprintable()


# --- anything at all --------------------------------------------------------------------------


def decode_or_refuse(data: bytes) -> None:
    """Whatever else is raised fails the test."""
    try:
        request = wire.decode_request(data)
    except ProtocolError:
        return
    # Nothing is taken for a message that would not be sent as one.
    assert wire.decode_request(body(request)) == request


@given(st.binary(max_size=300))
@example(b"\x81\xa4type\xa9GetStatus")
@example(b"\x81\xa4type\xa9GetSt\x80tus")  # not UTF-8
@example(b"\x82\xa1x" + b"\x91" * 60_000 + b"\xc0\xa4type\xa9GetStatus")  # deep
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    decode_or_refuse(data)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@settings(max_examples=200)
@given(
    start=st.sampled_from(REQUESTS),
    fields=st.dictionaries(
        st.sampled_from(["type", "vm", "name", "memory_bytes", "keyid", "mode", "version", "x"]),
        VALUES,
        max_size=3,
    ),
)
def test_any_fields_are_a_request_or_refused(start: wire.Request, fields: dict[str, Any]) -> None:
    decode_or_refuse(msgspec.msgpack.encode(msgspec.msgpack.decode(body(start)) | fields))


@given(
    start=st.sampled_from(REQUESTS),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
)
def test_damaged_request_is_a_request_or_refused(
    start: wire.Request, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(body(start))
    for at, value in edits:
        data[at % len(data)] = value
    decode_or_refuse(bytes(data))
