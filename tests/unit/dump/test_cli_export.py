# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme dump capture`, `info` and `decrypt` as users meet them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mktme.cli import ExitCode
from mktme.datapath.shadow import Track
from mktme.dump.capture import CaptureReport
from mktme.dump.decrypt import DecryptReport
from mktme.dump.info import InfoReport
from mktme.engine.keys import KeyMode
from mktme.engine.sidecar import sidecar_path
from mktme.engine.xts import Algorithm
from mktme.proof.schema import DOCUMENTS
from mktme.service import wire
from mktme.service.client import EngineClient

from ..command import Mktme, Result, runner
from ..conftest import MakeQemu
from ..fake_qemu import FakeQemu
from ..running_platforms import DRAM_BYTES, Platforms, RunningPlatform, make_platforms
from .conftest import VM_BYTES, VM_KEYID, MakeImage
from .encrypted import OTHER_KEY, STRUCTURED, key_file, vm_pages
from .test_formats import RELEASE, note_of

PAGE = 4096


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    monkeypatch.setenv("COLUMNS", "80")
    return runner(monkeypatch, capsys)


@pytest.fixture
def platforms(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platforms]:
    with make_platforms(monkeypatch, tmp_path_factory) as platforms:
        yield platforms


@pytest.fixture
def alice(platforms: Platforms, make_qemu: MakeQemu) -> tuple[RunningPlatform, FakeQemu]:
    """A platform that others may own, with a VM in which something is."""
    platform, qemu = platforms.start(), make_qemu(64, track=Track.PAGES)
    platform.client.add_vm(
        qemu.vm,
        name="alice",
        memory_bytes=qemu.ram_bytes,
        track=Track.PAGES,
        algorithm=Algorithm.AES_XTS_128,
        mode=KeyMode.RANDOM,
    )
    qemu.link(Path(platform.client.welcome.link_socket))
    qemu.dma(PAGE, STRUCTURED)
    return platform, qemu


@contextlib.contextmanager
def holding(platform: RunningPlatform, pause_s: float | None) -> Iterator[None]:
    """Do what a harness does when VMs are to be held."""

    def run(client: EngineClient) -> None:
        while (event := client.events.get()) is not None:
            if isinstance(event, wire.HoldVms):
                client.vms_held(event.capture)
                client.vms_released(event.capture, pause_s)
                return

    thread = threading.Thread(target=run, args=(platform.client,))
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive()


def fits(result: Result, *paths: Path) -> None:
    """What is for people fits 80 columns, but for what the user named."""
    for line in result.out.splitlines():
        for path in paths:
            line = line.replace(str(path), path.name)
        assert len(line) <= 80, line


def test_capture_then_all_that_can_be_done_with_it(
    mktme: Mktme, alice: tuple[RunningPlatform, FakeQemu], tmp_path: Path
) -> None:
    platform, qemu = alice
    image, out = tmp_path / "c.img", tmp_path / "out"
    with holding(platform, 0.031):
        result = mktme("dump", "capture", image)
    assert result.code == ExitCode.OK, result.err
    assert result.out.startswith(f"{image}: 4 KiB of alice\nguests held for 31 ms; ")
    assert result.out.endswith(f"in all, by copy-on-write\ndescribed by {image}.json\n")
    fits(result, image)

    result = mktme("dump", "info", image, "--verify")
    assert result.code == ExitCode.OK, result.err
    assert "guests held for 31 ms" in result.said
    assert "verified" in result.said
    assert "DRAM of 64.0 MiB, 4 KiB of it written" in result.said
    fits(result, image)

    result = mktme("dump", "decrypt", image, "-o", out)
    assert result.code == ExitCode.OK, result.err
    assert f"{out}: 256 KiB of alice as raw, 4 KiB of it not zero" in result.said
    fits(result, out)
    assert out.read_bytes() == qemu.contents()

    again = mktme("dump", "decrypt", image, "-o", out)
    assert again == Result(
        ExitCode.USAGE,
        "",
        f"mktme: {out}: exists\n  hint: remove it, or choose another name\n",
    )
    again = mktme("dump", "capture", image)
    assert (again.code, again.out) == (ExitCode.USAGE, "")
    assert "c.img: exists" in again.err

    platform.client.remove_vm(qemu.vm)
    gone = mktme("dump", "decrypt", image, "-o", tmp_path / "new")
    assert gone.code == ExitCode.RUN_FAILED
    assert "VM alice of this image is not on the platform that runs" in gone.err
    gone = mktme("dump", "capture", tmp_path / "new", "--vm", "alice")
    assert gone.code == ExitCode.RUN_FAILED
    assert "no VM is named 'alice' on this platform" in gone.err
    assert not (tmp_path / "new").exists()


def test_documents(mktme: Mktme, alice: tuple[RunningPlatform, FakeQemu], tmp_path: Path) -> None:
    platform, _ = alice
    image = tmp_path / "c.img"
    with holding(platform, None):
        result = mktme("dump", "capture", image, "--vm", "alice", "--json")
    capture = msgspec.json.decode(result.out, type=CaptureReport)
    assert (capture.vms, capture.sidecar) == (("alice",), str(sidecar_path(image)))
    info = msgspec.json.decode(mktme("dump", "info", image, "--json").out, type=InfoReport)
    assert info.capture == capture.capture
    assert info.size_bytes == DRAM_BYTES
    result = mktme("dump", "decrypt", image, "-o", tmp_path / "o", "--format", "elf", "--json")
    report = msgspec.json.decode(result.out, type=DecryptReport)
    assert (report.vm, report.kernel) == ("alice", None)
    assert "without VMCOREINFO" not in result.err
    for name in ("dump-capture-1.json", "dump-info-1.json", "dump-decrypt-1.json"):
        assert name in DOCUMENTS


def test_known_key(mktme: Mktme, make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image(vm_pages({0: STRUCTURED, 2: note_of().ljust(PAGE, b"\0")}))
    key, wrong = key_file(tmp_path / "key"), key_file(tmp_path / "wrong", OTHER_KEY)
    out = tmp_path / "core"
    arguments = ("dump", "decrypt", image, "-o", out, "--format", "elf", "--vm", "alice")
    result = mktme(*arguments, "--key-file", wrong)
    assert (result.code, result.out) == (ExitCode.RUN_FAILED, "")
    assert f"the key does not fit KeyID {VM_KEYID}" in result.err
    assert "hint: give the key that it was written with" in result.err
    assert not out.exists()
    result = mktme(*arguments, "--key-file", f"{VM_KEYID}={key}")
    assert result.code == ExitCode.OK, result.err
    assert result.out.endswith(f"with VMCOREINFO of Linux {RELEASE}\n")
    assert result.err == ""
    fits(result, out)
    assert out.stat().st_size > VM_BYTES
    result = mktme(*arguments, "--key-file", tmp_path / "none")
    assert result.code == ExitCode.USAGE
    result = mktme(*arguments, "--key-file", key, "--engine", tmp_path)
    assert result.code == ExitCode.USAGE
    assert "--key-file has no use for --engine" in result.err


def test_what_is_left_out_is_said(
    mktme: Mktme,
    make_image: MakeImage,
    tmp_path: Path,
) -> None:
    image = make_image(vm_pages({0: STRUCTURED}))
    other = key_file(tmp_path / "other", OTHER_KEY[:32])
    out = tmp_path / "out"
    arguments = ("dump", "decrypt", image, "-o", out, "--key-file", f"0={other}")
    result = mktme(*arguments)
    assert result.code == ExitCode.RUN_FAILED
    assert f"hint: --key-file {VM_KEYID}=FILE, or --skip-missing" in result.err
    result = mktme(*arguments, "--skip-missing")
    assert result.code == ExitCode.OK
    assert f"mktme: zeros in place of 4 KiB under KeyID {VM_KEYID}: no key\n" in result.err
    assert not any(out.read_bytes())


def test_no_key_and_no_platform(
    mktme: Mktme,
    platforms: Platforms,
    make_image: MakeImage,
    tmp_path: Path,
) -> None:
    image = make_image(vm_pages({0: STRUCTURED}))
    result = mktme("dump", "decrypt", image, "-o", tmp_path / "out")
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert "no key: no platform is running" in result.err
    assert "--key-file FILE" in result.err


def test_platform_that_shares_nothing(mktme: Mktme, platforms: Platforms, tmp_path: Path) -> None:
    platforms.start(shared_ownership=False)
    result = mktme("dump", "capture", tmp_path / "c.img")
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert "only the process that started this platform may change it" in result.err


def test_images_that_cannot_be_read(
    mktme: Mktme,
    make_image: MakeImage,
    tmp_path: Path,
) -> None:
    image = make_image({})
    described = sidecar_path(image)
    document = json.loads(described.read_text())
    for change, said in (
        ({"version": 4}, "sidecar version 4, this mktme reads 5"),
        ({"schema": "other"}, "no sidecar: its schema is 'other'"),
        ({"vms": []}, "holds no VM"),
        ({"vms": document["vms"] * 2}, "inconsistent"),
    ):
        described.write_text(json.dumps(document | change))
        result = mktme("dump", "decrypt", image, "-o", tmp_path / "out", "--key-file", "x")
        assert result.code in (ExitCode.RUN_FAILED, ExitCode.USAGE)
        assert said in result.err
        assert "Traceback" not in result.err
    described.unlink()
    result = mktme("dump", "info", image)
    assert result.code == ExitCode.RUN_FAILED
    assert "nothing says how dram is to be read" in result.err
    result = mktme("dump", "info", tmp_path / "none")
    assert result.code == ExitCode.RUN_FAILED
    assert "No such file" in result.err
