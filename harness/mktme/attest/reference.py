# SPDX-License-Identifier: GPL-2.0-or-later
"""Reference values: the digests that evidence may have; `reference.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import msgspec

from mktme.attest.claims import Evidence, VmClaims
from mktme.attest.errors import ReferenceValuesError
from mktme.attest.tpm_quote import MeasuredBoot

_MAX_BYTES: Final = 1 << 20
_HINT: Final = "mktme reference EVIDENCE -o reference.json makes such a file"

_Hex = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Pcr = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]\Z")]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema: Literal["mktme.reference"]
    version: Literal[1]
    code: tuple[_Hex, ...]
    launch: dict[str, tuple[_Hex, ...] | Literal["any"]]
    pcrs: dict[_Pcr, tuple[_Hex, ...]] = {}


@dataclass(frozen=True, slots=True)
class Reference:
    """Known good digests, SHA-256.

    Attributes:
        code: of engines.
        launch: of each component that a VM is launched from, by its name; None where it may be
            anything, as the seed that tells a guest its own name.
        pcrs: of a vTPM that is quoted, by their numbers; others may have any value.
    """

    code: frozenset[bytes]
    launch: Mapping[str, frozenset[bytes] | None]
    pcrs: Mapping[int, frozenset[bytes]] = field(default_factory=dict)

    @classmethod
    def of(cls, evidence: Evidence, vm: VmClaims) -> Self:
        """Take a VM and its engine as they are for good."""
        launch = {one.name: frozenset((one.digest,)) for one in vm.launch.components}
        return cls(frozenset((evidence.code,)), launch)

    def with_boot(self, boot: MeasuredBoot) -> Self:
        """Take what a VM has booted for good, too, but for what is another in each VM.

        That is its firmware's settings: among them are its UUID and the order of its disks (PCRs 1
        and 5).
        """
        pcrs = {pcr: frozenset((value,)) for pcr, value in boot.pcrs.items() if pcr not in (1, 5)}
        return replace(self, pcrs=pcrs)

    def also(self, other: Reference) -> Reference:
        """What either of two has."""
        launch = dict(self.launch)
        for name, values in other.launch.items():
            mine = launch.get(name, frozenset())
            launch[name] = None if mine is None or values is None else mine | values
        pcrs = {
            pcr: self.pcrs.get(pcr, frozenset()) | other.pcrs.get(pcr, frozenset())
            for pcr in self.pcrs.keys() | other.pcrs.keys()
        }
        return Reference(self.code | other.code, launch, pcrs)

    def accepting_any(self, components: Iterable[str]) -> Reference:
        """The same, but that some components may be anything.

        Raises:
            ReferenceValuesError: there is no such component.
        """
        launch = dict(self.launch)
        for name in components:
            if name not in launch:
                raise ReferenceValuesError(
                    f"no component {name!r}", hint=f"there are: {', '.join(launch)}"
                )
            launch[name] = None
        return replace(self, launch=launch)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            ReferenceValuesError: it cannot be read, or has no such values.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ReferenceValuesError(f"{path}: {error.strerror}", hint=_HINT) from error
        if len(data) > _MAX_BYTES:
            raise ReferenceValuesError(f"{path} is longer than {_MAX_BYTES} bytes", hint=_HINT)
        return cls.decode(data)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """What a file's contents say.

        Raises:
            ReferenceValuesError: they are no reference values.
        """
        try:
            file = msgspec.json.decode(data, type=_File)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            text = str(error) if str(error).isprintable() else "not JSON"
            raise ReferenceValuesError(f"no reference values: {text}", hint=_HINT) from error
        return cls(
            frozenset(map(bytes.fromhex, file.code)),
            {
                name: None if values == "any" else frozenset(map(bytes.fromhex, values))
                for name, values in file.launch.items()
            },
            {int(pcr): frozenset(map(bytes.fromhex, one)) for pcr, one in file.pcrs.items()},
        )

    def encode(self) -> bytes:
        """As a file has it: JSON of UTF-8, a line for each digest."""
        file = _File(
            schema="mktme.reference",
            version=1,
            code=_hex(self.code),
            launch={
                name: "any" if values is None else _hex(values)
                for name, values in sorted(self.launch.items())
            },
            pcrs={str(pcr): _hex(self.pcrs[pcr]) for pcr in sorted(self.pcrs)},
        )
        return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def _hex(digests: frozenset[bytes]) -> tuple[str, ...]:
    return tuple(sorted(one.hex() for one in digests))
