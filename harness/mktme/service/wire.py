# SPDX-License-Identifier: GPL-2.0-or-later
"""What control clients and the engine say to each other, version `PROTOCOL_VERSION`.

A frame is a 4-byte little-endian length and that many bytes of MessagePack: a `Request` one way,
a `Reply` or an `Event` the other. Requests of one connection are answered in order; events come
in between. Decoding is strict: an unknown type, a missing or unknown field or a value of another
type is a `ProtocolError`. No message carries a key in either direction: a known key is named by
its file, which the engine reads itself; one that a key broker releases is encrypted to the engine.

The first request of a connection is `Hello`, which asks for a role. Each class of request says
what the least role is that may send it; if it says nothing, that is the owner.
"""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar, Final, TypeAlias
from uuid import UUID

import msgspec

from mktme.attest.claims import NONCE_MAX_BYTES, NONCE_MIN_BYTES, REPORT_DATA_BYTES
from mktme.attest.jwe import MAX_BYTES as JWE_MAX_BYTES
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.window import Policy
from mktme.engine.errors import MktmeError
from mktme.engine.firmware import PlatformConfig, PlatformConfigError
from mktme.engine.integrity import Violation
from mktme.engine.keys import KeyMode
from mktme.engine.package import PowerEvent
from mktme.engine.sidecar import CaptureRecord, GuestSegment, PageRange
from mktme.engine.xts import Algorithm
from mktme.service.custody import Custody

PROTOCOL_VERSION: Final = 5
LENGTH_BYTES: Final = 4
REQUEST_MAX_BYTES: Final = 64 << 10
READ_MAX_BYTES: Final = 4 << 20
WRITE_MAX_BYTES: Final = REQUEST_MAX_BYTES - (4 << 10)  # the rest of a request has room beside it
DECRYPT_MAX_BYTES: Final = 14 * 4096  # with its MACs
NAME_MAX_CHARACTERS: Final = 255
PAGE_RANGES_MAX: Final = 1024
DOMAIN_MAX_CHARACTERS: Final = 48 << 10
REPLY_MAX_BYTES: Final = READ_MAX_BYTES + (64 << 10)


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages; the class name is the tag on the wire."""


# --- requests ---------------------------------------------------------------------------------


class Role(enum.Enum):
    """What a control connection may do."""

    OWNER = "owner"
    """Everything."""
    OBSERVER = "observer"
    """What neither reads a guest's memory nor changes anything; events come as well."""

    def may_send(self, request: Command) -> bool:
        """Whether a connection of this role may send a request."""
        return self is Role.OWNER or request.least_role is Role.OBSERVER


class Hello(Message, frozen=True):
    """First request of a connection: the client's protocol version, and the role it asks for."""

    version: int
    role: Role = Role.OWNER


class _Command(Message, frozen=True):
    """Base of all requests that come after `Hello`.

    Attributes:
        least_role: the lowest role that may send it.
        is_audited: whether it goes into the audit log (`mktme.service.audit`).
    """

    least_role: ClassVar[Role] = Role.OWNER
    is_audited: ClassVar[bool] = False


class GetStatus(_Command, frozen=True):
    """Ask for `Status`."""

    least_role: ClassVar[Role] = Role.OBSERVER


class NvdimmFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An NVDIMM of a VM's.

    Attributes:
        path: its image, absolute; made if neither it nor its description is there.
        size_bytes: its size, whole 2 MiB.
        shared: whether it is under KeyID 0, whose key outlives VMs, and not under the VM's.
    """

    path: str
    size_bytes: Annotated[int, msgspec.Meta(gt=0)]
    shared: bool = False


class AddVm(_Command, frozen=True):
    """Announce a VM: program its KeyID and set aside its DRAM; its QEMU may then link.

    Attributes:
        name: for people; printable, at most `NAME_MAX_CHARACTERS`.
        memory_bytes: guest RAM, whole 4 KiB pages.
        track: `shadow`: what tells of writes. `inline`: stores, to count them, or None.
        window_bytes: `inline`: the most plaintext there may be, whole pages.
        policy: `inline`: which pages leave a full window.
        mode: how its KeyID is programmed: direct, random or no-encrypt; platform, for KeyID 0, if
            the platform has no other.
        key_file: absolute path of the key, for mode direct only.
        nvdimm: memory behind its RAM that outlives it.
        dimm_bytes: memory behind all that, for what is plugged in while it runs; whole pages.
        visible: whether its guest sees the platform's registers, and may program KeyIDs.
    """

    is_audited: ClassVar[bool] = True

    vm: UUID
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_MAX_CHARACTERS)]
    memory_bytes: int
    track: Track | None
    algorithm: Algorithm
    mode: KeyMode
    key_file: str | None = None
    datapath: DataPath = DataPath.SHADOW
    window_bytes: int | None = None
    policy: Policy = Policy.TWO_QUEUES
    nvdimm: NvdimmFile | None = None
    dimm_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    visible: bool = False


class AddVtpm(_Command, frozen=True):
    """Give a VM a TPM, before its QEMU is started; it goes with the VM."""

    is_audited: ClassVar[bool] = True

    vm: UUID


class RemoveVm(_Command, frozen=True):
    """Forget a VM: its link is closed, its KeyID cleared, its DRAM set free."""

    is_audited: ClassVar[bool] = True

    vm: UUID


class FlushVm(_Command, frozen=True):
    """Bring all that the VM wrote into DRAM; of a paused VM, DRAM is then exactly its RAM."""

    vm: UUID


class ReadVm(_Command, frozen=True):
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


class ReadDram(_Command, frozen=True):
    """Read DRAM through the engine, whoever's it is; otherwise as `ReadVm`.

    Attributes:
        address: first byte, a multiple of 4096.
    """

    address: int
    size_bytes: int
    keyid: int | None = None


class WriteDram(_Command, frozen=True):
    """Write DRAM through the engine, whoever's it is, as a reference with `keyid` would.

    It is what software that maps another's page under a KeyID of its own can do, which no MKTME
    prevents and integrity reveals: the pages stay assigned to the KeyID that they were. Of an
    `inline` VM, pages in the window are not touched; DRAM gets them anew when they leave it.

    For owners only. It gives them nothing that they could not have: an owner reads every VM's
    memory, chooses KeyIDs, starts the VMs' QEMUs, and has the DRAM file (docs/adr/0006).

    Attributes:
        address: of the first line, a multiple of 64.
        data: plaintext, whole lines of 64 bytes, at most `WRITE_MAX_BYTES`.
        keyid: what to encrypt with.
    """

    is_audited: ClassVar[bool] = True

    address: int
    data: Annotated[bytes, msgspec.Meta(max_length=WRITE_MAX_BYTES)]
    keyid: int


class ReadMarks(_Command, frozen=True):
    """Ask which lines of a VM's pages the store tracker ever reported."""

    vm: UUID
    first_page: int
    page_count: int


class WriteSidecar(_Command, frozen=True):
    """Write the JSON description beside the DRAM image, as of now."""


class StartCapture(_Command, frozen=True):
    """Copy DRAM as it is at one moment to a file; the answer comes at once, then events.

    Attributes:
        path: of the copy, absolute; nothing may be there, nor its sidecar or MACs.
        vms: whose memory; none: all of DRAM.
    """

    is_audited: ClassVar[bool] = True

    path: str
    vms: tuple[UUID, ...] = ()


class VmsHeld(_Command, frozen=True):
    """The VMs that `HoldVms` told of stand still. They may go on when the answer is there.

    Attributes:
        problem: why they do not; None if they do.
    """

    capture: int
    problem: str | None = None


class VmsReleased(_Command, frozen=True):
    """After `VmsHeld`: they go on.

    Attributes:
        pause_ns: how long they stood still, nanoseconds; None if all of them did before already.
    """

    capture: int
    pause_ns: Annotated[int, msgspec.Meta(ge=0)] | None


class CancelCapture(_Command, frozen=True):
    """End a capture; nothing is left of it."""

    capture: int


class DecryptLines(_Command, frozen=True):
    """Decrypt what a copy of DRAM holds with a key of the platform's.

    For owners only. Of a KeyID without MACs it gives them nothing that they could not have; of one
    with MACs, also what its lines would be that do not match theirs (docs/adr/0013).

    Attributes:
        keyid: whose key.
        address: where in DRAM it was, a multiple of 64.
        data: ciphertext, whole lines, at most `DECRYPT_MAX_BYTES`.
        entries: what the MAC area had for the lines, 4 bytes each, if they are to be checked.
    """

    keyid: int
    address: Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
    data: Annotated[bytes, msgspec.Meta(max_length=DECRYPT_MAX_BYTES)]
    entries: Annotated[bytes, msgspec.Meta(max_length=DECRYPT_MAX_BYTES // 16)] | None = None


class ReadMsr(_Command, frozen=True):
    """Execute RDMSR on the package."""

    least_role: ClassVar[Role] = Role.OBSERVER

    msr: int


class WriteMsr(_Command, frozen=True):
    """Execute WRMSR on the package."""

    is_audited: ClassVar[bool] = True

    msr: int
    value: Annotated[int, msgspec.Meta(ge=0)]


class ExecutePconfig(_Command, frozen=True):
    """Execute PCONFIG on the package.

    A VM whose KeyID it changes is stopped: what it had in memory is lost.

    Attributes:
        leaf: EAX.
        address: RBX; only its alignment matters.
        program: MKTME_KEY_PROGRAM_STRUCT, 192 bytes, both key fields zero.
        key_file: absolute path of what the engine puts into the key fields: data key, then tweak
            key, or as much entropy for a random key.
    """

    is_audited: ClassVar[bool] = True

    leaf: int
    address: int
    program: bytes
    key_file: str | None = None


class ProgramKey(_Command, frozen=True):
    """Program a KeyID that nobody uses.

    Attributes:
        mode: direct, random or no-encrypt.
        keyid: which one; None for the first that is free.
        key_file: absolute path of the key, for mode direct only.
        vm: whose it is, and with whom it goes; None for nobody's.
    """

    is_audited: ClassVar[bool] = True

    mode: KeyMode
    algorithm: Algorithm
    keyid: int | None = None
    key_file: str | None = None
    vm: UUID | None = None


class ClearKey(_Command, frozen=True):
    """Destroy the key of a KeyID that nobody uses."""

    is_audited: ClassVar[bool] = True

    keyid: int


class AssignPages(_Command, frozen=True):
    """Give pages of a VM another KeyID; DRAM then holds them encrypted for it.

    Attributes:
        ram_offset: first byte, a multiple of 4096.
        size_bytes: how much, a multiple of 4096.
        keyid: 0 for pages shared with the platform, one of the VM's, or one that is nobody's;
            None for the VM's own.
    """

    is_audited: ClassVar[bool] = True

    vm: UUID
    ram_offset: int
    size_bytes: int
    keyid: int | None = None


class ReleasePage(_Command, frozen=True):
    """Let go on who waits for a page that `PagePoisoned` told of; its bad lines read as ones.

    Attributes:
        ram_offset: of the page.
    """

    is_audited: ClassVar[bool] = True

    vm: UUID
    ram_offset: int


class DiscardMemory(_Command, frozen=True):
    """Forget what a DIMM held that was unplugged: whoever plugs it in again finds zeros.

    Attributes:
        ram_offset: of the first byte, a multiple of 4096, behind RAM and NVDIMM.
        size_bytes: how much, a multiple of 4096.
    """

    is_audited: ClassVar[bool] = True

    vm: UUID
    ram_offset: int
    size_bytes: int


class PowerPlatform(_Command, frozen=True):
    """Let a power event happen: every VM ends, and firmware sets the platform up again."""

    is_audited: ClassVar[bool] = True

    event: PowerEvent


class DescribeDomain(_Command, frozen=True):
    """Tell what libvirt was told of a VM; before its QEMU links, for evidence to be had of it.

    Attributes:
        xml: libvirt's domain.
    """

    vm: UUID
    xml: Annotated[str, msgspec.Meta(max_length=DOMAIN_MAX_CHARACTERS)]


class GetEvidence(_Command, frozen=True):
    """Ask for signed `Evidence`. Nothing in it can be chosen but these.

    Attributes:
        nonce: comes back in it.
        vm: whose; None for all VMs of which there is any.
        report_data: comes back with each VM.
    """

    least_role: ClassVar[Role] = Role.OBSERVER
    is_audited: ClassVar[bool] = True

    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_MIN_BYTES, max_length=NONCE_MAX_BYTES)]
    vm: UUID | None = None
    report_data: Annotated[
        bytes, msgspec.Meta(min_length=REPORT_DATA_BYTES, max_length=REPORT_DATA_BYTES)
    ] = bytes(REPORT_DATA_BYTES)


class GetIdentity(_Command, frozen=True):
    """Ask who signs evidence."""

    least_role: ClassVar[Role] = Role.OBSERVER


class ReleaseKey(_Command, frozen=True):
    """Program a KeyID with a key that a broker released, and give it the VM's pages.

    It becomes the VM's own KeyID; the one that it had is cleared. The VM's recipient key is
    another one afterwards. Pages that are under neither stay as they are.

    Attributes:
        jwe: data key, then tweak key, encrypted to the VM's recipient key (`mktme.attest.jwe`).
    """

    is_audited: ClassVar[bool] = True

    vm: UUID
    jwe: Annotated[bytes, msgspec.Meta(max_length=JWE_MAX_BYTES)]


Command: TypeAlias = (
    GetStatus
    | AddVm
    | AddVtpm
    | RemoveVm
    | FlushVm
    | ReadVm
    | ReadDram
    | WriteDram
    | ReadMarks
    | WriteSidecar
    | StartCapture
    | VmsHeld
    | VmsReleased
    | CancelCapture
    | DecryptLines
    | ReadMsr
    | WriteMsr
    | ExecutePconfig
    | ProgramKey
    | ClearKey
    | AssignPages
    | ReleasePage
    | DiscardMemory
    | PowerPlatform
    | DescribeDomain
    | GetEvidence
    | GetIdentity
    | ReleaseKey
)
Request: TypeAlias = Hello | Command


# --- replies ----------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The engine speaks the client's version, and grants it a role.

    Attributes:
        mktme_version: of the package that the engine is from.
        link_version: what it speaks with plugins (`mktme.datapath.link`).
    """

    version: int
    role: Role
    engine_pid: int
    dram_path: str
    link_socket: str
    mktme_version: str
    link_version: int


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


class VtpmAdded(Message, frozen=True):
    """The TPM is made.

    Attributes:
        socket: where the VM's QEMU, and nobody else, is to connect to it.
        endorsement_key: SHA-256 of its EK (DER, SubjectPublicKeyInfo), 32 bytes.
    """

    socket: str
    endorsement_key: bytes


class KeyProgrammed(Message, frozen=True):
    """Which KeyID was programmed."""

    keyid: int


class MsrValue(Message, frozen=True):
    """What RDMSR read."""

    value: int


class PconfigDone(Message, frozen=True):
    """What PCONFIG left in RAX: see `mktme.engine.pconfig.Status`."""

    status: int


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


class Paging(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A VM's window so far; counters as in `mktme.datapath.inline.InlineCounters`.

    Attributes:
        service_s: time spent serving faults and flushing, seconds.
        resident_bytes: plaintext in the window now.
        peak_bytes: the most that ever was.
        fault_median_s: from when the engine has read a fault until who waits can go on, seconds;
            half of the faults took no longer. None without any.
        fault_p99_s: as that, of 99 of 100 faults.
        tlb_misses: of the plugin's micro-TLB, None without the store tracker; so the next three.
    """

    service_s: float
    policy: Policy
    window_bytes: int
    resident_bytes: int
    peak_bytes: int
    faults: int
    pages_fetched: int
    pages_read_ahead: int
    pages_evicted: int
    lines_written: int
    lines_stored: int
    pages_vanished: int
    pages_poisoned: int
    fault_median_s: float | None = None
    fault_p99_s: float | None = None
    tlb_misses: int | None = None
    tlb_flushes: int | None = None
    tlb_checked: int | None = None
    tlb_errors: int | None = None


class VmStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One VM as the engine sees it.

    Attributes:
        linked: whether its QEMU is connected; `qemu_pid`, `segments`, and `traffic` (`shadow`) or
            `paging` (`inline`) come with it.
        further_keyids: KeyIDs that were programmed for it beside its own.
        pages: the KeyID of each of its pages, in runs, the first `PAGE_RANGES_MAX` of them;
            addresses are DRAM's.
        fault: why its memory is not followed any more or not now, None if all is well.
    """

    vm: UUID
    name: str
    keyid: int
    base: int
    memory_bytes: int
    track: Track | None
    linked: bool
    datapath: DataPath = DataPath.SHADOW
    further_keyids: tuple[int, ...] = ()
    pages: tuple[PageRange, ...] = ()
    fault: str | None = None
    qemu_pid: int | None = None
    plugin_api: int | None = None
    segments: tuple[GuestSegment, ...] = ()
    traffic: Traffic | None = None
    paging: Paging | None = None


class KeyStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One KeyID: how it was programmed, never with what.

    Attributes:
        vm: the VM that it was programmed for.
        pages: how many pages are assigned to it.
    """

    keyid: int
    mode: KeyMode
    algorithm: Algorithm | None
    vm: UUID | None
    pages: int


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The engine's memory in bytes (``/proc/PID/status``: RssAnon, RssFile, RssShmem, VmHWM)."""

    anonymous: int
    file: int
    shared: int
    peak: int


class Status(Message, frozen=True):
    """Answer to `GetStatus`.

    Attributes:
        platform: what firmware set up.
        keyids_free: how many KeyIDs can be programmed and are not.
        custody: how the engine keeps its memory to itself.
        cpu_s: processor time that the engine has used, user and system, seconds.
    """

    platform: PlatformConfig
    custody: Custody

    keys: tuple[KeyStatus, ...]
    keyids_free: int
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


class CaptureStarted(Message, frozen=True):
    """What events call the capture."""

    capture: int


class Decrypted(Message, frozen=True):
    """Plaintext; zeros in lines never written.

    Attributes:
        bad: a byte a line, 1 if it does not match its MAC; empty if they were not checked.
    """

    data: bytes
    bad: bytes


class Evidence(Message, frozen=True):
    """Answer to `GetEvidence`: a token of `mktme.attest.token`."""

    token: bytes


class Identity(Message, frozen=True):
    """Answer to `GetIdentity`.

    Attributes:
        ueid: the platform's name in evidence.
        root: the certificate that evidence's chain ends in, PEM. It proves nothing by itself.
    """

    ueid: bytes
    root: str


Reply: TypeAlias = (
    Welcome
    | Done
    | Failure
    | VmAdded
    | VtpmAdded
    | KeyProgrammed
    | MsrValue
    | PconfigDone
    | Status
    | Data
    | SidecarWritten
    | CaptureStarted
    | Decrypted
    | Evidence
    | Identity
)


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


class PagePoisoned(Message, frozen=True):
    """A line does not match its MAC; who wanted its page waits until `ReleasePage`.

    Attributes:
        ram_offset: of the page.
        address: of the first bad line in DRAM.
        keyid: the KeyID that it was read with.
        lines: bit i is set if line i of the page is bad.
        kind: what is wrong with the first bad line.
    """

    vm: UUID
    ram_offset: int
    address: int
    keyid: int
    lines: int
    kind: Violation


class HoldVms(Message, frozen=True):
    """A capture needs VMs to stand still: whoever runs them answers with `VmsHeld`."""

    capture: int
    vms: tuple[UUID, ...]


class CaptureDone(Message, frozen=True):
    """A capture is complete, and its file there.

    Attributes:
        record: what its sidecar says of it.
    """

    capture: int
    path: str
    record: CaptureRecord


class CaptureFailed(Message, frozen=True):
    """A capture came to nothing, and nothing is left of it; otherwise as `Failure`."""

    capture: int
    error: str
    message: str
    hint: str | None = None


Event: TypeAlias = (
    VmLinked
    | VmUnlinked
    | LinkRefused
    | DramFull
    | DramCaughtUp
    | VmFault
    | PagePoisoned
    | HoldVms
    | CaptureDone
    | CaptureFailed
)

_encoder: Final = msgspec.msgpack.Encoder()
_request_decoder: Final[msgspec.msgpack.Decoder[Request]] = msgspec.msgpack.Decoder(Request)
_reply_decoder: Final[msgspec.msgpack.Decoder[Reply | Event]] = msgspec.msgpack.Decoder(
    Reply | Event
)
# msgspec's own, and what it lets through: of a type that is not UTF-8, of deep nesting, and of
# settings that no platform can have.
_DECODE_ERRORS: Final = (
    msgspec.MsgspecError,
    UnicodeDecodeError,
    RecursionError,
    PlatformConfigError,
)


class ProtocolError(MktmeError):
    """What came is no message of this protocol, or has no place here."""


class RoleError(MktmeError):
    """A connection asked for a role, or sent a request, that it may not have or send."""


def decode_request(body: bytes) -> Request:
    """Decode what a client sent.

    Raises:
        ProtocolError: it is no request.
    """
    try:
        return _request_decoder.decode(body)
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"not a valid request: {_on_one_line(error)}") from error


def decode_reply(body: bytes) -> Reply | Event:
    """Decode what the engine sent.

    Raises:
        ProtocolError: it is neither a reply nor an event.
    """
    try:
        return _reply_decoder.decode(body)
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"not a valid reply: {_on_one_line(error)}") from error


def _on_one_line(error: Exception) -> str:
    """What an error says. It may quote the peer, who must not write lines of the log."""
    text = str(error)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def frame(message: Message) -> bytes:
    """A message as it goes over the wire, its length first."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body
