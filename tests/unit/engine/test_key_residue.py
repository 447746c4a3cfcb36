# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys in use are in the memory for secrets, and nowhere else in their process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Final

import pytest

from mktme.engine.secret import KeyMemory
from mktme.engine.xts import Algorithm
from mktme.proof.custody import KeySearchError, search_memory
from mktme.proof.key_patterns import KeyPatterns

# Uses keys that it gets at its standard input, then does what it is told, a letter each time. At
# its standard output is one byte for each thing done.
USER_OF_KEYS: Final = """
import hashlib
import os
import sys
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from mktme.engine import secret
from mktme.engine.errors import KeyMaterialError
from mktme.engine.integrity import LineMacs
from mktme.engine.xts import Algorithm, XtsCipher, wipe

if sys.argv[1] == "mlock":
    secret._MEMFD_SECRET = 1 << 20  # fails, as on an older kernel
ciphers, macs = [], []
for algorithm in Algorithm:
    key = bytearray(algorithm.key_bytes)
    assert os.readv(0, [key]) == len(key)
    ciphers.append(XtsCipher(algorithm, key))
    XtsCipher(algorithm, memoryview(key)).wipe()
    if algorithm.has_integrity:
        macs.append(LineMacs(key))
        LineMacs(memoryview(key)).wipe()
    half = len(key) // 2
    for bad in (memoryview(key)[:-1], memoryview(key)[half:]):
        try:
            XtsCipher(algorithm, bad)
        except KeyMaterialError:
            pass
    wipe(key)
print(secret.key_memory().value.ljust(20), end="", flush=True)
data_key, tweak_key = ciphers[0]._key.view[:16], ciphers[1]._key.view[-32:]
mac_key = ciphers[2]._key.view[:16]
planted = []
while command := os.read(0, 1):
    if command == b"c":
        for cipher in ciphers:
            for count in (1, 64, 4096, 9000):
                lines = np.zeros((count, 8), np.uint64)
                addresses = np.arange(count, dtype=np.uint64) * np.uint64(64)
                cipher.encrypt_lines(lines, addresses, lines)
                cipher.decrypt_lines(lines, addresses)
                macs[0].entries(lines, addresses)
    if command == b"k":
        planted.append(bytearray(data_key))
    if command == b"s":
        planted.append(Cipher(algorithms.AES(tweak_key), modes.ECB()).encryptor())
    if command == b"h":
        planted.append(hashlib.sha3_256())
        planted[-1].update(mac_key)
    if command == b"w":
        data_key.release()
        tweak_key.release()
        mac_key.release()
        for user in (*ciphers, *macs):
            user.wipe()
    os.write(1, b"!")
"""


class UserOfKeys:
    """A process that uses known keys, and lets itself be searched for them."""

    def __init__(self, memory: KeyMemory) -> None:
        keys = {algorithm.value: os.urandom(algorithm.key_bytes) for algorithm in Algorithm}
        self._patterns = KeyPatterns(keys)
        self._process = subprocess.Popen(
            [sys.executable, "-c", USER_OF_KEYS, memory.value],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        for key in keys.values():
            self._write(key)
        self.memory = KeyMemory(self._read(20).decode().strip())

    def do(self, command: str) -> None:
        """Have it do something, which is done when this returns."""
        self._write(command.encode())
        assert self._read(1) == b"!"

    def found(self) -> Counter[str]:
        """How often each part of a key is in its memory."""
        try:
            search = search_memory(self._process.pid, self._patterns)
        except KeySearchError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
        assert search.bytes_searched > 1 << 20
        return Counter(hit.pattern for hit in search.hits)

    def end(self) -> None:
        """End it: it has no more to do."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
        assert process.returncode == 0

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = bytearray()
        while len(data) < size:
            more = self._process.stdout.read(size - len(data))
            assert more, "the process ended"
            data += more
        return bytes(data)


@pytest.fixture
def user() -> Iterator[UserOfKeys]:
    user = UserOfKeys(KeyMemory.SECRET)
    if user.memory is not KeyMemory.SECRET:
        user.end()
        pytest.skip("no memfd_secret(2): the kernel, its command line or RLIMIT_MEMLOCK refuses")
    yield user
    user.end()


def test_keys_in_use_are_found_nowhere(user: UserOfKeys) -> None:
    assert not user.found()
    user.do("c")
    assert not user.found()
    user.do("w")
    assert not user.found()


def test_copy_of_a_key_is_found(user: UserOfKeys) -> None:
    """The control for the test above."""
    user.do("k")
    assert user.found() == {
        "aes-xts-128: data key, bytes 0-7": 1,
        "aes-xts-128: data key, bytes 8-15": 1,
    }


def test_expanded_key_is_found(user: UserOfKeys) -> None:
    """The other control: an AES context that is kept holds the key and all its round keys."""
    user.do("s")
    found = user.found()
    assert {name.split(",")[0] for name in found} == {"aes-xts-256: tweak key"}
    for number in range(2, 15):  # the first two are the key itself
        assert any(f", round key {number}, " in name for name in found)


def test_key_that_a_hash_did_not_mix_yet_is_found(user: UserOfKeys) -> None:
    """One more: what is no whole block stays in the hash as it is."""
    user.do("h")
    assert user.found() == {
        "aes-xts-128-integrity: data key, bytes 0-7": 1,
        "aes-xts-128-integrity: data key, bytes 8-15": 1,
    }


def test_without_secret_memory_each_key_is_found_once() -> None:
    """In locked memory, where it can be seen: the keys in use and no copy; wiped, nothing."""
    user = UserOfKeys(KeyMemory.LOCKED)
    user.do("c")
    in_use = {
        f"{algorithm.value}: {part} key, bytes {at}-{at + 7}": 1
        for algorithm in Algorithm
        for part in ("data", "tweak")
        for at in range(0, algorithm.key_bytes // 2, 8)
    }
    assert user.found() == in_use
    user.do("w")
    assert not user.found()
    user.end()
