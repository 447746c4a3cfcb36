# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs: each configuration against plain QEMU in the same run.

Machines are noisy and differ, so every figure that counts is a ratio of medians over rounds, in
each of which all configurations take their turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.keys import KeyMode, KeyTable
from mktme.engine.pconfig import Command, encode
from mktme.engine.tme import IA32_TME_ACTIVATE
from mktme.engine.xts import LINE_BYTES, PAGE_BYTES, Algorithm
from mktme.proof.guest_tools import equip
from mktme.proof.report import Environment, environment
from mktme.proof.runs import Narrator
from mktme.proof.transparency import run_workload
from mktme.service.client import EngineProcess
from mktme.service.wire import Memory, Paging, Traffic
from mktme.vm.config import VmConfig, region_bytes
from mktme.vm.disk_images import DiskImage
from mktme.vm.host import QEMU11, EnvironmentUnfitError, emulator_path
from mktme.vm.platform import Platform
from mktme.vm.reaper import process_dir
from mktme.vm.visible import visible_platform

PLAIN: Final = "plain"
INLINE: Final = "inline 25%"
INTEGRITY: Final = "inline 25% integrity"
FITS: Final = "inline 50%"
"""Its window holds all that the workload touches: once warm it should cost next to nothing."""
INVISIBLE: Final = "QEMU 11"
VISIBLE: Final = "QEMU 11 visible"
"""As `INVISIBLE`, and the guest sees the platform's registers."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """How a guest runs.

    Attributes:
        track: what tells of writes; None without plugin and engine, or for `inline`.
        window_share: `inline`: the window, in hundredths of the guest's memory.
        again: whether its workload is run and timed once more.
        qemu11: whether it is on QEMU 11.
        visible: whether the guest sees the platform's memory encryption.
    """

    track: Track | None = None
    window_share: int | None = None
    integrity: bool = False
    again: bool = False
    qemu11: bool = False
    visible: bool = False

    def apply(self, config: VmConfig) -> VmConfig:
        """The guest that runs so."""
        if self.window_share is None:
            return dataclasses.replace(config, track=self.track, visible=self.visible)
        window = config.memory_bytes * self.window_share // 100 // PAGE_BYTES * PAGE_BYTES
        return dataclasses.replace(
            config,
            datapath=DataPath.INLINE,
            track=self.track,
            window_bytes=window,
            algorithm=Algorithm.AES_XTS_128_INTEGRITY if self.integrity else config.algorithm,
        )


CONFIGURATIONS: Final = {
    PLAIN: Configuration(again=True),
    "pages": Configuration(Track.PAGES),
    "stores": Configuration(Track.STORES),
    "stores+pages": Configuration(Track.STORES_AND_PAGES),
    INLINE: Configuration(window_share=25),
    "inline 6%": Configuration(window_share=6),
    INTEGRITY: Configuration(window_share=25, integrity=True),
    FITS: Configuration(window_share=50, again=True),
    INVISIBLE: Configuration(Track.STORES_AND_PAGES, qemu11=True),
    VISIBLE: Configuration(Track.STORES_AND_PAGES, qemu11=True, visible=True),
}
RATIO_TARGETS: Final = {"pages": 1.10, "stores+pages": 1.35, INLINE: 1.35, "inline 6%": 1.8}
BOOT_TARGET: Final = 1.4
BOOT_TARGET_FOR: Final = ("stores+pages", INLINE)
START_TARGET_S: Final = 2.0
WARM_TARGET: Final = 1.05
INTEGRITY_TARGET: Final = 1.5
VISIBLE_TARGET: Final = 1.03
FAULT_TARGET_US: Final = 40.0
XTS_TARGET: Final = 0.2
REKEY_TARGET_GB_PER_S: Final = 0.5
CALL_TARGET_MS: Final = 1.0
ENGINE_MEMORY_BASE_BYTES: Final = 96 << 20
ENGINE_MEMORY_SHARE: Final = 32
XTS_BATCH_BYTES: Final = 512 << 10
REKEY_BYTES: Final = 256 << 20
_REKEY_ROUNDS: Final = 6
_CALL_ROUNDS: Final = 1000
_XTS_ROUNDS: Final = 200
_OPENSSL_BLOCK_BYTES: Final = 4096
# "AES-128-XTS   11713000.45k": thousands of bytes a second
_OPENSSL_RATE: Final = re.compile(r"^AES-128-XTS\s+([\d.]+)k\s*$", re.M | re.I)


@dataclass(frozen=True, slots=True)
class Target:
    """A figure to reach.

    Attributes:
        limit: the most (or for `at_least` the least) that it may be.
    """

    name: str
    value: float
    limit: float
    at_least: bool
    met: bool


@dataclass(frozen=True, slots=True)
class ConfigurationReport:
    """One configuration's rounds.

    Attributes:
        boot_s, workload_s: seconds, one a round; the boot is up to the guest's shell.
        start_s: from the request to the guest's first output, median.
        boot_ratio: median of `boot_s` over that of plain.
        guest_s: median of boot and workload together.
        ratio: `guest_s` over that of plain.
        again_s: its workload run once more, median; None if it was not.
        engine_cpu_share: the engine's processor time over the guest's time, median.
        engine_memory: at the end of the last round.
    """

    name: str
    boot_s: tuple[float, ...]
    workload_s: tuple[float, ...]
    start_s: float
    boot_ratio: float
    guest_s: float
    ratio: float
    again_s: float | None
    engine_cpu_share: float | None
    engine_memory: Memory | None
    traffic: Traffic | None
    paging: Paging | None


@dataclass(frozen=True, slots=True)
class XtsReport:
    """The engine's XTS beside OpenSSL's own.

    Attributes:
        batch_bytes: bytes a batch, in 64-byte data units.
        engine_bytes_per_s: encrypting batch after batch, median.
        openssl_bytes_per_s: ``openssl speed -evp aes-128-xts`` with 4096-byte data units.
    """

    batch_bytes: int
    engine_bytes_per_s: float
    openssl_bytes_per_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the engine takes for a request over its socket, medians.

    Attributes:
        rekey_bytes: pages given from one KeyID to another, every line of them written.
        rekey_bytes_per_s: how fast.
        rdmsr_s: one RDMSR.
        wrmsr_s: one WRMSR, of the locked IA32_TME_ACTIVATE.
        pconfig_s: one PCONFIG, SET_KEY_RANDOM.
    """

    rekey_bytes: int
    rekey_bytes_per_s: float
    rdmsr_s: float
    wrmsr_s: float
    pconfig_s: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """The document of `mktme bench`."""

    schema: Literal["mktme.bench"]
    version: Literal[1]
    environment: Environment
    rounds: int
    memory_bytes: int
    configurations: tuple[ConfigurationReport, ...]
    xts: XtsReport
    engine: EngineReport
    targets: tuple[Target, ...]


@dataclass(slots=True)
class _Rounds:
    start_s: list[float] = dataclasses.field(default_factory=list)
    boot_s: list[float] = dataclasses.field(default_factory=list)
    workload_s: list[float] = dataclasses.field(default_factory=list)
    again_s: list[float] = dataclasses.field(default_factory=list)
    cpu_share: list[float] = dataclasses.field(default_factory=list)
    memory: Memory | None = None
    traffic: Traffic | None = None
    paging: Paging | None = None

    def guest_s(self) -> float:
        return statistics.median(map(sum, zip(self.boot_s, self.workload_s, strict=True)))


def bench(
    config: VmConfig, rounds: int, narrator: Narrator, only: Collection[str] = ()
) -> BenchReport:
    """Measure configurations `rounds` times, and the cipher beside OpenSSL.

    Args:
        config: the guest, but for how it runs.
        rounds: how often each takes its turn.
        narrator: tells what is going on.
        only: names of configurations; none for all. Plain QEMU is always there to compare with.
    """
    names = [name for name in CONFIGURATIONS if not only or name in only or name == PLAIN]
    if not only:
        names = _without_qemu11(names, narrator)
    measured = {name: _Rounds() for name in names}
    with narrator.step("XTS beside openssl speed"):
        xts = measure_xts()
    with narrator.step("the engine's requests"):
        engine = measure_engine()
    for number in range(rounds):
        for name in names:
            with narrator.step(f"round {number + 1} of {rounds}: {name}"):
                found = _measure(config, CONFIGURATIONS[name], measured[name], narrator)
                if name == PLAIN:
                    described = found
        names.append(names.pop(0))  # no configuration is always the first, or after the same one
    plain = measured[PLAIN].guest_s()
    plain_boot = statistics.median(measured[PLAIN].boot_s)
    reports = tuple(
        ConfigurationReport(
            name=name,
            boot_s=tuple(one.boot_s),
            workload_s=tuple(one.workload_s),
            start_s=statistics.median(one.start_s),
            boot_ratio=statistics.median(one.boot_s) / plain_boot,
            guest_s=one.guest_s(),
            ratio=one.guest_s() / plain,
            again_s=statistics.median(one.again_s) if one.again_s else None,
            engine_cpu_share=statistics.median(one.cpu_share) if one.cpu_share else None,
            engine_memory=one.memory,
            traffic=one.traffic,
            paging=one.paging,
        )
        for name, one in measured.items()
    )
    return BenchReport(
        schema="mktme.bench",
        version=1,
        environment=described,
        rounds=rounds,
        memory_bytes=config.memory_bytes,
        configurations=reports,
        xts=xts,
        engine=engine,
        targets=_targets(reports, xts, engine, config),
    )


def _without_qemu11(names: list[str], narrator: Narrator) -> list[str]:
    """Leave out what needs QEMU 11 if there is none; who asks for it by name is told so."""
    try:
        emulator_path(QEMU11)
    except EnvironmentUnfitError as error:
        narrator.notice(f"left out what is on QEMU 11: {error}")
        return [name for name in names if not CONFIGURATIONS[name].qemu11]
    return names


def _measure(
    config: VmConfig, configuration: Configuration, rounds: _Rounds, narrator: Narrator
) -> Environment:
    """One round of one configuration, on a platform of its own."""
    platform = Platform(
        region_bytes(config.memory_bytes),
        config=visible_platform(None) if configuration.visible else None,
        emulator=emulator_path(QEMU11) if configuration.qemu11 else None,
        notice=narrator.notice,
    )
    with ExitStack() as stack:
        stack.enter_context(platform)
        asked = time.monotonic()
        vm = stack.enter_context(platform.launch(configuration.apply(config)))
        up = time.monotonic()
        equip(vm)
        booted = time.monotonic()
        run_workload(vm.domain.shell)
        ended = time.monotonic()
        rounds.start_s.append((vm.domain.console.heard_at or up) - asked)
        rounds.boot_s.append(up - vm.domain.started)
        rounds.workload_s.append(ended - booted)
        if not vm.config.plain:
            status = platform.engine.status()
            rounds.cpu_share.append(status.cpu_s / (ended - vm.domain.started))
        if configuration.again:
            before = time.monotonic()
            run_workload(vm.domain.shell)
            rounds.again_s.append(time.monotonic() - before)
        if not vm.config.plain:
            rounds.memory = platform.engine.status().memory
            rounds.traffic = vm.status().traffic
            rounds.paging = vm.status().paging
        return environment(platform.host, config.image)


def measure_xts() -> XtsReport:
    """Encrypt 512 KiB batches of lines, and ask OpenSSL for its own speed."""
    keys = KeyTable()
    keys.draw_tme_key(Algorithm.AES_XTS_128)
    keys.activate(keyid_bits=0)
    cipher = keys.cipher(0)
    if cipher is None:
        raise AssertionError("KeyID 0 has a cipher once TME is active")
    count = XTS_BATCH_BYTES // LINE_BYTES
    lines = np.random.default_rng(1).integers(0, 1 << 63, size=(count, 8), dtype=np.uint64)
    addresses = np.arange(count, dtype=np.uint64) * np.uint64(LINE_BYTES)
    out = np.empty_like(lines)
    times = []
    for _ in range(_XTS_ROUNDS):
        started = time.perf_counter()
        cipher.encrypt_lines(lines, addresses, out=out)
        times.append(time.perf_counter() - started)
    engine = XTS_BATCH_BYTES / statistics.median(times)
    openssl = _openssl_speed()
    return XtsReport(XTS_BATCH_BYTES, engine, openssl, engine / openssl)


def measure_engine() -> EngineReport:
    """Ask an engine of its own for what a hypervisor asks most often, and have pages re-keyed."""
    vm = uuid.uuid4()
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="bench-", dir=process_dir()))
        stack.callback(shutil.rmtree, directory)
        dram = directory / "dram.img"
        engine = stack.enter_context(EngineProcess(directory, dram, REKEY_BYTES)).client
        rdmsr_s = _median_time(lambda: engine.rdmsr(IA32_TME_ACTIVATE), _CALL_ROUNDS)
        wrmsr_s = _median_time(lambda: engine.wrmsr(IA32_TME_ACTIVATE, 0), _CALL_ROUNDS)
        program = encode(1, Command.SET_KEY_RANDOM, Algorithm.AES_XTS_128)
        pconfig_s = _median_time(lambda: engine.pconfig(program), _CALL_ROUNDS)
        engine.add_vm(
            vm,
            name="bench",
            memory_bytes=REKEY_BYTES,
            track=Track.PAGES,
            algorithm=Algorithm.AES_XTS_128,
            mode=KeyMode.RANDOM,
        )
        with dram.open("r+b") as image:  # any bytes are some plaintext's ciphertext
            noise = np.random.default_rng(1).bytes(XTS_BATCH_BYTES)
            for _ in range(REKEY_BYTES // len(noise)):
                image.write(noise)
        keyids = itertools.cycle((0, None))
        rekey_s = _median_time(
            lambda: engine.assign_pages(vm, 0, REKEY_BYTES, next(keyids)), _REKEY_ROUNDS
        )
    return EngineReport(REKEY_BYTES, REKEY_BYTES / rekey_s, rdmsr_s, wrmsr_s, pconfig_s)


def _median_time(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _openssl_speed() -> float:
    """What ``openssl speed`` says of AES-128-XTS, bytes a second."""
    if shutil.which("openssl") is None:
        raise EnvironmentUnfitError("the openssl command is not installed", hint="make setup")
    command = ["openssl", "speed", "-elapsed", "-seconds", "1"]
    command += ["-bytes", str(_OPENSSL_BLOCK_BYTES), "-evp", "aes-128-xts"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    rate = _OPENSSL_RATE.search(answer.stdout)
    if rate is None:
        raise EnvironmentUnfitError(f"'{' '.join(command)}' did not give a rate")
    return float(rate[1]) * 1000


def _targets(
    reports: tuple[ConfigurationReport, ...],
    xts: XtsReport,
    engine: EngineReport,
    config: VmConfig,
) -> tuple[Target, ...]:
    if isinstance(config.image, DiskImage):
        targets = [
            _at_most(f"{report.name}: boot to ssh over plain", report.boot_ratio, BOOT_TARGET)
            for report in reports
            if report.name in BOOT_TARGET_FOR
        ]
        targets += [
            _at_most(f"{report.name}: start to first output in s", report.start_s, START_TARGET_S)
            for report in reports
        ]
    else:
        targets = [
            _at_most(
                f"{report.name}: guest time over plain", report.ratio, RATIO_TARGETS[report.name]
            )
            for report in reports
            if report.name in RATIO_TARGETS
        ]
    targets += [
        _at_least("XTS over openssl speed", xts.ratio, XTS_TARGET),
        _at_least("re-keying in GB/s", engine.rekey_bytes_per_s / 1e9, REKEY_TARGET_GB_PER_S),
        _at_most("RDMSR over the socket in ms", engine.rdmsr_s * 1e3, CALL_TARGET_MS),
        _at_most("WRMSR over the socket in ms", engine.wrmsr_s * 1e3, CALL_TARGET_MS),
        _at_most("PCONFIG over the socket in ms", engine.pconfig_s * 1e3, CALL_TARGET_MS),
    ]
    by_name = {report.name: report for report in reports}
    inline, integrity = by_name.get(INLINE), by_name.get(INTEGRITY)
    if inline is not None and integrity is not None:
        ratio = integrity.guest_s / inline.guest_s
        targets.append(_at_most(f"{INTEGRITY}: guest time over {INLINE}", ratio, INTEGRITY_TARGET))
    visible, invisible = by_name.get(VISIBLE), by_name.get(INVISIBLE)
    if visible is not None and invisible is not None:
        ratio = visible.guest_s / invisible.guest_s
        targets.append(_at_most(f"{VISIBLE}: guest time over {INVISIBLE}", ratio, VISIBLE_TARGET))
    warm, plain = by_name.get(FITS), by_name[PLAIN]
    if warm is not None and warm.again_s is not None and plain.again_s is not None:
        ratio = warm.again_s / plain.again_s
        targets.append(_at_most(f"{FITS}, warm: workload over plain", ratio, WARM_TARGET))
    if inline is not None and inline.paging and inline.paging.fault_median_s is not None:
        median_us = inline.paging.fault_median_s * 1e6
        targets.append(
            _at_most(f"{INLINE}: fault service, median in µs", median_us, FAULT_TARGET_US)
        )
    for report in reports:
        if report.engine_memory is not None:
            limit = ENGINE_MEMORY_BASE_BYTES + config.memory_bytes // ENGINE_MEMORY_SHARE
            name = f"{report.name}: engine's peak memory in MiB"
            targets.append(_at_most(name, report.engine_memory.peak / 2**20, limit / 2**20))
    return tuple(targets)


def _at_most(name: str, value: float, limit: float) -> Target:
    return Target(name, value, limit, False, value <= limit)


def _at_least(name: str, value: float, limit: float) -> Target:
    return Target(name, value, limit, True, value >= limit)
