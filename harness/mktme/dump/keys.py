# SPDX-License-Identifier: GPL-2.0-or-later
"""What turns an image's lines into plaintext: keys from files, or the engine that has them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mktme.dump.image import DumpError, DumpImage
from mktme.engine.errors import KeyMaterialError
from mktme.engine.keys import read_key_file
from mktme.engine.line_key import LineKey, words_of
from mktme.engine.sidecar import VmRecord
from mktme.engine.xts import LINE_BYTES, wipe
from mktme.service import wire
from mktme.service.client import EngineClient

_KEYID_AND_FILE: Final = re.compile(r"(\d{1,5})=(.+)", re.DOTALL)


class WrongKeyError(DumpError):
    """A key is not the one that an image was written with."""


class Keys(Protocol):
    """The keys of some KeyIDs."""

    def __contains__(self, keyid: int) -> bool: ...

    def decrypt(
        self, keyid: int, address: int, data: NDArray[np.uint8], entries: NDArray[np.uint32] | None
    ) -> NDArray[np.bool_] | None:
        """Decrypt lines of one KeyID in place; those never written stay zeros.

        Args:
            keyid: one that is there.
            address: of the first line in the image.
            data: uint8, shape (64 * n,), C-contiguous.
            entries: uint32, shape (n,): what the MAC area has for them; None: do not look.

        Returns:
            bool, shape (n,): which lines do not match their MACs; None if nobody looked.

        Raises:
            WrongKeyError: the key is for no MACs.
        """
        ...


class FileKeys:
    """Keys that are known. A context manager, which wipes them at its end.

    Args:
        keys: by KeyID.
    """

    def __init__(self, keys: Mapping[int, LineKey]) -> None:
        self._keys = dict(keys)

    @classmethod
    def read(cls, image: DumpImage, vm: VmRecord, files: Sequence[str]) -> FileKeys:
        """Read key files.

        Args:
            image: says what each KeyID's algorithm is.
            vm: whose KeyID a file is for that names none.
            files: ``FILE`` or ``KEYID=FILE``; as `mktme.engine.keys.read_key_file` takes them.

        Raises:
            KeyMaterialError: a file holds no such key, or two are for the same KeyID, or one for a
                KeyID that is not encrypted.
        """
        with ExitStack() as undo:
            keys: dict[int, LineKey] = {}
            for one in files:
                named = _KEYID_AND_FILE.fullmatch(one)
                keyid, file = (vm.keyid, one) if named is None else (int(named[1]), named[2])
                described = image.key(keyid)
                if keyid in keys:
                    raise KeyMaterialError(
                        f"{file}: another key for KeyID {keyid}",
                        hint="say which KeyID it is for: --key-file KEYID=FILE",
                    )
                if described is None or described.algorithm is None:
                    raise KeyMaterialError(
                        f"{file}: KeyID {keyid} of {image.path} is not encrypted"
                    )
                material = read_key_file(Path(file), described.algorithm)
                try:
                    keys[keyid] = LineKey.make(described.algorithm, material)
                finally:
                    wipe(material)
                undo.callback(keys[keyid].wipe)
            undo.pop_all()
        return cls(keys)

    def __contains__(self, keyid: int) -> bool:
        return keyid in self._keys

    def decrypt(
        self, keyid: int, address: int, data: NDArray[np.uint8], entries: NDArray[np.uint32] | None
    ) -> NDArray[np.bool_] | None:
        """See `Keys`."""
        lines = words_of(data)
        addresses = np.arange(address, address + len(data), LINE_BYTES, dtype=np.uint64)
        return self._keys[keyid].decrypt(lines, addresses, entries)

    def __enter__(self) -> FileKeys:
        return self

    def __exit__(self, *_error: object) -> None:
        for key in self._keys.values():
            key.wipe()


class EngineKeys:
    """The keys of a platform that runs, which stay in its engine.

    Args:
        client: an owner's connection.
        vm: whose memory is to be read; it must run there.

    Raises:
        DumpError: it does not, so the platform's keys are others.
    """

    def __init__(self, client: EngineClient, vm: VmRecord) -> None:
        self._client = client
        there = {one.vm: one for one in client.status().vms}.get(vm.uuid)
        if there is None or (there.keyid, there.base) != (vm.keyid, vm.base):
            raise DumpError(
                f"VM {vm.name} of this image is not on the platform that runs",
                hint="--engine SOCKET names another platform, --key-file FILE a key",
            )

    def __contains__(self, keyid: int) -> bool:
        return True

    def decrypt(
        self, keyid: int, address: int, data: NDArray[np.uint8], entries: NDArray[np.uint32] | None
    ) -> NDArray[np.bool_] | None:
        """See `Keys`."""
        bad = None if entries is None else np.zeros(len(entries), np.bool_)
        step = wire.DECRYPT_MAX_BYTES
        for start in range(0, len(data), step):
            part = data[start : start + step]
            lines = slice(start // LINE_BYTES, (start + step) // LINE_BYTES)
            answer = self._client.decrypt(
                keyid,
                address + start,
                part.tobytes(),
                None if entries is None else entries[lines].tobytes(),
            )
            part[:] = np.frombuffer(answer.data, np.uint8)
            if bad is not None:
                if not answer.bad:  # it was programmed anew meanwhile
                    raise WrongKeyError(
                        f"KeyID {keyid} has no MACs on the platform that runs, and this image has",
                        hint="--key-file FILE gives the key that it was written with",
                    )
                bad[lines] = np.frombuffer(answer.bad, np.bool_)
        return bad
