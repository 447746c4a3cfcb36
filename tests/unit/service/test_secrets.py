# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys stay in the engine; and a key that is known reads the DRAM image with no engine at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mktme.datapath.shadow import Track
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess, EngineRefusedError
from mktme.service.server import CONTROL_SOCKET

from ...vectors import reference
from ..conftest import Guests, wait_event
from ..fake_qemu import LINE, PAGE, FakeQemu, say_hello

KEYS = {
    Algorithm.AES_XTS_128: random.Random(1).randbytes(32),
    Algorithm.AES_XTS_256: random.Random(2).randbytes(64),
    Algorithm.AES_XTS_128_INTEGRITY: random.Random(3).randbytes(32),
}
KEY = KEYS[Algorithm.AES_XTS_128]


def shows(data: bytes, secret: bytes) -> bool:
    """Whether any 8 bytes in a row of a secret are in some data, raw or in hexadecimal."""
    parts = [secret[at : at + 8] for at in range(len(secret) - 7)]
    lowered = data.lower()
    return any(part in data or part.hex().encode() in lowered for part in parts)


def test_a_leak_would_be_noticed() -> None:
    """The control for the tests below."""
    for leak in (KEY, KEY[9:17], KEY.hex().encode()[18:40], KEY.hex().upper().encode()):
        assert shows(b"key is " + leak + b"!", KEY)
    assert not shows(KEY[:7] + b"!" + KEY[7:14], KEY)


@pytest.fixture(scope="module")
def engine(shared_engine: EngineProcess) -> EngineProcess:
    return shared_engine


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return private(tmp_path / "key", KEY)


def private(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@contextmanager
def recorded(control_socket: Path) -> Iterator[tuple[EngineClient, bytearray]]:
    """A client whose every byte, to and from the engine, is kept."""
    record = bytearray()
    ours, relayed = socket.socketpair()
    engine = socket.socket(socket.AF_UNIX)
    engine.connect(str(control_socket))

    def relay(source: socket.socket, sink: socket.socket) -> None:
        with suppress(ConnectionError):
            while data := source.recv(1 << 16):
                record.extend(data)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    relays = [
        threading.Thread(target=relay, args=pair) for pair in ((relayed, engine), (engine, relayed))
    ]
    with relayed, engine:
        for one in relays:
            one.start()
        with EngineClient(ours) as client:
            yield client, record
        for one in relays:
            one.join()


def test_no_key_leaves_the_engine(
    engine: EngineProcess, guests: Guests, key_file: Path, tmp_path: Path
) -> None:
    bad = [
        private(tmp_path / "short", KEY[:-1]),
        private(tmp_path / "long", KEY + b"x"),
        private(tmp_path / "hex", KEY.hex().encode()[:-2]),
        private(tmp_path / "halves", KEY[:16] * 2),
        private(tmp_path / "others", KEY, 0o644),
    ]
    with recorded(engine.log_path.parent / CONTROL_SOCKET) as (client, record):
        qemu, _ = guests.link(mode=KeyMode.DIRECT, key_file=key_file)
        qemu.store(0, os.urandom(3 * PAGE))
        for file in [key_file, *bad]:
            with suppress(EngineRefusedError):
                client.add_vm(
                    (vm := uuid.uuid4()),
                    name="vm",
                    memory_bytes=PAGE,
                    track=Track.PAGES,
                    algorithm=Algorithm.AES_XTS_128,
                    mode=KeyMode.DIRECT,
                    key_file=file,
                )
                client.remove_vm(vm)
        client.flush(qemu.vm)
        assert client.read(qemu.vm, 0, PAGE) == qemu.contents()[:PAGE]
        client.line_marks(qemu.vm, 0, 1)
        client.status()
        say_hello(guests.link_socket, KEY, []).close()  # refused, which is logged
        wait_event(client, lambda event: isinstance(event, wire.LinkRefused))
        sidecar = client.write_sidecar()
    assert record.count(b"KeyMaterialError") == len(bad)
    assert record.count(b"VmAdded") == 1
    process = Path(f"/proc/{engine.process.pid}")
    with open(client.welcome.dram_path, "rb") as dram:
        image = dram.read(4 * PAGE)
    for told in (
        bytes(record),
        engine.log_path.read_bytes(),
        sidecar.read_bytes(),
        image,
        (process / "cmdline").read_bytes(),
        (process / "environ").read_bytes(),
    ):
        assert told
        assert not shows(told, KEY)


BAD_KEYS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path / "none", "none: No such file or directory"),
    "a directory": (lambda path: path, "not a regular file"),
    "readable by others": (lambda path: private(path / "k", KEY, 0o640), "others have access"),
    "empty": (lambda path: private(path / "k", b""), "no aes-xts-128 key"),
    "a byte short": (lambda path: private(path / "k", KEY[:31]), "no aes-xts-128 key"),
    "of AES-256": (lambda path: private(path / "k", KEY * 2), "no aes-xts-128 key"),
    "bad hexadecimal": (
        lambda path: private(path / "k", KEY.hex().encode()[:-1] + b"g"),
        "no aes-xts-128 key",
    ),
    "equal halves": (lambda path: private(path / "k", KEY[:16] * 2), "tweak key are equal"),
    "huge": (lambda path: private(path / "k", KEY * 1000), "no aes-xts-128 key"),
}


@pytest.mark.parametrize(("make", "message"), BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_key_that_cannot_be_used_is_refused_by_name(
    guests: Guests,
    qemu: FakeQemu,
    tmp_path: Path,
    engine: EngineProcess,
    make: Callable[[Path], Path],
    message: str,
) -> None:
    with pytest.raises(EngineRefusedError, match=message) as caught:
        guests.announce(qemu, mode=KeyMode.DIRECT, key_file=make(tmp_path))
    assert caught.value.error == "KeyMaterialError"
    assert not shows(f"{caught.value!r} {caught.value.hint}".encode(), KEY)
    assert not shows(engine.log_path.read_bytes(), KEY)
    # Nothing was taken for it.
    assert guests.client.status().vms == ()
    assert [key.keyid for key in guests.client.status().keys] == [0]


def test_link_to_a_key_is_not_followed(guests: Guests, qemu: FakeQemu, key_file: Path) -> None:
    link = key_file.with_name("link")
    link.symlink_to(key_file)
    with pytest.raises(EngineRefusedError) as caught:
        guests.announce(qemu, mode=KeyMode.DIRECT, key_file=link)
    assert caught.value.hint == "give the file itself"


def test_direct_mode_needs_a_key(guests: Guests, qemu: FakeQemu) -> None:
    with pytest.raises(EngineRefusedError, match="mode direct needs a key file"):
        guests.announce(qemu, mode=KeyMode.DIRECT)


def test_refusal_hides_nothing_the_user_needs(
    guests: Guests, qemu: FakeQemu, tmp_path: Path
) -> None:
    path = private(tmp_path / "key", KEY, 0o644)
    with pytest.raises(EngineRefusedError) as caught:
        guests.announce(qemu, mode=KeyMode.DIRECT, key_file=path)
    assert str(path) in str(caught.value)
    assert caught.value.hint == f"chmod 600 {path}"


# --- offline ----------------------------------------------------------------------------------


class Offline:
    """Reads a DRAM image with its sidecar and a key, as somebody who never saw this project.

    The cipher is tests/vectors/reference.py, which shares nothing with the engine's.
    """

    def __init__(self, image: Path, vm: uuid.UUID, key: bytes) -> None:
        sidecar = json.loads(image.with_name(image.name + ".json").read_text())
        self._image = image
        self._key = key
        self._unit = sidecar["data_unit_bytes"]
        (self.vm,) = (one for one in sidecar["vms"] if one["uuid"] == str(vm))
        (self.cipher,) = (one for one in sidecar["keys"] if one["keyid"] == self.vm["keyid"])
        owners = {
            one["keyid"]
            for one in sidecar["pages"]
            if one["base"] < self.vm["base"] + self.vm["size_bytes"]
            and self.vm["base"] < one["base"] + one["size_bytes"]
        }
        assert owners == {self.vm["keyid"]}
        self.integrity = sidecar["integrity"]

    def bad_lines(self, ram_offset: int, size_bytes: int) -> list[int]:
        """The addresses of lines that do not match their MACs, as `integrity.rule` says."""
        start = self.vm["base"] + ram_offset
        with self._image.open("rb") as image:
            stored = os.pread(image.fileno(), size_bytes, start)
        size = self.integrity["entry_bytes"]
        macs = self._image.with_name(self.integrity["file"]).read_bytes()
        block = b"mktme line MAC".ljust(136 - len(self._key), b"\0") + self._key
        bad = []
        for at in range(start, start + size_bytes, self._unit):
            line = stored[at - start :][: self._unit]
            entry = int.from_bytes(macs[at // self._unit * size :][:size], "little")
            hashed = hashlib.sha3_256(block + block + at.to_bytes(8, "little") + line).digest()
            mac = int.from_bytes(hashed[:4], "little") % 2**28
            if entry != 2**31 + mac and (entry or any(line)):
                bad.append(at)
        return bad

    def read(self, ram_offset: int, size_bytes: int) -> bytes:
        """Decrypt some of the VM's RAM."""
        with self._image.open("rb") as image:
            start = self.vm["base"] + ram_offset
            stored = os.pread(image.fileno(), size_bytes, start)
        lines = []
        for at in range(0, size_bytes, self._unit):
            line = stored[at : at + self._unit]
            tweak = (start + at).to_bytes(16, "little")
            lines.append(reference.decrypt(self._key, tweak, line) if any(line) else line)
        return b"".join(lines)

    def read_physical(self, guest_physical: int, size_bytes: int) -> bytes:
        """Decrypt a range of guest-physical addresses that one segment covers."""
        for segment in self.vm["segments"]:
            within = guest_physical - segment["guest_physical"]
            if 0 <= within < segment["size_bytes"]:
                return self.read(segment["ram_offset"] + within, size_bytes)
        raise AssertionError(f"no RAM at {guest_physical:#x}")


@pytest.mark.parametrize("algorithm", list(Algorithm))
@pytest.mark.parametrize("hexadecimal", [False, True])
def test_known_key_reads_dram_offline(
    guests: Guests, tmp_path: Path, algorithm: Algorithm, hexadecimal: bool
) -> None:
    key = KEYS[algorithm]
    key_file = private(tmp_path / "key", key.hex().encode() + b"\n" if hexadecimal else key)
    guests.link()  # so that the base is not 0
    qemu, added = guests.link(
        16,
        segments=((0, 0, 10 * PAGE), (1 << 32, 10 * PAGE, 6 * PAGE)),
        mode=KeyMode.DIRECT,
        algorithm=algorithm,
        key_file=key_file,
    )
    assert added.base > 0
    high = os.urandom(PAGE)
    qemu.store(PAGE + 100, os.urandom(3 * PAGE))
    qemu.dma(11 * PAGE, high)
    guests.client.flush(qemu.vm)
    guests.client.write_sidecar()

    offline = Offline(Path(guests.client.welcome.dram_path), qemu.vm, key)
    assert offline.cipher["algorithm"] == algorithm.value
    assert offline.cipher["mode"] == "direct"
    assert offline.read(0, 16 * PAGE) == qemu.contents()
    assert offline.read_physical((1 << 32) + PAGE, PAGE) == high
    # The control: another key makes nothing of it.
    other = Offline(Path(guests.client.welcome.dram_path), qemu.vm, key[::-1])
    assert not shows(other.read(11 * PAGE, PAGE), high)
    if not algorithm.has_integrity:
        assert offline.integrity is None
        return
    assert offline.bad_lines(0, 16 * PAGE) == []
    written = range(added.base + 11 * PAGE, added.base + 12 * PAGE, LINE)
    assert other.bad_lines(11 * PAGE, PAGE) == list(written)
    # And what somebody changed is bad for everybody.
    with open(guests.client.welcome.dram_path, "r+b") as dram:
        os.pwrite(dram.fileno(), b"tampered", added.base + 11 * PAGE + 3 * LINE)
    assert offline.bad_lines(0, 16 * PAGE) == [added.base + 11 * PAGE + 3 * LINE]
    with pytest.raises(EngineRefusedError, match="does not match its MAC") as caught:
        guests.client.read(qemu.vm, 11 * PAGE, PAGE)
    assert caught.value.error == "IntegrityError"
    assert guests.client.read(qemu.vm, 12 * PAGE, PAGE) == qemu.contents()[12 * PAGE : 13 * PAGE]


def test_random_key_is_another_each_time(guests: Guests) -> None:
    """The same memory at the same address under two random keys."""
    stored = []
    for _ in range(2):
        qemu, added = guests.link()
        qemu.store(0, b"\x55" * PAGE)
        guests.client.flush(qemu.vm)
        with open(guests.client.welcome.dram_path, "rb") as dram:
            stored.append(os.pread(dram.fileno(), PAGE, added.base))
        guests.client.remove_vm(qemu.vm)
        assert added == wire.VmAdded(keyid=1, base=0)
    lines = [one[at : at + LINE] for one in stored for at in range(0, PAGE, LINE)]
    assert len(set(lines)) == len(lines) == 128
