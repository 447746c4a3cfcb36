# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading the structures that TPMs and firmware marshal: integers, and what has its size before it.

TPM 2.0 structures are big-endian (TPM 2.0 Library, Part 1, 9.2), event logs little-endian.
"""

from __future__ import annotations

from typing import Final, Literal

from mktme.attest.errors import AttestationError

SHA256: Final = 0x000B
"""TPM_ALG_SHA256 (TCG Algorithm Registry): of names, PCRs, signatures, the only one there is."""
ALG_NULL: Final = 0x0010


class TpmFormatError(AttestationError):
    """What is no such structure, or one of a kind that is not supported."""


class Reader:
    """Reads a buffer from front to back; nothing in it is trusted.

    Args:
        data: the buffer.
        order: of the bytes of integers.
        what: what it is, for messages.
    """

    def __init__(self, data: bytes, order: Literal["big", "little"], what: str) -> None:
        self._data = memoryview(data)
        self._order = order
        self._what = what
        self.offset = 0

    @property
    def left(self) -> int:
        """How many bytes there are still."""
        return len(self._data) - self.offset

    def take(self, size_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            TpmFormatError: there are not as many.
        """
        if size_bytes > self.left:
            raise self.wrong(f"ends {size_bytes - self.left} bytes too early")
        start, self.offset = self.offset, self.offset + size_bytes
        return bytes(self._data[start : self.offset])

    def number(self, size_bytes: int) -> int:
        """The next unsigned integer, of 1 to 8 bytes."""
        return int.from_bytes(self.take(size_bytes), self._order)

    def sized(self, most: int) -> bytes:
        """The next TPM2B: a size in 2 bytes, and as many bytes.

        Raises:
            TpmFormatError: it is larger than `most`, or not all there.
        """
        size_bytes = self.number(2)
        if size_bytes > most:
            raise self.wrong(f"has {size_bytes} bytes where there are at most {most}")
        return self.take(size_bytes)

    def end(self) -> None:
        """Check that nothing follows."""
        if self.left:
            raise self.wrong(f"has {self.left} bytes too many")

    def wrong(self, problem: str) -> TpmFormatError:
        """The error for a problem where the reader is."""
        return TpmFormatError(f"{self._what} {problem} (byte {self.offset})")


def sized(data: bytes) -> bytes:
    """A TPM2B: the size of some bytes, big-endian in 2 bytes, and the bytes."""
    return len(data).to_bytes(2, "big") + data
