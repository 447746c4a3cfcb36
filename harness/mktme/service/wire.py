# SPDX-License-Identifier: GPL-2.0-or-later
"""What control clients and the engine say to each other, version `PROTOCOL_VERSION`.

A frame is a 4-byte little-endian length and that many bytes of MessagePack: a `Request` one way,
a `Reply` or an `Event` the other. Requests of one connection are answered in order; events come
in between. Decoding is strict: an unknown type, a missing or unknown field or a value of another
type is a `ProtocolError`. No message carries a key in either direction: a known key is named by
its file, which the engine reads itself.
"""

from __future__ import annotations

from typing import Final, TypeAlias
from uuid import UUID

import msgspec

from mktme.datapath.shadow import Track
from mktme.engine.dram import GuestSegment
from mktme.engine.errors import MktmeError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm

PROTOCOL_VERSION: Final = 1
LENGTH_BYTES: Final = 4
REQUEST_MAX_BYTES: Final = 64 << 10
READ_MAX_BYTES: Final = 4 << 20
REPLY_MAX_BYTES: Final = READ_MAX_BYTES + (64 << 10)


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages; the class name is the tag on the wire."""


# --- requests ---------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First request of a connection: which protocol version the client speaks."""

    version: int


class GetStatus(Message, frozen=True):
    """Ask for `Status`."""


class AddVm(Message, frozen=True):
    """Announce a VM: program its KeyID and set aside its DRAM; its QEMU may then link.

    Attributes:
        memory_bytes: guest RAM, whole 4 KiB pages.
        mode: how its KeyID is programmed: direct, random or no-encrypt.
        key_file: absolute path of the key, for mode direct only.
    """

    vm: UUID
    name: str
    memory_bytes: int
    track: Track
    algorithm: Algorithm
    mode: KeyMode
    key_file: str | None = None


class RemoveVm(Message, frozen=True):
    """Forget a VM: its link is closed, its KeyID cleared, its DRAM set free."""

    vm: UUID


class FlushVm(Message, frozen=True):
    """Bring all that the VM wrote into DRAM; of a paused VM, DRAM is then exactly its RAM."""

    vm: UUID


class ReadVm(Message, frozen=True):
    """Read a VM's region of DRAM through the engine, as a reference with `keyid` would.

    Attributes:
        ram_offset: first byte, a multiple of 4096.
        size_bytes: how much, a multiple of 4096, at most `READ_MAX_BYTES`.
        keyid: None for the KeyID that each page is assigned.
    """

    vm: UUID
    ram_offset: int
    size_bytes: int
    keyid: int | None = None


class ReadMarks(Message, frozen=True):
    """Ask which lines of a VM's pages the store tracker ever reported."""

    vm: UUID
    first_page: int
    page_count: int


class WriteSidecar(Message, frozen=True):
    """Write the JSON description beside the DRAM image, as of now."""


Request: TypeAlias = (
    Hello | GetStatus | AddVm | RemoveVm | FlushVm | ReadVm | ReadMarks | WriteSidecar
)


# --- replies ----------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The engine speaks the client's version."""

    version: int
    engine_pid: int
    dram_path: str
    link_socket: str


class Done(Message, frozen=True):
    """It was done, there is nothing more to say."""


class Failure(Message, frozen=True):
    """The request was refused or failed.

    Attributes:
        error: name of the exception class, one of the tree in `mktme.engine.errors`.
    """

    error: str
    message: str
    hint: str | None = None


class VmAdded(Message, frozen=True):
    """Where the VM's RAM is in DRAM, and under which KeyID."""

    keyid: int
    base: int


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A VM's write traffic so far; fields as in `mktme.datapath.shadow.ShadowCounters`.

    Attributes:
        drain_s: time spent draining, seconds.
        interval_s: the wait between drains now, seconds.
        pending_pages: pages known to be written and not in DRAM yet.
        tlb_misses: of the plugin's micro-TLB, None without the store tracker; so the next three.
    """

    drains: int
    drain_s: float
    interval_s: float
    pending_pages: int
    pages_written: int
    pages_vanished: int
    lines_marked: int
    lines_encrypted: int
    lines_stored: int
    lines_other: int
    tlb_misses: int | None = None
    tlb_flushes: int | None = None
    tlb_checked: int | None = None
    tlb_errors: int | None = None


class VmStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One VM as the engine sees it.

    Attributes:
        linked: whether its QEMU is connected; `qemu_pid`, `segments` and `traffic` come with it.
        fault: why its memory is not followed any more or not now, None if all is well.
    """

    vm: UUID
    name: str
    keyid: int
    base: int
    memory_bytes: int
    track: Track
    linked: bool
    fault: str | None = None
    qemu_pid: int | None = None
    plugin_api: int | None = None
    segments: tuple[GuestSegment, ...] = ()
    traffic: Traffic | None = None


class KeyStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One KeyID: how it was programmed, never with what."""

    keyid: int
    mode: KeyMode
    algorithm: Algorithm | None


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The engine's memory in bytes (``/proc/PID/status``: RssAnon, RssFile, RssShmem, VmHWM)."""

    anonymous: int
    file: int
    shared: int
    peak: int


class Status(Message, frozen=True):
    """Answer to `GetStatus`.

    Attributes:
        cpu_s: processor time that the engine has used, user and system, seconds.
    """

    keys: tuple[KeyStatus, ...]
    vms: tuple[VmStatus, ...]
    dram_bytes: int
    memory: Memory
    cpu_s: float


class Data(Message, frozen=True):
    """Bytes: plaintext for `ReadVm`, one little-endian 64-bit mask a page for `ReadMarks`."""

    data: bytes


class SidecarWritten(Message, frozen=True):
    """Where the description is."""

    path: str


Reply: TypeAlias = Welcome | Done | Failure | VmAdded | Status | Data | SidecarWritten


# --- events -----------------------------------------------------------------------------------


class VmLinked(Message, frozen=True):
    """A VM's QEMU said hello and was accepted."""

    vm: UUID


class VmUnlinked(Message, frozen=True):
    """A VM's QEMU is gone."""

    vm: UUID


class LinkRefused(Message, frozen=True):
    """Somebody connected to the plugin socket and was refused."""

    reason: str


class DramFull(Message, frozen=True):
    """A VM's writes do not fit: pause it. They stay pending and are retried."""

    vm: UUID
    message: str


class DramCaughtUp(Message, frozen=True):
    """After `DramFull`: the VM's pending writes are in DRAM now."""

    vm: UUID


class VmFault(Message, frozen=True):
    """A VM's memory cannot be followed any more; the engine has cut its link, which stops it."""

    vm: UUID
    message: str


Event: TypeAlias = VmLinked | VmUnlinked | LinkRefused | DramFull | DramCaughtUp | VmFault

_encoder: Final = msgspec.msgpack.Encoder()
_request_decoder: Final[msgspec.msgpack.Decoder[Request]] = msgspec.msgpack.Decoder(Request)
_reply_decoder: Final[msgspec.msgpack.Decoder[Reply | Event]] = msgspec.msgpack.Decoder(
    Reply | Event
)
# msgspec's own, and two that it lets through: of a type that is not UTF-8, and of deep nesting.
_DECODE_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class ProtocolError(MktmeError):
    """What came is no message of this protocol."""


def decode_request(body: bytes) -> Request:
    """Decode what a client sent.

    Raises:
        ProtocolError: it is no request.
    """
    try:
        return _request_decoder.decode(body)
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"not a valid request: {error}") from error


def decode_reply(body: bytes) -> Reply | Event:
    """Decode what the engine sent.

    Raises:
        ProtocolError: it is neither a reply nor an event.
    """
    try:
        return _reply_decoder.decode(body)
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"not a valid reply: {error}") from error


def frame(message: Message) -> bytes:
    """A message as it goes over the wire, its length first."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body
