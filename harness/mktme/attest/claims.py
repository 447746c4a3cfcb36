# SPDX-License-Identifier: GPL-2.0-or-later
"""What evidence says: an Entity Attestation Token's claims (RFC 9711), and their CBOR labels.

The platform is the entity; each VM is a submodule of it, named by its UUID. Labels of RFC 8392,
RFC 8747 and RFC 9711 are theirs; the others are from the range for private use (below -65536).
``docs/attestation/evidence.cddl`` has the same in CDDL (RFC 8610).

Decoding is as strict as encoding is uniform: an unknown claim, a missing one, or a value of
another type or out of its range is a `TokenError`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import hashlib
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final, Literal, TypeVar
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from mktme.attest import cbor
from mktme.attest.errors import TokenError
from mktme.engine.keys import KeyMode
from mktme.engine.tme import TmeActivate
from mktme.engine.xts import PAGE_BYTES, Algorithm

PROFILE: Final = "urn:uuid:5d2b7a52-3f0e-4c1b-9a49-5c6a0e3fb0a1"
"""EAT profile of this document (RFC 9711, section 6); another format of evidence has another."""
NONCE_MIN_BYTES: Final = 8
NONCE_MAX_BYTES: Final = 64
REPORT_DATA_BYTES: Final = 64
UEID_BYTES: Final = 33
EXCEPTIONS_MAX: Final = 1024
COMPONENTS_MAX: Final = 64
LINE_MAX_CHARACTERS: Final = 255
"""Of a name or a fault."""

_DIGEST_BYTES: Final = 32
_EXCLUDE_ENABLE: Final = 1 << 11

Digest = Annotated[bytes, msgspec.Meta(min_length=_DIGEST_BYTES, max_length=_DIGEST_BYTES)]
# CBOR's own integers end at 64 bits.
_Uint64 = Annotated[int, msgspec.Meta(ge=0)]
_Time = Annotated[int, msgspec.Meta(ge=0, lt=1 << 37)]  # till the year 6325
_Line = Annotated[
    str,
    msgspec.Meta(min_length=1, max_length=LINE_MAX_CHARACTERS, pattern=r"\A[^\x00-\x1f\x7f]*\Z"),
]
_T = TypeVar("_T")


class KeySource(enum.Enum):
    """Where a VM's key comes from."""

    RANDOM = "random"
    """The platform drew it; nobody else ever had it."""
    FILE = "file"
    """Software on the platform gave it."""
    BROKER = "broker"
    """It came encrypted to the VM's recipient key, as a key broker gives it.

    By whom, the engine does not know: whoever has evidence can encrypt to that key.
    """
    NONE = "none"
    """There is none of its own."""


class DebugStatus(enum.Enum):
    """Whether an entity can be debugged (RFC 9711, section 4.2.9); the value is the claim's."""

    ENABLED = 0
    DISABLED = 1


class ExceptionKind(enum.Enum):
    """What pages are that are not under their VM's own KeyID."""

    SHARED = "shared"
    """Under KeyID 0, whose key is the whole platform's."""
    FURTHER = "further-keyid"
    """Under another KeyID, with a key."""
    UNENCRYPTED = "unencrypted"
    """Plaintext in DRAM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageException:
    """Pages of a VM's that are not under its own KeyID, or not encrypted.

    Attributes:
        kind: what they are.
        ram_offset: of the first byte, a multiple of 4096; its NVDIMM is behind its RAM.
        size_bytes: how much, a multiple of 4096.
        keyid: what they are under.
    """

    kind: ExceptionKind
    ram_offset: Annotated[_Uint64, msgspec.Meta(multiple_of=PAGE_BYTES)]
    size_bytes: Annotated[int, msgspec.Meta(gt=0, multiple_of=PAGE_BYTES)]
    keyid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 15)]


@dataclass(frozen=True, slots=True)
class Component:
    """One thing that a VM was launched from, and its SHA-256."""

    name: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9.-]{0,62}\Z")]
    digest: Digest


@dataclass(frozen=True, slots=True)
class Launch:
    """What a VM was launched from, measured before its first instruction.

    Attributes:
        components: in the order of their names, none twice.
    """

    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        names = [one.name for one in self.components]
        if names != sorted(set(names)):
            raise ValueError("components are not in the order of their names")
        if not 0 < len(names) <= COMPONENTS_MAX:
            raise ValueError(f"1 to {COMPONENTS_MAX} components make a launch")

    @property
    def digest(self) -> bytes:
        """SHA-256 over all of it: of the CBOR map of names and digests."""
        return hashlib.sha256(cbor.encode(self.by_name())).digest()

    def by_name(self) -> dict[str, bytes]:
        """The components' digests."""
        return {one.name: one.digest for one in self.components}


@dataclass(frozen=True, slots=True)
class RecipientKey:
    """A VM's recipient key: a P-256 public key whose private half the engine alone has.

    Attributes:
        x: coordinate, 32 bytes, big-endian.
        y: coordinate, 32 bytes, big-endian.
    """

    x: Digest
    y: Digest

    def __post_init__(self) -> None:
        if len(self.x) != 32 or len(self.y) != 32:
            raise ValueError("a coordinate of P-256 has 32 bytes")
        self.public_key()

    @classmethod
    def of(cls, key: ec.EllipticCurvePublicKey) -> RecipientKey:
        """A key of pyca's as evidence has it."""
        point = key.public_numbers()
        return cls(point.x.to_bytes(32, "big"), point.y.to_bytes(32, "big"))

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """As pyca has it.

        Raises:
            ValueError: it is no point of the curve.
        """
        point = ec.EllipticCurvePublicNumbers(
            int.from_bytes(self.x, "big"), int.from_bytes(self.y, "big"), ec.SECP256R1()
        )
        return point.public_key()


@dataclass(frozen=True, slots=True, kw_only=True)
class VmClaims:
    """One VM, as the engine has it at this moment.

    Attributes:
        uuid: its name as a submodule.
        name: for people.
        running: whether its vCPUs may have executed an instruction already.
        launch: what it was launched from.
        keyid: its own KeyID.
        algorithm: what its KeyID encrypts with; None if it does not.
        mode: how its KeyID was programmed.
        source: where the key comes from.
        datapath: how its memory gets into DRAM.
        trackers: what tells of its writes: "pages", "stores"; `inline` needs none.
        integrity: whether each line has a MAC.
        exceptions: pages that are not under its own KeyID or not encrypted, by address.
        report_data: 64 bytes of whoever asked.
        recipient_key: what a secret for this VM's memory engine is to be encrypted to.
        vtpm: SHA-256 of its vTPM's endorsement key (DER, SubjectPublicKeyInfo); None without one.
        debug: whether its QEMU has a debugger's stub.
        fault: why its memory is not followed any more; None if all is well.
    """

    uuid: UUID
    name: _Line
    running: bool
    launch: Launch
    keyid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 15)]
    algorithm: Algorithm | None
    mode: KeyMode
    source: KeySource
    datapath: Literal["shadow", "inline"]
    trackers: tuple[Literal["pages", "stores"], ...]
    integrity: bool
    exceptions: tuple[PageException, ...]
    report_data: Annotated[
        bytes, msgspec.Meta(min_length=REPORT_DATA_BYTES, max_length=REPORT_DATA_BYTES)
    ]
    recipient_key: RecipientKey
    vtpm: Digest | None
    debug: DebugStatus
    fault: _Line | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TmeClaims:
    """The package's registers, raw (Intel 336907, tables 4-1 to 4-6).

    Attributes:
        capability: IA32_TME_CAPABILITY, 981H.
        activate: IA32_TME_ACTIVATE, 982H.
        exclude_mask: IA32_TME_EXCLUDE_MASK, 983H.
        exclude_base: IA32_TME_EXCLUDE_BASE, 984H.
    """

    capability: _Uint64
    activate: _Uint64
    exclude_mask: _Uint64
    exclude_base: _Uint64

    @property
    def locked(self) -> bool:
        """Whether 981H to 984H cannot be changed before a reset, and encryption is on."""
        fields_ = TmeActivate.decode(self.activate)
        return fields_.lock and fields_.enable

    @property
    def excludes(self) -> bool:
        """Whether there is a range that KeyID 0 does not encrypt."""
        return bool(self.exclude_mask & _EXCLUDE_ENABLE)

    @property
    def bypasses(self) -> bool:
        """Whether KeyID 0 encrypts nothing at all."""
        return TmeActivate.decode(self.activate).bypass


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a platform says of itself and of VMs on it.

    Attributes:
        nonce: whoever asked chose it.
        issued_at: seconds since 1970, by the platform's clock.
        ueid: the platform's identity: 01H and 32 random bytes (RFC 9711, section 4.2.1).
        version: of the engine.
        code: SHA-256 over the engine's code (`mktme.attest.measure.code_digest`).
        debug: whether others may read the engine's memory.
        tme: the registers.
        vms: the VMs asked about, in the order of their UUIDs.
    """

    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_MIN_BYTES, max_length=NONCE_MAX_BYTES)]
    issued_at: _Time
    ueid: Annotated[bytes, msgspec.Meta(min_length=UEID_BYTES, max_length=UEID_BYTES)]
    version: _Line
    code: Digest
    debug: DebugStatus
    tme: TmeClaims
    vms: tuple[VmClaims, ...]

    @property
    def time(self) -> dt.datetime:
        """When it was signed."""
        return dt.datetime.fromtimestamp(self.issued_at, dt.UTC)

    def vm(self, uuid: UUID) -> VmClaims | None:
        """What it says of a VM; None if nothing."""
        return next((one for one in self.vms if one.uuid == uuid), None)


# --- CBOR -------------------------------------------------------------------------------------

SOFTWARE: Final = "mktme-engine"
"""Claim swname (RFC 9711, section 4.2.6)."""

_CNF: Final = 8
_COSE_KEY: Final = 1
_SUBMODS: Final = 266
_PLATFORM: Final = {
    "issued_at": 6,
    "nonce": 10,
    "ueid": 256,
    "debug": 263,
    "profile": 265,
    "vms": _SUBMODS,
    "software": 270,
    "version": 271,
    "code": -70000,
    "tme": -70001,
}
_TME: Final = {"capability": 0x981, "activate": 0x982, "exclude_mask": 0x983, "exclude_base": 0x984}
_VM: Final = {
    "recipient_key": _CNF,
    "debug": 263,
    "name": -70010,
    "running": -70011,
    "launch": -70012,
    "keyid": -70013,
    "algorithm": -70014,
    "mode": -70015,
    "source": -70016,
    "datapath": -70017,
    "trackers": -70018,
    "integrity": -70019,
    "exceptions": -70020,
    "report_data": -70021,
    "vtpm": -70022,
    "fault": -70023,
}
_EC2_P256: Final = {1: 2, -1: 1}  # kty EC2, crv P-256 (RFC 9053, section 7.1)


def encode_claims(evidence: Evidence) -> bytes:
    """The claims set as it is signed."""
    return cbor.encode(
        _labelled(
            _PLATFORM,
            issued_at=evidence.issued_at,
            nonce=evidence.nonce,
            ueid=evidence.ueid,
            debug=evidence.debug.value,
            profile=PROFILE,
            vms={str(one.uuid): _encode_vm(one) for one in evidence.vms},
            software=SOFTWARE,
            version=[evidence.version],
            code=evidence.code,
            tme=_labelled(_TME, **_shallow(evidence.tme)),
        )
    )


def decode_claims(data: bytes) -> Evidence:
    """The inverse of `encode_claims`.

    Raises:
        TokenError: it is no claims set of this profile.
    """
    claims = _named(cbor.decode(data), _PLATFORM, "claims")
    for name, wanted in (("profile", PROFILE), ("software", SOFTWARE)):
        if claims.pop(name) != wanted:
            raise TokenError(f"another {name} than this verifier's")
    version = claims["version"]
    if not isinstance(version, list) or len(version) != 1:
        raise TokenError("version is not an array of one")
    claims["version"] = version[0]
    claims["tme"] = _named(claims["tme"], _TME, "tme")
    submods = claims["vms"]
    if not isinstance(submods, dict):
        raise TokenError("submods is not a map")
    claims["vms"] = [_decode_vm(name, submods[name]) for name in sorted(submods, key=str)]
    return _convert(claims, Evidence)


def _encode_vm(vm: VmClaims) -> dict[int, object]:
    key = {**_EC2_P256, -2: vm.recipient_key.x, -3: vm.recipient_key.y}
    values = _shallow(vm)
    del values["uuid"]
    values.update(
        launch=vm.launch.by_name(),
        algorithm=None if vm.algorithm is None else vm.algorithm.value,
        mode=vm.mode.value,
        source=vm.source.value,
        exceptions=[
            [one.kind.value, one.ram_offset, one.size_bytes, one.keyid] for one in vm.exceptions
        ],
        recipient_key={_COSE_KEY: key},
        debug=vm.debug.value,
    )
    return _labelled(_VM, **values)


def _decode_vm(name: object, value: object) -> dict[str, object]:
    claims = _named(value, _VM, "submodule")
    try:
        uuid = UUID(str(name))
    except ValueError:
        uuid = None
    if name != str(uuid):
        raise TokenError("a submodule's name is not a UUID")
    claims["uuid"] = uuid
    launch = claims["launch"]
    if not isinstance(launch, dict):
        raise TokenError("launch is not a map")
    # In order as text; as CBOR the shorter name comes first.
    claims["launch"] = {
        "components": [{"name": name, "digest": launch[name]} for name in sorted(launch, key=str)]
    }
    exceptions = claims["exceptions"]
    if not isinstance(exceptions, list) or len(exceptions) > EXCEPTIONS_MAX:
        raise TokenError(f"exceptions is not an array of {EXCEPTIONS_MAX} at most")
    names = [one.name for one in fields(PageException)]
    claims["exceptions"] = [
        dict(zip(names, one, strict=True))
        for one in exceptions
        if _is_array(one, len(names), "an exception")
    ]
    match claims["recipient_key"]:
        case {1: {1: 2, -1: 1, -2: x, -3: y, **more}, **others} if not more and not others:
            claims["recipient_key"] = {"x": x, "y": y}
        case _:
            raise TokenError("cnf is not a COSE_Key of P-256")
    return claims


def _labelled(labels: dict[str, int], **values: object) -> dict[int, object]:
    """Claims by their labels: all of them, and no others."""
    assert values.keys() == labels.keys()
    return {labels[name]: value for name, value in values.items()}


def _named(value: object, labels: dict[str, int], what: str) -> dict[str, Any]:
    """The inverse of `_labelled`."""
    if not isinstance(value, dict):
        raise TokenError(f"{what} is not a map")
    # By type as well: True is a key that equals 1.
    names = {label: name for name, label in labels.items()}
    for label in value:
        if type(label) is not int or label not in names:
            raise TokenError(f"{what} has a label that is not of this profile")
    for label, name in names.items():
        if label not in value:
            raise TokenError(f"{what} has no {name.replace('_', ' ')}")
    return {names[label]: one for label, one in value.items()}


def _shallow(value: Any) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in fields(value)}


def _is_array(value: object, length: int, what: str) -> bool:
    if not isinstance(value, list) or len(value) != length:
        raise TokenError(f"{what} is not an array of {length}")
    return True


def _convert(value: object, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(value, kind, builtin_types=(bytes, UUID))
    except (msgspec.MsgspecError, ValueError) as error:
        # Its path tells where; what stood there is the sender's.
        where = str(error).rpartition(" - at `")[2].rstrip("`")
        raise TokenError(f"a claim has another type or range: {where}") from error


# msgspec (0.22) learns a dataclass at its first use. Where two threads come to that at the same
# time, one takes what the other has not finished, and the process ends with SIGSEGV. So it is here.
with contextlib.suppress(TokenError):
    _convert({}, Evidence)
