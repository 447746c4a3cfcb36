# SPDX-License-Identifier: GPL-2.0-or-later
"""What a source and ``mktme receive`` say to each other, version `PROTOCOL_VERSION`.

A message is a line of JSON. The receiver speaks first, `Greeting`; then each `Request` but `Beat`
gets one `Reply`, in order, and `Note` and `Trouble` may come in between. Decoding is strict, but
for the greeting: what other versions say there has to be understood, to be refused.

No message carries a key. What it does carry of a guest, what its shell says, is protected by ssh.
"""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Final, TypeAlias
from uuid import UUID

import msgspec

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.window import Policy
from mktme.engine.errors import MktmeError
from mktme.engine.xts import LINE_BYTES, Algorithm
from mktme.proof.held import HeldProof
from mktme.vm.arrival import Place, Side
from mktme.vm.hardware import Machine
from mktme.vm.images import Manifest
from mktme.vm.pages import GuestPages

PROTOCOL_VERSION: Final = 1
LINE_MAX_BYTES: Final = 512 << 20
"""Of what a source says: a kernel and an initramfs are a part of it."""
REPLY_MAX_BYTES: Final = 16 << 20
TIMEOUT_MAX_S: Final = 86400.0
BEAT_S: Final = 5.0
"""A source says something at least so often."""
SILENT_S: Final = 30.0
"""One that has not for so long is gone, as far as a receiver can tell."""


class WireError(MktmeError):
    """What came is no message."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages; the class name is the tag on the wire."""


class Greeting(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What a receiver says first.

    Attributes:
        protocol: version of all that follows.
        mktme: the package's version.
    """

    protocol: int
    mktme: str


# --- requests ---------------------------------------------------------------------------------


class Open(Message, frozen=True):
    """Start a platform: `Opened`.

    Attributes:
        connect: the libvirt there, as one there has to call it.
        dram_bytes: size of its DRAM.
        exchange: path of a directory, which is made; in it is the socket that memory comes to.
    """

    connect: str
    dram_bytes: Annotated[int, msgspec.Meta(gt=0)]
    exchange: str


class Image(Message, frozen=True):
    """What a guest boots: not everyone has the same, and it boots it again.

    Attributes:
        kernel: the file's contents, as of `initrd`.
    """

    name: str
    cmdline: str
    manifest: Manifest
    kernel: bytes
    initrd: bytes


class Expect(Message, frozen=True):
    """Make ready for a guest: `Expecting`.

    Attributes:
        vm: its UUID.
        name: what to call it.
        encrypted: False: its KeyID is NO_ENCRYPT.

    The others are those of `mktme.vm.config.VmConfig`.
    """

    vm: UUID
    name: str
    image: Image
    memory_bytes: int
    vcpus: int
    datapath: DataPath
    track: Track | None
    window_bytes: int | None
    policy: Policy
    algorithm: Algorithm
    encrypted: bool
    pages: tuple[GuestPages, ...]
    check_tlb: bool
    machine: Machine


class Moved(Message, frozen=True):
    """libvirt has moved the guest: `Arrived`."""


class NotMoved(Message, frozen=True):
    """It has not: a `Failure`, with what is known there of the cause, once nothing is left of it.

    Attributes:
        why: as far as the source knows.
    """

    why: str


class Run(Message, frozen=True):
    """Run commands in the guest: `Ran`; see `mktme.vm.shell.Shell`."""

    command: str
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=TIMEOUT_MAX_S)]
    check: bool


class Prove(Message, frozen=True):
    """Hold the guest, and look at its memory from all sides: `Proven`.

    Attributes:
        canary: the line that it repeats through a page.
    """

    canary: Annotated[bytes, msgspec.Meta(min_length=LINE_BYTES, max_length=LINE_BYTES)]


class Leave(Message, frozen=True):
    """Take the guest down: `Done`."""


class Beat(Message, frozen=True):
    """The source is there; not answered."""


# --- replies, and what comes in between -------------------------------------------------------


class Opened(Message, frozen=True):
    """There is a platform."""

    side: Side


class Expecting(Message, frozen=True):
    """All is ready for the guest."""

    place: Place


class Arrived(Message, frozen=True):
    """It is there: linked to the engine, encrypted.

    Attributes:
        keyid: its KeyID.
        base: where its RAM starts in DRAM.
    """

    keyid: int
    base: int


class Ran(Message, frozen=True):
    """What commands printed, and their exit status."""

    output: str
    status: int


class Proven(Message, frozen=True):
    """What was found."""

    proof: HeldProof


class Done(Message, frozen=True):
    """It was done."""


class Failure(Message, frozen=True):
    """It was refused, or failed.

    Attributes:
        error: name of the exception class, one of the tree in `mktme.engine.errors`.
    """

    error: str
    message: str
    hint: str | None = None


class Note(Message, frozen=True):
    """A line for the user."""

    line: str


class Trouble(Message, frozen=True):
    """What keeps the guest from coming."""

    why: str


Request: TypeAlias = Open | Expect | Moved | NotMoved | Run | Prove | Leave | Beat
Reply: TypeAlias = Opened | Expecting | Arrived | Ran | Proven | Done | Failure | Note | Trouble

_encoder: Final = msgspec.json.Encoder()
_requests: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request)
_replies: Final[msgspec.json.Decoder[Reply]] = msgspec.json.Decoder(Reply)
_greetings: Final = msgspec.json.Decoder(Greeting)
_DECODE_ERRORS: Final = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


def greeting() -> Greeting:
    """This package's."""
    return Greeting(protocol=PROTOCOL_VERSION, mktme=metadata.version("mktme"))


def decode_greeting(line: bytes) -> Greeting | None:
    """A line as a greeting; None: it is none, but what a login says, perhaps."""
    try:
        return _greetings.decode(line)
    except _DECODE_ERRORS:
        return None


def decode_request(line: bytes) -> Request:
    """Decode what a source said.

    Raises:
        WireError: it is no request.
    """
    try:
        return _requests.decode(line)
    except _DECODE_ERRORS as error:
        raise WireError(f"not a request: {error!r}") from error


def decode_reply(line: bytes) -> Reply:
    """Decode what a receiver said.

    Raises:
        WireError: it is neither a reply nor what comes in between.
    """
    try:
        return _replies.decode(line)
    except _DECODE_ERRORS as error:
        raise WireError(f"not a reply: {error!r}") from error


def line_of(message: Message | Greeting) -> bytes:
    """A message as it goes over the wire."""
    return _encoder.encode(message) + b"\n"
