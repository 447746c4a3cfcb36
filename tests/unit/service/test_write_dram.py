# SPDX-License-Identifier: GPL-2.0-or-later
"""`WriteDram` through a real engine: whoever's the memory is, and whatever is asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess, EngineRefusedError
from mktme.service.server import CONTROL_SOCKET

from ...vectors import reference
from ..conftest import Guests
from ..fake_qemu import LINE, PAGE
from .raw_client import HELLO, RawClient

INTEGRITY = Algorithm.AES_XTS_128_INTEGRITY


@pytest.fixture
def client(engine: EngineProcess) -> EngineClient:
    return engine.client


def test_what_is_written_is_the_references_ciphertext(client: EngineClient, tmp_path: Path) -> None:
    key, data = os.urandom(64), os.urandom(3 * LINE)
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_bytes(key)
    keyid = client.program_key(KeyMode.DIRECT, Algorithm.AES_XTS_256, key_file=key_file)
    address = 5 * PAGE - LINE
    client.write_dram(address, data, keyid)
    with open(client.welcome.dram_path, "rb") as dram:
        stored = os.pread(dram.fileno(), len(data), address)
    for at in range(0, len(data), LINE):
        tweak = (address + at).to_bytes(16, "little")
        assert stored[at : at + LINE] == reference.encrypt(key, tweak, data[at : at + LINE])
    client.clear_key(keyid)


@pytest.mark.parametrize("algorithm", [Algorithm.AES_XTS_128, INTEGRITY])
def test_write_into_somebody_elses_memory(
    guests: Guests, client: EngineClient, algorithm: Algorithm
) -> None:
    qemu, added = guests.link(4)
    qemu.store(0, os.urandom(2 * PAGE))
    client.flush(qemu.vm)
    keyid = client.program_key(KeyMode.RANDOM, algorithm)
    before = client.read(qemu.vm, 0, 2 * PAGE)
    client.write_dram(added.base + LINE, b"x" * LINE, keyid)
    found = client.read(qemu.vm, 0, 2 * PAGE)
    assert found[:LINE] + found[2 * LINE :] == before[:LINE] + before[2 * LINE :]
    assert found[LINE : 2 * LINE] not in (before[LINE : 2 * LINE], b"x" * LINE)
    (status,) = (one for one in client.status().vms if one.vm == qemu.vm)
    assert {one.keyid for one in status.pages} == {added.keyid}
    client.clear_key(keyid)  # so it is not in use
    client.write_dram(added.base, before[:PAGE], added.keyid)
    assert client.read(qemu.vm, 0, 2 * PAGE) == before


def test_write_with_another_mac_is_refused_to_the_reader(client: EngineClient) -> None:
    one, other = (client.program_key(KeyMode.RANDOM, INTEGRITY) for _ in range(2))
    data = os.urandom(PAGE)
    client.write_dram(0, data, one)
    assert client.read_dram(0, PAGE, one) == data
    client.write_dram(LINE, data[:LINE], other)
    with pytest.raises(EngineRefusedError, match="does not match its MAC") as caught:
        client.read_dram(0, PAGE, one)
    assert caught.value.error == "IntegrityError"
    for keyid in (one, other):
        client.clear_key(keyid)


def test_what_is_too_long_for_one_request_goes_in_several(client: EngineClient) -> None:
    data = os.urandom(2 * wire.WRITE_MAX_BYTES + LINE)
    client.write_dram(LINE, data, 0)
    pages = -(-(len(data) + LINE) // PAGE)
    assert client.read_dram(0, pages * PAGE)[LINE : LINE + len(data)] == data


def test_longest_request_fits_a_frame_and_a_longer_one_is_refused(
    shared_engine: EngineProcess,
) -> None:
    longest = wire.WriteDram(address=2**63 - 1, data=bytes(wire.WRITE_MAX_BYTES), keyid=2**63 - 1)
    assert len(wire.frame(longest)) <= wire.REQUEST_MAX_BYTES
    longer = wire.WriteDram(address=0, data=bytes(wire.WRITE_MAX_BYTES + LINE), keyid=0)
    with RawClient(shared_engine.log_path.parent / CONTROL_SOCKET) as owner:
        owner.send(HELLO)
        assert isinstance(owner.reply(), wire.Welcome)
        owner.send(wire.frame(longer))
        reply = owner.reply()
        assert isinstance(reply, wire.Failure)
        assert reply.error == "ProtocolError"


@pytest.mark.parametrize(
    ("address", "size", "keyid", "error"),
    [
        (1, LINE, 0, "AddressError"),
        (0, LINE + 1, 0, "AddressError"),
        (0, LINE - 1, 0, "AddressError"),
        (-LINE, LINE, 0, "AddressError"),
        (1 << 62, LINE, 0, "AddressError"),
        (0, LINE, 64, "KeyIdError"),
        (0, LINE, -1, "KeyIdError"),
    ],
)
def test_write_that_makes_no_sense_is_refused(
    client: EngineClient, address: int, size: int, keyid: int, error: str
) -> None:
    before = client.read_dram(0, 4 * PAGE)
    with pytest.raises(EngineRefusedError) as caught:
        client.write_dram(address, bytes(size), keyid)
    assert caught.value.error == error
    assert client.read_dram(0, 4 * PAGE) == before
