# SPDX-License-Identifier: GPL-2.0-or-later
"""KeyIDs and pages of a real engine: who gets which, who keeps them, and what DRAM holds then."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mktme.datapath.shadow import Track
from mktme.engine import tme
from mktme.engine.firmware import Exclusion, PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.package import PowerEvent
from mktme.engine.pconfig import Command, Status, encode
from mktme.engine.sidecar import read_sidecar
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineClient, EngineProcess, EngineRefusedError
from mktme.service.server import CONTROL_SOCKET

from ...vectors import reference
from ..conftest import Guests, MakeQemu, wait_event
from ..fake_qemu import LINE, PAGE, FakeQemu

XTS_128, XTS_256 = Algorithm.AES_XTS_128, Algorithm.AES_XTS_256


@pytest.fixture
def own_engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine for one test alone: of 2 KeyID bits, so three KeyIDs."""
    config = PlatformConfig(keyid_bits=2)
    with EngineProcess(
        tmp_path, tmp_path / "dram.img", 64 << 20, platform=config, shared_ownership=True
    ) as engine:
        yield engine


@pytest.fixture
def client(guests: Guests) -> EngineClient:
    return guests.client


def stored(client: EngineClient, address: int, size: int = PAGE) -> bytes:
    with open(client.welcome.dram_path, "rb") as dram:
        return os.pread(dram.fileno(), size, address)


def ranges(guests: Guests, qemu: FakeQemu) -> list[tuple[int, int, int]]:
    """(first page, pages, KeyID) of a VM's runs."""
    status = guests.status(qemu)
    return [
        ((one.base - status.base) // PAGE, one.size_bytes // PAGE, one.keyid)
        for one in status.pages
    ]


def blocks(data: bytes) -> set[bytes]:
    return {data[at : at + 16] for at in range(0, len(data), 16)}


def shows(data: bytes, plaintext: bytes) -> bool:
    """Whether any 16-byte block of some random plaintext is in some data."""
    return not blocks(data).isdisjoint(blocks(plaintext))


# --- pages ------------------------------------------------------------------------------------


def test_pages_change_hands_and_keep_their_contents(guests: Guests, client: EngineClient) -> None:
    qemu, added = guests.link(64)
    contents = os.urandom(64 * PAGE)
    qemu.store(0, contents)
    client.flush(qemu.vm)
    before = stored(client, added.base, 64 * PAGE)
    other = client.program_key(KeyMode.RANDOM, XTS_256, vm=qemu.vm)
    clear = client.program_key(KeyMode.NO_ENCRYPT, vm=qemu.vm)

    client.assign_pages(qemu.vm, 8 * PAGE, 8 * PAGE, 0)
    client.assign_pages(qemu.vm, 16 * PAGE, 4 * PAGE, clear)
    client.assign_pages(qemu.vm, 20 * PAGE, 4 * PAGE, other)
    assert ranges(guests, qemu) == [
        (0, 8, added.keyid),
        (8, 8, 0),
        (16, 4, clear),
        (20, 4, other),
        (24, 40, added.keyid),
    ]
    assert guests.read(qemu) == contents
    after = stored(client, added.base, 64 * PAGE)
    changed = [
        page for page in range(64) if before[page * PAGE :][:PAGE] != after[page * PAGE :][:PAGE]
    ]
    assert changed == list(range(8, 24))
    assert after[16 * PAGE : 20 * PAGE] == contents[16 * PAGE : 20 * PAGE]  # NO_ENCRYPT
    assert not shows(after[: 16 * PAGE] + after[20 * PAGE :], contents)
    # Each range under its own KeyID and no other: what the other makes of it is noise.
    for first, _, keyid in ranges(guests, qemu):
        for reader in {added.keyid, 0, other}:
            page = client.read(qemu.vm, first * PAGE, PAGE, reader)
            assert (page == contents[first * PAGE :][:PAGE]) == (reader == keyid)

    for first, count, _ in ranges(guests, qemu):
        client.assign_pages(qemu.vm, first * PAGE, count * PAGE)
    assert ranges(guests, qemu) == [(0, 64, added.keyid)]
    # XTS is deterministic, and the key is the same as before.
    assert stored(client, added.base, 64 * PAGE) == before


def test_what_was_written_before_the_change_is_under_the_new_keyid(
    guests: Guests, client: EngineClient
) -> None:
    """No flush by the caller: pending writes neither get lost nor stay under the old KeyID."""
    qemu, _ = guests.link(16)
    contents = os.urandom(16 * PAGE)
    qemu.store(0, contents)
    client.assign_pages(qemu.vm, 0, 16 * PAGE, 0)
    qemu.store(PAGE, b"later" * 100)
    client.flush(qemu.vm)
    assert guests.read(qemu, keyid=0) == qemu.contents() != contents


def test_lines_never_written_stay_so(guests: Guests, client: EngineClient) -> None:
    qemu, added = guests.link(16)
    qemu.store(3 * PAGE, b"x" * LINE)
    client.flush(qemu.vm)
    client.assign_pages(qemu.vm, 0, 16 * PAGE, 0)
    data = stored(client, added.base, 16 * PAGE)
    assert not any(data[: 3 * PAGE])
    assert not any(data[4 * PAGE :])
    assert any(data[3 * PAGE : 4 * PAGE])
    assert guests.read(qemu) == qemu.contents()


def test_zeros_that_were_plaintext_are_encrypted_again(
    guests: Guests, client: EngineClient
) -> None:
    """In plaintext a zero line looks like one that was never written; its page tells."""
    qemu, added = guests.link(8)
    qemu.store(0, bytes(2 * PAGE))
    qemu.store(PAGE, b"x")  # page 0 is all zeros, page 1 nearly
    client.flush(qemu.vm)
    before = stored(client, added.base, 8 * PAGE)
    assert all(any(before[at : at + LINE]) for at in range(0, 2 * PAGE, LINE))
    clear = client.program_key(KeyMode.NO_ENCRYPT, vm=qemu.vm)
    client.assign_pages(qemu.vm, 0, 8 * PAGE, clear)
    assert stored(client, added.base, 2 * PAGE) == bytes(PAGE) + b"x" + bytes(PAGE - 1)
    client.assign_pages(qemu.vm, 0, 8 * PAGE)
    after = stored(client, added.base, 8 * PAGE)
    assert after[PAGE:] == before[PAGE:]
    assert not any(after[:PAGE])  # what a page of zeros was is lost; it reads as zeros
    assert guests.read(qemu) == qemu.contents()


def test_pages_are_given_away_before_the_guest_is_there(
    guests: Guests, qemu: FakeQemu, client: EngineClient
) -> None:
    added = guests.announce(qemu)
    client.assign_pages(qemu.vm, 0, 4 * PAGE, 0)
    qemu.link(guests.link_socket)
    qemu.store(0, os.urandom(8 * PAGE))
    client.flush(qemu.vm)
    assert client.read(qemu.vm, 0, 4 * PAGE, 0) == qemu.contents()[: 4 * PAGE]
    assert client.read(qemu.vm, 4 * PAGE, PAGE, added.keyid) == qemu.contents()[4 * PAGE : 5 * PAGE]


def test_pages_change_hands_while_the_guest_writes_them(
    guests: Guests, client: EngineClient
) -> None:
    qemu, added = guests.link(512)
    qemu.store(0, os.urandom(512 * PAGE))
    other = client.program_key(KeyMode.RANDOM, vm=qemu.vm)
    stop = threading.Event()
    rounds = 0

    def write() -> None:
        nonlocal rounds
        while not stop.is_set():
            qemu.store((rounds * 37 % 512) * PAGE + rounds % 60 * LINE, os.urandom(3 * LINE))
            rounds += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for keyid in (other, 0, added.keyid) * 4:
            client.assign_pages(qemu.vm, 64 * PAGE, 384 * PAGE, keyid)
    finally:
        stop.set()
        writer.join()
    client.flush(qemu.vm)
    assert rounds > 100
    assert guests.read(qemu) == qemu.contents()
    assert ranges(guests, qemu) == [(0, 512, added.keyid)]


BAD_RANGES = {
    "not aligned": (100, PAGE),
    "not whole pages": (0, PAGE + 1),
    "empty": (0, 0),
    "negative": (-PAGE, PAGE),
    "negative size": (0, -PAGE),
    "past the end": (63 * PAGE, 2 * PAGE),
    "beyond": (1 << 60, PAGE),
}


@pytest.mark.parametrize(("offset", "size"), BAD_RANGES.values(), ids=BAD_RANGES)
def test_bad_range_is_refused(guests: Guests, client: EngineClient, offset: int, size: int) -> None:
    qemu, added = guests.link(64)
    with pytest.raises(EngineRefusedError) as caught:
        client.assign_pages(qemu.vm, offset, size, 0)
    assert caught.value.error == "AddressError"
    assert ranges(guests, qemu) == [(0, 64, added.keyid)]


def test_keyid_of_somebody_else_is_refused(guests: Guests, client: EngineClient) -> None:
    one, _ = guests.link(4)
    two, added = guests.link(4)
    theirs = client.program_key(KeyMode.RANDOM, vm=two.vm)
    for keyid in (added.keyid, theirs):
        with pytest.raises(EngineRefusedError, match=r"is vm-....'s") as caught:
            client.assign_pages(one.vm, 0, PAGE, keyid)
        assert caught.value.error == "KeyIdError"
    with pytest.raises(EngineRefusedError, match="no key of its own"):
        client.assign_pages(one.vm, 0, PAGE, 60)
    with pytest.raises(EngineRefusedError, match="no key of its own"):
        client.assign_pages(one.vm, 0, PAGE, 64)


def test_keyid_that_a_raw_pconfig_cleared_is_for_no_pages(
    guests: Guests, client: EngineClient
) -> None:
    """They would be under the TME key, and nobody would notice."""
    qemu, added = guests.link(4)
    further = client.program_key(KeyMode.RANDOM, vm=qemu.vm)
    assert client.pconfig(encode(further, Command.CLEAR_KEY, XTS_128)) is Status.PROG_SUCCESS
    with pytest.raises(EngineRefusedError, match="no key of its own") as caught:
        client.assign_pages(qemu.vm, 0, PAGE, further)
    assert caught.value.error == "KeyIdError"
    assert ranges(guests, qemu) == [(0, 4, added.keyid)]
    client.remove_vm(qemu.vm)
    assert [key.keyid for key in client.status().keys] == [0]


# --- keys -------------------------------------------------------------------------------------


def test_vm_gets_the_first_free_keyid_and_gives_it_back(own_engine: EngineProcess) -> None:
    client = own_engine.client
    vms = [uuid.uuid4() for _ in range(3)]
    for number, vm in enumerate(vms):
        added = client.add_vm(
            vm,
            name=f"vm{number}",
            memory_bytes=PAGE,
            track=Track.PAGES,
            algorithm=XTS_128,
            mode=KeyMode.RANDOM,
        )
        assert added == wire.VmAdded(keyid=number + 1, base=number * (2 << 20))
    assert [(key.keyid, key.vm, key.pages) for key in client.status().keys[1:]] == [
        (number + 1, vm, 1) for number, vm in enumerate(vms)
    ]
    with pytest.raises(EngineRefusedError, match="every KeyID is taken"):
        client.program_key(KeyMode.RANDOM)
    client.remove_vm(vms[1])
    assert client.program_key(KeyMode.RANDOM, XTS_256) == 2
    client.clear_key(2)
    assert [key.keyid for key in client.status().keys] == [0, 1, 3]


def test_keyids_of_a_vm_go_with_it(guests: Guests, client: EngineClient) -> None:
    qemu, added = guests.link(4)
    further = client.program_key(KeyMode.RANDOM, vm=qemu.vm)
    nobodys = client.program_key(KeyMode.RANDOM)
    assert guests.status(qemu).further_keyids == (further,)
    client.remove_vm(qemu.vm)
    assert [key.keyid for key in client.status().keys] == [0, nobodys]
    assert [key.pages for key in client.status().keys][1] == 0
    client.clear_key(nobodys)
    with pytest.raises(EngineRefusedError, match="has no key of its own"):
        client.clear_key(added.keyid)


@pytest.mark.parametrize("which", ["own", "of its pages"])
def test_keyid_in_use_is_kept(guests: Guests, client: EngineClient, which: str) -> None:
    qemu, added = guests.link(4)
    qemu.store(0, b"data" * LINE)
    keyid = added.keyid
    if which == "of its pages":
        keyid = client.program_key(KeyMode.RANDOM)
        client.assign_pages(qemu.vm, 0, PAGE, keyid)
    with pytest.raises(EngineRefusedError, match="in use by vm-") as caught:
        client.clear_key(keyid)
    assert caught.value.hint is not None
    with pytest.raises(EngineRefusedError, match="in use by vm-"):
        client.program_key(KeyMode.RANDOM, keyid=keyid)
    client.flush(qemu.vm)
    assert guests.read(qemu) == qemu.contents()
    if which == "of its pages":  # and given back when nothing is of it any more
        client.assign_pages(qemu.vm, 0, PAGE)
        client.clear_key(keyid)


@pytest.mark.parametrize("keyid", [0, 64, -1, 1 << 40])
def test_keyid_that_is_none_is_refused(client: EngineClient, keyid: int) -> None:
    for ask in (client.clear_key, lambda one: client.program_key(KeyMode.RANDOM, keyid=one)):
        with pytest.raises(EngineRefusedError, match="cannot be programmed: 1 to 63 can"):
            ask(keyid)


def test_cleared_keyid_reads_as_the_tme_key_does(
    guests: Guests, client: EngineClient, qemu: FakeQemu
) -> None:
    """Destroying a VM: its ciphertext stays in DRAM, and no KeyID there is makes sense of it."""
    added = guests.announce(qemu)
    qemu.link(guests.link_socket)
    secret = os.urandom(16 * PAGE)
    qemu.store(0, secret)
    client.flush(qemu.vm)
    before = stored(client, added.base, 16 * PAGE)
    assert client.read_dram(added.base, 16 * PAGE, added.keyid) == secret  # the control
    client.remove_vm(qemu.vm)

    assert stored(client, added.base, 16 * PAGE) == before  # it stays
    later = client.program_key(KeyMode.RANDOM, keyid=added.keyid)
    for keyid in range(64):
        assert not shows(client.read_dram(added.base, 16 * PAGE, keyid), secret)
    client.clear_key(later)
    client.power(PowerEvent.WARM_RESET)  # a new TME key
    assert not shows(client.read_dram(added.base, 16 * PAGE), secret)


def test_next_tenant_of_the_pages_finds_nothing(
    guests: Guests, client: EngineClient, make_qemu: MakeQemu
) -> None:
    first, added = guests.link(16)
    secret = os.urandom(16 * PAGE)
    first.store(0, secret)
    client.flush(first.vm)
    client.remove_vm(first.vm)
    second = make_qemu(16)
    assert guests.announce(second).base == added.base
    second.link(guests.link_socket)
    for keyid in (None, *range(64)):
        assert not shows(guests.read(second, keyid), secret)
    assert not any(guests.read(second))


def test_no_mode_but_those_of_pconfig(client: EngineClient) -> None:
    with pytest.raises(EngineRefusedError, match="no KeyID is programmed as platform"):
        client.program_key(KeyMode.PLATFORM)
    with pytest.raises(EngineRefusedError, match="mode direct needs a key file"):
        client.program_key(KeyMode.DIRECT)
    with pytest.raises(EngineRefusedError, match="no other mode has one"):
        client.program_key(KeyMode.RANDOM, key_file=Path("/dev/null"))


def test_platform_without_keyids_runs_no_vm(tmp_path: Path) -> None:
    """Fail closed: a VM is refused, and does not run under KeyID 0 instead."""
    for number, config in enumerate(
        (PlatformConfig(keyid_bits=0), PlatformConfig(tme=False, keyid_bits=0))
    ):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        with EngineProcess(run_dir, run_dir / "d", 4 << 20, platform=config) as engine:
            with pytest.raises(EngineRefusedError, match="has no KeyIDs") as caught:
                engine.client.add_vm(
                    uuid.uuid4(),
                    name="vm",
                    memory_bytes=PAGE,
                    track=Track.PAGES,
                    algorithm=XTS_128,
                    mode=KeyMode.RANDOM,
                )
            assert caught.value.hint == "set keyid-bits in platform.toml"


def test_algorithm_that_firmware_did_not_allow_is_refused(tmp_path: Path) -> None:
    config = PlatformConfig(algorithms=(XTS_128,))
    with EngineProcess(tmp_path, tmp_path / "d", 4 << 20, platform=config) as engine:
        with pytest.raises(EngineRefusedError, match="INVALID_ENC_ALG"):
            engine.client.program_key(KeyMode.RANDOM, XTS_256)
        assert engine.client.program_key(KeyMode.RANDOM, XTS_128) == 1


# --- instructions -----------------------------------------------------------------------------


def test_registers_are_as_firmware_left_them(own_engine: EngineProcess) -> None:
    client = own_engine.client
    activate = tme.TmeActivate.decode(client.rdmsr(tme.IA32_TME_ACTIVATE))
    assert activate.lock
    assert activate.enable
    assert activate.keyid_bits == 2
    assert client.rdmsr(tme.IA32_MKTME_KEYID_PARTITIONING) == 3
    client.wrmsr(tme.IA32_TME_ACTIVATE, 0)  # locked: ignored
    assert tme.TmeActivate.decode(client.rdmsr(tme.IA32_TME_ACTIVATE)) == activate
    for msr, value in ((0x983, 1 << 11), (0x981, 0), (0x10, 0)):
        with pytest.raises(EngineRefusedError) as caught:
            client.wrmsr(msr, value)
        assert caught.value.error == "GeneralProtection"
    with pytest.raises(EngineRefusedError, match="10H"):
        client.rdmsr(0x10)
    with pytest.raises(EngineRefusedError):
        client.wrmsr(0x982, -1)


def test_pconfig_programs_a_key_that_is_known(own_engine: EngineProcess, tmp_path: Path) -> None:
    client = own_engine.client
    key = os.urandom(64)
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_bytes(key)
    program = encode(2, Command.SET_KEY_DIRECT, XTS_256)
    assert client.pconfig(program, key_file=key_file) is Status.PROG_SUCCESS
    assert [(one.keyid, one.mode, one.algorithm) for one in client.status().keys][1:] == [
        (2, KeyMode.DIRECT, XTS_256)
    ]
    # A line of ciphertext that we put into DRAM ourselves reads as the reference says.
    with open(client.welcome.dram_path, "r+b") as dram:
        dram.write(bytes(range(1, 65)))
    expected = reference.decrypt(key, bytes(16), bytes(range(1, 65)))
    assert client.read_dram(0, PAGE, 2)[:LINE] == expected
    refused = encode(4, Command.CLEAR_KEY, XTS_128)  # the platform has 1 to 3
    with pytest.raises(EngineRefusedError, match="INVALID_KEYID") as caught:
        client.pconfig(refused)
    assert caught.value.error == "GeneralProtection"
    with pytest.raises(EngineRefusedError, match="not aligned"):
        client.pconfig(program, address=128)
    assert client.pconfig(encode(2, Command.CLEAR_KEY, XTS_128)) is Status.PROG_SUCCESS
    assert client.read_dram(0, PAGE, 2)[:LINE] != expected


def test_pconfig_mixes_the_users_entropy_into_a_random_key(
    own_engine: EngineProcess, tmp_path: Path
) -> None:
    """What is mixed in is read from a file, as keys are; it makes the key no known one."""
    client = own_engine.client
    entropy = tmp_path / "entropy"
    entropy.touch(0o600)
    entropy.write_bytes(os.urandom(64))
    program = encode(1, Command.SET_KEY_RANDOM, XTS_256)
    twin = encode(2, Command.SET_KEY_DIRECT, XTS_256)
    for one in (program, twin):
        assert client.pconfig(one, key_file=entropy) is Status.PROG_SUCCESS
    assert [(one.keyid, one.mode) for one in client.status().keys][1:] == [
        (1, KeyMode.RANDOM),
        (2, KeyMode.DIRECT),
    ]
    with open(client.welcome.dram_path, "r+b") as dram:
        dram.write(bytes(range(1, 65)))
    assert client.read_dram(0, PAGE, 1)[:LINE] != client.read_dram(0, PAGE, 2)[:LINE]
    entropy.write_bytes(os.urandom(32))
    with pytest.raises(EngineRefusedError, match="no aes-xts-256 key"):
        client.pconfig(program, key_file=entropy)


def test_no_key_crosses_the_socket(own_engine: EngineProcess) -> None:
    program = encode(1, Command.SET_KEY_DIRECT, XTS_128, bytes(range(32)))
    with pytest.raises(EngineRefusedError, match="no key crosses this socket") as caught:
        own_engine.client.pconfig(program)
    assert caught.value.error == "KeyMaterialError"
    assert own_engine.client.status().keys[1:] == ()
    for length in (0, 191, 193):
        with pytest.raises(EngineRefusedError, match="has 192 bytes"):
            own_engine.client.pconfig(bytes(length))


def test_pconfig_on_a_vms_keyid_stops_the_vm(guests: Guests, client: EngineClient) -> None:
    """Fail closed: what it had in memory is lost, and it must not go on without notice."""
    qemu, added = guests.link(4)
    qemu.store(0, b"data" * LINE)
    client.flush(qemu.vm)
    assert client.pconfig(encode(added.keyid, Command.NO_ENCRYPT, XTS_128)) is Status.PROG_SUCCESS
    guests.wait(
        wire.VmFault(
            vm=qemu.vm, message=f"PCONFIG changed its KeyID {added.keyid}: its memory is lost"
        )
    )
    guests.wait(wire.VmUnlinked(vm=qemu.vm))
    assert not guests.status(qemu).linked


def test_key_table_is_busy_while_pages_change_hands(
    own_engine: EngineProcess, make_qemu: MakeQemu
) -> None:
    """DEVICE_BUSY under real contention: two connections, one of them re-keying 32 MiB."""
    client = own_engine.client
    qemu = make_qemu(8192)
    client.add_vm(
        qemu.vm,
        name="vm",
        memory_bytes=qemu.ram_bytes,
        track=Track.STORES_AND_PAGES,
        algorithm=XTS_128,
        mode=KeyMode.RANDOM,
    )
    qemu.link(Path(client.welcome.link_socket))
    qemu.store(0, os.urandom(qemu.ram_bytes))
    client.flush(qemu.vm)
    control_socket = own_engine.log_path.parent / CONTROL_SOCKET
    found = set()

    def give_and_take() -> None:
        for keyid in (0, None) * 3:
            client.assign_pages(qemu.vm, 0, qemu.ram_bytes, keyid)

    busy = threading.Thread(target=give_and_take)
    busy.start()
    with EngineClient.connect(control_socket, wire.Role.OWNER) as other:
        while busy.is_alive():
            found.add(other.pconfig(encode(3, Command.SET_KEY_RANDOM, XTS_128)))
        busy.join()
        found.add(other.pconfig(encode(3, Command.SET_KEY_RANDOM, XTS_128)))
    assert found == {Status.DEVICE_BUSY, Status.PROG_SUCCESS}
    client.flush(qemu.vm)
    assert client.read(qemu.vm, 0, PAGE) == qemu.contents()[:PAGE]


# --- power ------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", list(PowerEvent))
def test_power_event_ends_every_vm(guests: Guests, client: EngineClient, event: PowerEvent) -> None:
    qemu, added = guests.link(4)
    qemu.store(0, os.urandom(4 * PAGE))
    client.flush(qemu.vm)
    before = stored(client, added.base)
    client.power(event)
    wait_event(client, lambda one: one == wire.VmUnlinked(vm=qemu.vm))
    assert client.status().vms == ()
    assert [key.keyid for key in client.status().keys] == [0]
    assert stored(client, added.base) == before
    assert not shows(client.read_dram(added.base, PAGE), qemu.contents()[:PAGE])
    assert guests.link(4)[1] == added  # and the platform is as it was


@pytest.mark.parametrize(("saves", "readable"), [(True, True), (False, False)])
def test_shared_pages_outlive_standby_only_under_the_key_that_was_saved(
    tmp_path: Path, make_qemu: MakeQemu, saves: bool, readable: bool
) -> None:
    config = PlatformConfig(save_key_for_standby=saves)
    with EngineProcess(tmp_path, tmp_path / "d", 4 << 20, platform=config) as engine:
        client = engine.client
        qemu = make_qemu(4)
        added = client.add_vm(
            qemu.vm,
            name="vm",
            memory_bytes=qemu.ram_bytes,
            track=Track.STORES_AND_PAGES,
            algorithm=XTS_128,
            mode=KeyMode.RANDOM,
        )
        client.assign_pages(qemu.vm, 0, PAGE, 0)
        qemu.link(Path(client.welcome.link_socket))
        qemu.store(0, os.urandom(4 * PAGE))
        client.flush(qemu.vm)
        shared, private = qemu.contents()[:PAGE], qemu.contents()[PAGE : 2 * PAGE]
        client.power(PowerEvent.STANDBY)
        assert (client.read_dram(added.base, PAGE) == shared) is readable
        assert client.read_dram(added.base + PAGE, PAGE) != private
        client.power(PowerEvent.POWER_CYCLE)
        assert client.read_dram(added.base, PAGE) != shared


def test_sidecar_tells_pages_and_exclusion(tmp_path: Path, make_qemu: MakeQemu) -> None:
    config = PlatformConfig(exclusion=Exclusion(base=0, size_bytes=1 << 20))
    with EngineProcess(tmp_path, tmp_path / "d", 4 << 20, platform=config) as engine:
        client = engine.client
        qemu = make_qemu(4)
        client.add_vm(
            qemu.vm,
            name="vm",
            memory_bytes=qemu.ram_bytes,
            track=Track.STORES_AND_PAGES,
            algorithm=XTS_128,
            mode=KeyMode.RANDOM,
        )
        client.assign_pages(qemu.vm, 0, PAGE, 0)
        qemu.link(Path(client.welcome.link_socket))
        qemu.store(0, os.urandom(4 * PAGE))
        client.flush(qemu.vm)
        sidecar = read_sidecar(client.write_sidecar())
        assert sidecar.exclusion is not None
        assert sidecar.exclusion.mask == ((1 << 46) - 1) & ~((1 << 20) - 1)
        assert [(one.base, one.size_bytes, one.keyid) for one in sidecar.pages][:2] == [
            (0, PAGE, 0),
            (PAGE, 3 * PAGE, 1),
        ]
        # KeyID 0's page is in the excluded range: plaintext. KeyID 1's beside it are not.
        assert stored(client, 0) == qemu.contents()[:PAGE]
        assert not shows(stored(client, PAGE, 3 * PAGE), qemu.contents())
