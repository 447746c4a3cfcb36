# SPDX-License-Identifier: GPL-2.0-or-later
"""What is checked of a guest and of the machine before anything is started."""

from __future__ import annotations

import dataclasses
import queue
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mktme.datapath.shadow import Track
from mktme.engine.keys import KeyMode
from mktme.service import wire
from mktme.service.client import EngineClient
from mktme.vm import platform
from mktme.vm.config import (
    MIN_MEMORY_BYTES,
    Nvdimm,
    VmConfig,
    check_config,
    parse_nvdimm,
    region_bytes,
)
from mktme.vm.console import VmError
from mktme.vm.domain import Domain
from mktme.vm.host import EnvironmentUnfitError, Host, UsageError
from mktme.vm.platform import Platform, available_memory_bytes, require_disk, require_memory
from mktme.vm.sizes import parse_size

from ..fake_qemu import VM
from .test_domain_xml import IMAGE

MIB, GIB = 1 << 20, 1 << 30
CONFIG = VmConfig(IMAGE)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * MIB),
        ("512m", 512 * MIB),
        (" 512M ", 512 * MIB),
        ("512MB", 512 * MIB),
        ("512MiB", 512 * MIB),
        ("4G", 4 * GIB),
        ("786432K", 768 * MIB),
        ("4096", 4096),
        ("0", 0),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-512M", "+512M", "0.5G", "512X", "512MM", "5 12M", "512 M", "0x200M", "1T"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert caught.value.hint == "write it as 512M or 4G"


@pytest.mark.parametrize("memory_bytes", [MIN_MEMORY_BYTES, 512 * MIB, 513 * MIB, 64 * GIB])
def test_good_memory_sizes(memory_bytes: int) -> None:
    check_config(dataclasses.replace(CONFIG, memory_bytes=memory_bytes))


@pytest.mark.parametrize(
    ("memory_bytes", "message"),
    [
        (512 * MIB + 1, "536870913 bytes of memory are not whole pages of 4096 bytes"),
        (1000001, "not whole pages"),
        (512 * MIB + 4096, "not whole MiB"),
        (MIN_MEMORY_BYTES - MIB, "too little for a guest"),
        (4096, "not whole MiB"),
        (0, "0 MiB are too little"),
    ],
)
def test_bad_memory_sizes_are_refused_with_one_that_would_do(
    memory_bytes: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_config(dataclasses.replace(CONFIG, memory_bytes=memory_bytes))
    option, size, *_ = str(caught.value.hint).split()
    assert option == "--memory"
    check_config(dataclasses.replace(CONFIG, memory_bytes=parse_size(size)))


@pytest.mark.parametrize("vcpus", [0, -1, 256])
def test_number_of_vcpus(vcpus: int) -> None:
    with pytest.raises(UsageError, match="vCPUs"):
        check_config(dataclasses.replace(CONFIG, vcpus=vcpus))
    check_config(dataclasses.replace(CONFIG, vcpus=255))


@pytest.mark.parametrize(
    ("mode", "key_file"),
    [
        (KeyMode.DIRECT, None),
        (KeyMode.RANDOM, Path("/key")),
        (KeyMode.NO_ENCRYPT, Path("/key")),
    ],
)
def test_known_key_and_direct_mode_go_together(mode: KeyMode, key_file: Path | None) -> None:
    with pytest.raises(UsageError, match="go together"):
        check_config(dataclasses.replace(CONFIG, mode=mode, key_file=key_file))
    check_config(dataclasses.replace(CONFIG, mode=KeyMode.DIRECT, key_file=Path("/key")))


def test_regions_end_on_the_allocators_boundaries() -> None:
    assert [region_bytes(size) for size in (4096, 2 * MIB, 2 * MIB + 1, 513 * MIB)] == [
        2 * MIB,
        2 * MIB,
        4 * MIB,
        514 * MIB,
    ]


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "available_memory_bytes", lambda: 500 * MIB)
    require_memory(500 * MIB)
    with pytest.raises(EnvironmentUnfitError, match="512 MiB does not fit: 500 MiB") as caught:
        require_memory(512 * MIB)
    assert "--memory" in str(caught.value.hint)


def test_memory_of_this_machine() -> None:
    assert 16 * MIB < available_memory_bytes() < 1 << 50


def test_disk_that_is_not_there(tmp_path: Path) -> None:
    free = require_disk(tmp_path, 4096)
    assert free > 4096
    with pytest.raises(EnvironmentUnfitError, match=f"does not fit into {tmp_path}") as caught:
        require_disk(tmp_path, 1 << 60)
    assert "--dram FILE" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no place for the DRAM image: No such file"):
        require_disk(tmp_path / "none", 4096)


# --- which tracker, and its plugin ------------------------------------------------------------


def platform_of(qemu_version: tuple[int, int, int]) -> tuple[Platform, list[str]]:
    notices: list[str] = []
    one = Platform(1 << 30, notice=notices.append)
    one.host = cast("Host", SimpleNamespace(qemu_version=qemu_version, plugin_api=4))
    return one, notices


@pytest.mark.parametrize(
    ("qemu", "vcpus", "asked", "given"),
    [
        ((10, 0, 2), 1, Track.STORES_AND_PAGES, Track.STORES_AND_PAGES),
        ((10, 0, 2), 2, Track.STORES_AND_PAGES, Track.PAGES),
        ((10, 2, 0), 8, Track.STORES, Track.PAGES),
        ((10, 0, 2), 2, Track.PAGES, Track.PAGES),
        ((10, 0, 2), 2, None, None),
        ((11, 0, 0), 2, Track.STORES_AND_PAGES, Track.STORES_AND_PAGES),
    ],
)
def test_stores_are_not_watched_where_qemu_would_abort(
    qemu: tuple[int, int, int], vcpus: int, asked: Track | None, given: Track | None
) -> None:
    one, notices = platform_of(qemu)
    config = dataclasses.replace(CONFIG, vcpus=vcpus, track=asked)
    assert one._supported(config) == dataclasses.replace(config, track=given)
    assert len(notices) == (asked != given)
    assert all("tracking by pages alone" in notice for notice in notices)


def test_plugin_is_told_all_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "plugin_path", lambda api: Path(f"/a,b/mktme-api{api}.so"))
    one, _ = platform_of((10, 0, 2))
    welcome = SimpleNamespace(link_socket="/run/x,y/link.sock")
    one.engine = cast("EngineClient", SimpleNamespace(welcome=welcome))
    config = dataclasses.replace(CONFIG, memory_bytes=4 * GIB)
    # QEMU takes a doubled comma for one that belongs to the value.
    assert one._plugin_argument(VM, config) == (
        "/a,,b/mktme-api4.so,socket=/run/x,,y/link.sock,vm=6f3d4b9e-4c0b-4c3a-9a55-1a4f4f0f8a11,"
        "datapath=shadow,track=stores+pages,ram-below-4g=2147483648,check-tlb=off,visible=off"
    )
    visible = one._plugin_argument(VM, dataclasses.replace(config, visible=True))
    assert visible.endswith(",check-tlb=off,visible=on")


def test_plugin_is_told_where_modules_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "plugin_path", lambda api: Path("/mktme.so"))
    one, _ = platform_of((10, 0, 2))
    welcome = SimpleNamespace(link_socket="/run/link.sock")
    one.engine = cast("EngineClient", SimpleNamespace(welcome=welcome))
    nvdimm = Nvdimm(Path("/pmem"), 2 << 20)
    config = dataclasses.replace(CONFIG, memory_bytes=4 * GIB, nvdimm=nvdimm, dimms=(1 << 27,))
    argument = one._plugin_argument(VM, config)
    assert f",module={2 << 20}@{6 * GIB},module={1 << 27}@{6 * GIB + (1 << 27)}" in argument


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"nvdimm": Nvdimm(Path("/pmem"), 0)}, "not whole 2 MiB"),
        ({"nvdimm": Nvdimm(Path("/pmem"), 3 << 20)}, "not whole 2 MiB"),
        ({"nvdimm": Nvdimm(Path("/pmem"), 2 << 20), "track": None}, "plain guest"),
        ({"dimms": (64 << 20,)}, "whole 128 MiB"),
        ({"dimms": (0,)}, "whole 128 MiB"),
        ({"dimms": (1 << 27,) * 8}, "at most 7 DIMMs"),
        ({"dimms": (1 << 27,), "track": None}, "guests with an engine"),
        ({"dimms": (1 << 27,), "memory_bytes": 255 << 20}, "too little for a guest with memory"),
    ],
)
def test_modules_that_cannot_be(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        check_config(dataclasses.replace(CONFIG, **fields))


def test_nvdimm_as_people_write_it() -> None:
    assert parse_nvdimm("/a:b/pmem:64M") == Nvdimm(Path("/a:b/pmem"), 64 << 20)
    for text in ("pmem", ":64M", "pmem:", "pmem:many", "pmem:1M"):
        with pytest.raises(UsageError):
            parse_nvdimm(text)


# --- the engine's events ----------------------------------------------------------------------


class FakeDomain:
    """A domain that notes when it is held."""

    label = "alice"
    trouble: str | None = None

    def __init__(self) -> None:
        self.calls: list[str] = []

    def hold(self, trouble: str) -> None:
        self.calls.append("hold")
        self.trouble = trouble

    def release(self) -> None:
        self.calls.append("release")
        self.trouble = None


class Ended(FakeDomain):
    """One that ended by itself."""

    def hold(self, trouble: str) -> None:
        raise VmError("it is gone")


def watch(one: Platform, *events: wire.Event) -> None:
    """Have a platform follow events up to the engine's end."""
    told: queue.SimpleQueue[wire.Event | None] = queue.SimpleQueue()
    for event in (*events, None):
        told.put(event)
    one.engine = cast("EngineClient", SimpleNamespace(events=told))
    one._watch()


FULL = wire.DramFull(vm=VM, message="no space left")


def test_guest_waits_while_dram_is_full() -> None:
    one, notices = platform_of((10, 0, 2))
    domain = FakeDomain()
    one._domains[VM] = cast("Domain", domain)
    watch(one, FULL)
    assert (domain.calls, domain.trouble) == (["hold"], "it is held: no space left")
    assert one.fault(VM) == "no space left"
    watch(one, wire.DramCaughtUp(vm=VM))
    assert (domain.calls, domain.trouble) == (["hold", "release"], None)
    assert one.fault(VM) is None
    assert len(notices) == 2


@pytest.mark.parametrize("domains", [{}, {VM: Ended()}], ids=["taken down", "ended"])
def test_guest_that_is_gone_does_not_end_the_watch(domains: dict[uuid.UUID, FakeDomain]) -> None:
    one, _ = platform_of((10, 0, 2))
    one._domains.update(cast("dict[uuid.UUID, Domain]", domains))
    other = uuid.uuid4()
    watch(one, FULL, wire.VmFault(vm=other, message="gone"))
    assert one.fault(VM) == "no space left"
    assert one.fault(other) == "gone"
