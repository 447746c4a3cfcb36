# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest against live VMs: fixtures `mktme_platform`, `mktme_vm`; marker `mktme`.

::

    @pytest.mark.mktme(track="pages", memory="1G")
    def test_my_guest(mktme_vm):
        mktme_vm.domain.console.run("uname -r", timeout_s=10)
        with mktme_vm.held() as engine:
            assert compare_memory(mktme_vm, engine).passed

A module that has its own fixture `mktme_emulator`, parametrised or not, chooses another QEMU; with
`mktme_firmware`, what firmware sets up.

Tests of one module that follow each other and ask for the same guest share it; the next other one
ends it. A guest that was lost stays lost: later tests that ask for it fail at once and say in
which test that was. A machine that is not fit skips these
tests with the reason, or fails them where the environment variable CI is set.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from mktme.engine.firmware import PlatformConfig
    from mktme.vm.config import VmConfig
    from mktme.vm.platform import Platform, Vm

MARKER: Final = (
    "mktme(guest='tiny', datapath='shadow', track='stores+pages', memory='512M', vcpus=1,"
    " algorithm='aes-xts-128', key_file=None, encrypt=True, check_tlb=False, machine='q35',"
    " firmware='bios', vtpm=False, visible=False):"
    " the guest that the fixture mktme_vm boots; track=None for plain QEMU"
)
DRAM_BYTES: Final = 4 << 30


@dataclass(slots=True)
class _Guests:
    """The guests of one module, of which one runs at a time."""

    platform: Platform
    stack: ExitStack
    running: tuple[VmConfig, Vm] | None = None
    lost: dict[VmConfig, str] = field(default_factory=dict)


_config_key: Final = pytest.StashKey["tuple[_Guests, VmConfig]"]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", MARKER)


@pytest.fixture(scope="module")
def mktme_emulator() -> str | None:
    """The QEMU of `mktme_platform`, as `--emulator` has it; None for this machine's own."""
    return None


@pytest.fixture(scope="module")
def mktme_firmware() -> PlatformConfig | None:
    """What firmware sets up on `mktme_platform`; None for what is usual."""
    return None


@pytest.fixture(scope="module")
def mktme_platform(
    mktme_emulator: str | None, mktme_firmware: PlatformConfig | None
) -> Iterator[Platform]:
    """A `mktme.vm.platform.Platform` for the tests of one module."""
    # Imported here: a project that has this plugin installed but no live test pays nothing.
    from mktme.vm.host import emulator_path
    from mktme.vm.platform import Platform

    with ExitStack() as stack:
        with _fitness():
            emulator = None if mktme_emulator is None else emulator_path(mktme_emulator)
            platform = stack.enter_context(
                Platform(DRAM_BYTES, config=mktme_firmware, emulator=emulator)
            )
        yield platform


@pytest.fixture(scope="module")
def _mktme_guests(mktme_platform: Platform) -> Iterator[_Guests]:
    with ExitStack() as stack:
        yield _Guests(mktme_platform, stack)


@pytest.fixture
def mktme_vm(request: pytest.FixtureRequest, _mktme_guests: _Guests) -> Vm:
    """The running `mktme.vm.platform.Vm` that the marker `mktme` describes."""
    marker = request.node.get_closest_marker("mktme")
    with _fitness():
        config = vm_config(**(marker.kwargs if marker is not None else {}))
    guests = _mktme_guests
    if config in guests.lost:
        pytest.fail(f"this VM was lost before: {guests.lost[config]}", pytrace=False)
    request.node.stash[_config_key] = (guests, config)
    if guests.running is None or guests.running[0] != config:
        guests.running = None
        guests.stack.close()
        with _fitness():
            vm = guests.stack.enter_context(guests.platform.launch(config))
        guests.running = (config, vm)
    return guests.running[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember which test lost its VM."""
    report = yield
    if call.excinfo is not None and _config_key in item.stash:
        from mktme.service.client import ServiceError
        from mktme.vm.console import VmLostError

        if isinstance(call.excinfo.value, VmLostError | ServiceError):
            guests, config = item.stash[_config_key]
            guests.lost.setdefault(config, f"in {item.nodeid}: {call.excinfo.value}")
    return report


def vm_config(
    *,
    guest: str = "tiny",
    datapath: str = "shadow",
    track: str | None = "",
    window: str | None = None,
    memory: str = "512M",
    vcpus: int = 1,
    algorithm: str = "aes-xts-128",
    key_file: Path | None = None,
    encrypt: bool = True,
    pages: tuple[str, ...] = (),
    check_tlb: bool = False,
    machine: str = "q35",
    firmware: str = "bios",
    vtpm: bool = False,
    visible: bool = False,
) -> VmConfig:
    """A guest's configuration from the marker's words, which are the command line's.

    Raises:
        UsageError: a word that the command line would not take either.
    """
    from mktme.datapath.kinds import DataPath
    from mktme.datapath.shadow import Track
    from mktme.engine.keys import KeyMode
    from mktme.engine.xts import Algorithm
    from mktme.vm.config import VmConfig, check_config
    from mktme.vm.hardware import Firmware, Hardware, Machine
    from mktme.vm.host import UsageError
    from mktme.vm.images import guest_image
    from mktme.vm.pages import parse_pages
    from mktme.vm.sizes import parse_size, parse_window

    if datapath not in {one.value for one in DataPath}:
        raise UsageError(f"no data path {datapath!r}", hint="shadow, inline")
    if track == "":
        track = "stores+pages" if datapath == "shadow" else None
    mode = KeyMode.DIRECT if key_file is not None else KeyMode.RANDOM
    try:
        config = VmConfig(
            guest_image(guest),
            memory_bytes=parse_size(memory),
            vcpus=vcpus,
            datapath=DataPath(datapath),
            track=None if track is None else Track(track),
            window_bytes=None if window is None else parse_window(window, parse_size(memory)),
            algorithm=Algorithm(algorithm),
            mode=mode if encrypt else KeyMode.NO_ENCRYPT,
            key_file=key_file,
            pages=tuple(parse_pages(one) for one in pages),
            check_tlb=check_tlb,
            hardware=Hardware(Machine(machine), Firmware(firmware), vtpm=vtpm),
            visible=visible,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_config(config)
    return config


@contextmanager
def _fitness() -> Iterator[None]:
    """Skip what this machine cannot run, and say why; in CI, where it must run, fail."""
    from mktme.datapath.uffd import FaultServiceError, WriteTrackingError
    from mktme.vm.host import EnvironmentUnfitError
    from mktme.vm.images import ImageError

    try:
        yield
    except (EnvironmentUnfitError, FaultServiceError, WriteTrackingError, ImageError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"this machine is not fit: {error} ({error.hint})")
