# SPDX-License-Identifier: GPL-2.0-or-later
"""An NVDIMM: a range of DRAM that keeps its contents, as ciphertext, without its platform.

It is an image with MACs and a JSON description beside it, as DRAM's are. A line's tweak is its
physical address, so the description says at which one the image was, and it comes to lie there
again; what it says of the key is the algorithm, which is all that can be checked without keeping
something of the key itself. Under another key than it was written with it is noise, as in hardware
(docs/adr/0011).
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Literal, Self

import msgspec

from mktme.engine.dram import Dram, mac_path
from mktme.engine.errors import DramError
from mktme.engine.sidecar import (
    NEVER_WRITTEN_RULE,
    IntegrityRecord,
    read_description,
    sidecar_path,
    write_sidecar,
)
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES, Algorithm

_SCHEMA: Final = "mktme-nvdimm"
_VERSION: Final = 1
_TWEAK_RULE: Final = (
    "AES-XTS (IEEE 1619, NIST SP 800-38E), the key being the data key followed by the tweak key. "
    "Each 64 bytes of the image are a data unit; its tweak is 'base' plus its byte offset in the "
    "image as a 16-byte little-endian number. For MACs, too, that sum is its address."
)


class NvdimmRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that it takes, besides the key, to read an NVDIMM's image. Never a key.

    Attributes:
        base: the physical address of its first byte.
        size_bytes: its size.
        algorithm: what its lines are encrypted with; None: they are plaintext.
        clean: whether it holds all that its guest wrote; not while one uses it.
        integrity: the MACs of lines, None if the algorithm has none.
        tweak, never_written: rules, for a reader who has only this file.
    """

    schema: Literal["mktme-nvdimm"] = _SCHEMA
    version: Literal[1] = _VERSION
    base: int
    size_bytes: int
    algorithm: Algorithm | None
    clean: bool
    data_unit_bytes: Literal[64] = LINE_BYTES
    tweak: str = _TWEAK_RULE
    never_written: str = NEVER_WRITTEN_RULE
    integrity: IntegrityRecord | None = None

    def __post_init__(self) -> None:
        if self.base < 0 or self.base % PAGE_BYTES:
            raise ValueError(f"no page is at {self.base:#x}")


class Nvdimm:
    """An NVDIMM's open image; `Nvdimm.open` and `Nvdimm.create` make one.

    Attributes:
        cells: its contents; for `Dram.attach`.
    """

    def __init__(self, cells: Dram, record: NvdimmRecord) -> None:
        self.cells = cells
        self._record = record

    @classmethod
    def open(cls, path: Path, size_bytes: int) -> Self:
        """Open an image that exists; no other process can while it is open.

        Raises:
            DramError: it is in use, is not an NVDIMM's of this size, or does not hold all that
                its last guest wrote.
        """
        sidecar = sidecar_path(path)
        record = read_description(sidecar, NvdimmRecord, _SCHEMA, _VERSION)
        cells = Dram.open(path, read_only=False, has_macs=record.integrity is not None)
        with ExitStack() as stack:
            stack.callback(cells.close)
            # Again, now that nobody else can write it.
            record = read_description(sidecar, NvdimmRecord, _SCHEMA, _VERSION)
            if not record.size_bytes == size_bytes == cells.size_bytes:
                raise DramError(
                    f"{path}: an NVDIMM of {record.size_bytes} bytes in an image of"
                    f" {cells.size_bytes}, not one of {size_bytes}",
                    hint="ask for the size that it has, or for another file",
                )
            if not record.clean:
                raise DramError(
                    f"{path}: its last guest did not end cleanly: what that wrote last may lack",
                    hint=f'to use it as it is, set "clean" to true in {sidecar}',
                )
            stack.pop_all()
        return cls(cells, record)

    @classmethod
    def create(cls, path: Path, size_bytes: int, base: int, algorithm: Algorithm | None) -> Self:
        """Make one of never-written lines.

        Raises:
            DramError: there is such a file, or it cannot be made; then nothing is left of it.
        """
        has_macs = algorithm is not None and algorithm.has_integrity
        record = NvdimmRecord(
            base=base,
            size_bytes=size_bytes,
            algorithm=algorithm,
            clean=True,
            integrity=IntegrityRecord(file=mac_path(path).name) if has_macs else None,
        )
        cells = Dram.create(path, size_bytes)
        try:
            write_sidecar(sidecar_path(path), record)
        except BaseException:
            cells.close()
            for file in (path, mac_path(path)):
                with suppress(OSError):
                    os.unlink(file)
            raise
        return cls(cells, record)

    @property
    def path(self) -> Path:
        """The image."""
        return self.cells.path

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self._record.size_bytes

    @property
    def base(self) -> int:
        """The physical address of its first byte."""
        return self._record.base

    def check_algorithm(self, algorithm: Algorithm | None) -> None:
        """Raise a `DramError` unless the image is written with this algorithm."""
        if algorithm is not self._record.algorithm:
            raise DramError(
                f"{self.path}: it holds {_name(self._record.algorithm)},"
                f" and the KeyID is for {_name(algorithm)}",
                hint="give the guest the algorithm and key that the NVDIMM was written with",
            )

    def set_clean(self, clean: bool) -> None:
        """Note beside the image whether it holds all that its guest wrote.

        Raises:
            DramError: that cannot be written.
        """
        record = msgspec.structs.replace(self._record, clean=clean)
        write_sidecar(sidecar_path(self.path), record)

    def close(self) -> None:
        """Close the image; it stays on disk."""
        self.cells.close()


def _name(algorithm: Algorithm | None) -> str:
    return "plaintext" if algorithm is None else algorithm.value
