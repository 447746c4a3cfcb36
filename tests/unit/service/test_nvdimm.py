# SPDX-License-Identifier: GPL-2.0-or-later
"""NVDIMMs and DIMMs of a real engine: what is in an NVDIMM at its VM's end is there for the next.

The fake QEMU's process does not end, so at each link's end the engine waits in vain for that.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.firmware import Exclusion, PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.package import PowerEvent
from mktme.engine.sidecar import read_sidecar, sidecar_path
from mktme.engine.xts import Algorithm
from mktme.service import wire
from mktme.service.client import EngineProcess, EngineRefusedError

from ..conftest import DRAM_BYTES
from ..fake_qemu import PAGE, FakeQemu

MIB = 1 << 20
RAM_PAGES = 64
RAM = RAM_PAGES * PAGE
SIZE = 2 * MIB
DATA = os.urandom(3 * PAGE)
data_paths = pytest.mark.parametrize("datapath", DataPath)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pmem.img"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return new_key(tmp_path / "key")


def new_key(path: Path) -> Path:
    path.touch(0o600)
    path.write_bytes(secrets.token_bytes(32))
    return path


def is_clean(path: Path) -> bool:
    return bool(json.loads(sidecar_path(path).read_text())["clean"])


def add(engine: EngineProcess, qemu: FakeQemu, path: Path, **fields: Any) -> wire.VmAdded:
    inline = fields.get("datapath") is DataPath.INLINE
    shared = fields.pop("shared", False)
    arguments: dict[str, Any] = {
        "name": "one",
        "memory_bytes": RAM,
        "track": None if inline else Track.PAGES,
        "algorithm": Algorithm.AES_XTS_128,
        "mode": KeyMode.DIRECT if fields.get("key_file") else KeyMode.RANDOM,
        "window_bytes": RAM if inline else None,
        "nvdimm": wire.NvdimmFile(path=str(path), size_bytes=SIZE, shared=shared),
    }
    return engine.client.add_vm(qemu.vm, **(arguments | fields))


@contextmanager
def powered(
    engine: EngineProcess, path: Path, *, ends: bool = True, **fields: Any
) -> Iterator[FakeQemu]:
    """A VM with an NVDIMM behind its RAM, linked; with `ends` it has left when this returns."""
    inline = fields.get("datapath") is DataPath.INLINE
    segments = ((0, 0, RAM), (1 << 32, RAM, SIZE))
    blocks = (RAM_PAGES, SIZE // PAGE)
    with ExitStack() as stack:
        qemu = FakeQemu(blocks, segments=segments, track=Track.PAGES, faults=inline)
        stack.enter_context(qemu)
        add(engine, qemu, path, **fields)
        if inline:
            stack.callback(qemu.let_go)
        qemu.link(Path(engine.client.welcome.link_socket))
        yield qemu
        if ends:
            engine.client.remove_vm(qemu.vm)


@data_paths
def test_next_guest_finds_what_the_last_one_left(
    engine: EngineProcess, path: Path, key_file: Path, datapath: DataPath, fault_handling: None
) -> None:
    fields: dict[str, Any] = {"datapath": datapath, "key_file": key_file}
    with powered(engine, path, **fields) as qemu:
        assert not is_clean(path)
        qemu.dma(RAM + PAGE, DATA)
        qemu.dma(RAM + SIZE - PAGE, DATA[:PAGE])
    assert is_clean(path)
    image = path.read_bytes()
    assert all(DATA[at : at + 16] not in image for at in range(0, len(DATA), 16))
    assert os.stat(path).st_blocks * 512 < 20 * PAGE  # what was not written is a hole

    with powered(engine, path, **fields) as qemu:
        assert qemu.load(RAM, 5 * PAGE) == bytes(PAGE) + DATA + bytes(PAGE)
        assert qemu.load(RAM + SIZE - PAGE, PAGE) == DATA[:PAGE]
        assert engine.client.read(qemu.vm, RAM + PAGE, len(DATA)) == DATA
        assert not any(qemu.load(0, RAM))  # RAM is new
        qemu.dma(RAM + PAGE, b"changed")
    with powered(engine, path, **fields) as qemu:
        assert qemu.load(RAM + PAGE, 8) == b"changed" + DATA[7:8]


@data_paths
def test_another_key_reads_noise(
    engine: EngineProcess, path: Path, datapath: DataPath, fault_handling: None
) -> None:
    with powered(engine, path, datapath=datapath) as qemu:
        qemu.dma(RAM, DATA)
    with powered(engine, path, datapath=datapath) as qemu:
        found = qemu.load(RAM, len(DATA))
        assert all(DATA[at : at + 16] not in found for at in range(0, len(DATA), 16))
        assert any(found)


def test_another_key_with_integrity_is_refused(engine: EngineProcess, path: Path) -> None:
    algorithm = Algorithm.AES_XTS_128_INTEGRITY
    with powered(engine, path, algorithm=algorithm) as qemu:
        qemu.dma(RAM + PAGE, DATA)
    blocks = (RAM_PAGES, SIZE // PAGE)
    with FakeQemu(blocks, track=Track.PAGES) as qemu:
        add(engine, qemu, path, algorithm=algorithm)
        answer = qemu.connect(Path(engine.client.welcome.link_socket))
        assert not answer.accepted
        assert "does not match its MAC" in answer.reason
        engine.client.remove_vm(qemu.vm)
    assert is_clean(path)  # nothing of it was changed


def test_without_encryption_the_image_is_plaintext(engine: EngineProcess, path: Path) -> None:
    """The control."""
    with powered(engine, path, mode=KeyMode.NO_ENCRYPT) as qemu:
        qemu.dma(RAM + PAGE, DATA)
    assert path.read_bytes()[PAGE : PAGE + len(DATA)] == DATA
    assert json.loads(sidecar_path(path).read_text())["algorithm"] is None


@pytest.mark.parametrize("event", PowerEvent)
def test_key_of_the_platform_outlives_standby(
    tmp_path: Path, path: Path, event: PowerEvent
) -> None:
    config = PlatformConfig(save_key_for_standby=True)
    with EngineProcess(tmp_path, tmp_path / "dram", DRAM_BYTES, platform=config) as engine:
        with powered(engine, path, ends=False, shared=True) as qemu:
            qemu.dma(RAM, DATA)
            engine.client.power(event)
        assert is_clean(path)
        with powered(engine, path, shared=True) as qemu:
            kept = event is PowerEvent.STANDBY
            assert (qemu.load(RAM, len(DATA)) == DATA) is kept


def test_image_of_an_engine_that_was_killed_is_refused(
    tmp_path: Path, path: Path, key_file: Path
) -> None:
    with (
        EngineProcess(tmp_path, tmp_path / "dram", DRAM_BYTES) as engine,
        powered(engine, path, ends=False, key_file=key_file) as qemu,
    ):
        qemu.dma(RAM, DATA)
        engine.process.kill()
        engine.process.wait()
    assert DATA[:16] not in path.read_bytes()
    run_dir = tmp_path / "another"
    run_dir.mkdir()
    with (
        EngineProcess(run_dir, run_dir / "dram", DRAM_BYTES) as engine,
        FakeQemu((RAM_PAGES, SIZE // PAGE)) as qemu,
        pytest.raises(EngineRefusedError, match="did not end cleanly"),
    ):
        add(engine, qemu, path, key_file=key_file)


def test_it_is_described_with_dram(engine: EngineProcess, path: Path) -> None:
    with powered(engine, path) as qemu:
        sidecar = read_sidecar(engine.client.write_sidecar())
        (vm,) = (one for one in sidecar.vms if one.uuid == qemu.vm)
        assert vm.size_bytes == RAM + SIZE
        (module,) = sidecar.modules
        assert (module.base, module.size_bytes) == (vm.base + RAM, SIZE)
        assert module.file == str(path)


def test_it_comes_to_lie_where_it_was_or_not_at_all(engine: EngineProcess, path: Path) -> None:
    client = engine.client
    with powered(engine, path):
        pass
    with FakeQemu((RAM_PAGES, SIZE // PAGE)) as qemu:
        with pytest.raises(EngineRefusedError, match="lies at 0x40000 of DRAM"):
            add(engine, qemu, path, memory_bytes=2 * RAM)
        larger = wire.NvdimmFile(path=str(path), size_bytes=2 * SIZE)
        with pytest.raises(EngineRefusedError, match="not one of"):
            add(engine, qemu, path, nvdimm=larger)
        with pytest.raises(EngineRefusedError, match="the KeyID is for aes-xts-256"):
            add(engine, qemu, path, algorithm=Algorithm.AES_XTS_256)
        added = add(engine, qemu, path, memory_bytes=RAM // 2)
        assert added.base == RAM // 2
        with (
            FakeQemu((RAM_PAGES, SIZE // PAGE)) as other,
            pytest.raises(EngineRefusedError, match="writes this image"),
        ):
            add(engine, other, path)
        client.remove_vm(qemu.vm)
        keys = len(client.status().keys)
        add(engine, qemu, path)  # what was refused has left nothing
        assert len(client.status().keys) == keys + 1
        client.remove_vm(qemu.vm)


@pytest.mark.parametrize(
    "file",
    ["relative", "/no\0name", "/" + "x" * 300, "/\udfff", "/", "/proc/pmem", "/dev/null"],
)
def test_paths_that_none_can_be_at(engine: EngineProcess, file: str) -> None:
    with (
        FakeQemu((RAM_PAGES, SIZE // PAGE)) as qemu,
        pytest.raises((EngineRefusedError, ValueError)),
    ):
        add(engine, qemu, Path(), nvdimm=wire.NvdimmFile(path=file, size_bytes=SIZE))
    assert engine.client.status().vms == ()


def test_key_of_the_platform_needs_to_encrypt_all_of_it(tmp_path: Path, path: Path) -> None:
    config = PlatformConfig(exclusion=Exclusion(base=0, size_bytes=PAGE))
    with (
        EngineProcess(tmp_path, tmp_path / "dram", DRAM_BYTES, platform=config) as engine,
        FakeQemu((RAM_PAGES, SIZE // PAGE)) as qemu,
    ):
        with pytest.raises(EngineRefusedError, match="exclusion"):
            add(engine, qemu, path, shared=True)
        assert not path.exists()


def test_its_pages_keep_their_keyid(engine: EngineProcess, path: Path) -> None:
    with powered(engine, path) as qemu, pytest.raises(EngineRefusedError, match="bytes of RAM"):
        engine.client.assign_pages(qemu.vm, RAM, PAGE, 0)


# --- hostile QEMUs ----------------------------------------------------------------------------


def refused(engine: EngineProcess, path: Path, *blocks: int, fill: bool = False) -> str:
    with FakeQemu(blocks, track=Track.PAGES) as qemu:
        add(engine, qemu, path)
        if fill:
            qemu.dma(RAM + SIZE - PAGE, b"x")
        answer = qemu.connect(Path(engine.client.welcome.link_socket))
        assert not answer.accepted
        engine.client.remove_vm(qemu.vm)
    return answer.reason


def test_hello_without_it_is_refused(engine: EngineProcess, path: Path) -> None:
    pages = SIZE // PAGE
    assert f"{RAM} bytes of RAM" in refused(engine, path, RAM_PAGES)
    assert "no RAM block that is its NVDIMM" in refused(engine, path, RAM_PAGES + pages)
    assert "no RAM block that is its NVDIMM" in refused(engine, path, RAM_PAGES + 1, pages - 1)
    assert is_clean(path)


def test_contents_of_its_own_are_refused(engine: EngineProcess, path: Path) -> None:
    """They would go into the image, over what it holds."""
    assert "has contents" in refused(engine, path, RAM_PAGES, SIZE // PAGE, fill=True)
    assert is_clean(path)


# --- DIMMs ------------------------------------------------------------------------------------


@data_paths
def test_unplugged_memory_is_forgotten(
    engine: EngineProcess, path: Path, datapath: DataPath, fault_handling: None
) -> None:
    client, dimm = engine.client, RAM + SIZE
    with FakeQemu(
        (RAM_PAGES, SIZE // PAGE, RAM_PAGES),
        segments=((0, 0, RAM), (1 << 32, RAM, SIZE + RAM)),
        track=Track.PAGES,
        faults=datapath is DataPath.INLINE,
    ) as qemu:
        added = add(engine, qemu, path, datapath=datapath, dimm_bytes=RAM)
        qemu.link(Path(client.welcome.link_socket))
        qemu.dma(RAM, DATA)
        qemu.dma(dimm, DATA)
        qemu.dma(dimm + RAM - PAGE, DATA[:PAGE])
        client.flush(qemu.vm)
        assert client.read(qemu.vm, dimm, len(DATA)) == DATA
        client.discard_memory(qemu.vm, dimm, RAM)
        assert not any(client.read(qemu.vm, dimm, RAM))
        assert not any(qemu.contents()[dimm:])
        with open(client.welcome.dram_path, "rb") as dram:
            assert not any(os.pread(dram.fileno(), RAM, added.base + dimm))

        qemu.dma(dimm + PAGE, DATA[:PAGE])  # it is plugged in again
        client.flush(qemu.vm)
        assert client.read(qemu.vm, dimm, 3 * PAGE) == bytes(PAGE) + DATA[:PAGE] + bytes(PAGE)
        assert client.read(qemu.vm, RAM, len(DATA)) == DATA

        for offset, size in ((0, PAGE), (RAM, SIZE), (dimm - PAGE, 2 * PAGE), (dimm, RAM + PAGE)):
            with pytest.raises(EngineRefusedError, match="no memory that could be unplugged"):
                client.discard_memory(qemu.vm, offset, size)
        for offset, size in ((dimm + 1, PAGE), (dimm, 100)):
            with pytest.raises(EngineRefusedError, match="whole pages"):
                client.discard_memory(qemu.vm, offset, size)
        if datapath is DataPath.INLINE:
            qemu.let_go()
        client.remove_vm(qemu.vm)
    assert is_clean(path)
