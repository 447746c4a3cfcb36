# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole runs: guests booted, worked, held, and looked at from all sides.

`run` is one configuration and its proofs. `demo` is the main job: two guests side by side under
different keys, a plain one to compare with, and the controls that show that each check can fail.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.errors import MktmeError
from mktme.engine.firmware import PlatformConfig
from mktme.engine.keys import KeyMode
from mktme.engine.text import spelled
from mktme.engine.xts import PAGE_BYTES
from mktme.proof.confidentiality import (
    Canary,
    CanarySearch,
    find_canary,
    plant_canary,
    search_dram,
)
from mktme.proof.demand import Demand, demo_demand, mib, run_demand
from mktme.proof.entropy import EntropyComparison, compare_entropy
from mktme.proof.guest_tools import equip
from mktme.proof.isolation import IsolationMatrix, canary_subject, isolation_matrix
from mktme.proof.report import Check, GuestReport, RunReport, environment
from mktme.proof.residency import Residency, sampled
from mktme.proof.timeline import Timeline, recording
from mktme.proof.transparency import MemoryComparison, Progress, compare_memory, run_workload
from mktme.vm.config import VmConfig
from mktme.vm.platform import Platform, Vm

DEMO_GUESTS: Final = ("alice", "bob")
_T = TypeVar("_T")
_ORDER: Final = {"transparency": 0, "confidentiality": 1, "isolation": 2}


class Narrator(Protocol):
    """Tells the user what is going on; the CLI has one with progress bars."""

    def step(self, what: str) -> AbstractContextManager[Progress]:
        """A step that begins now; the progress may be called with (done, all) in it."""
        ...

    def notice(self, line: str) -> None:
        """Something is not as it was asked for."""
        ...


@dataclass(slots=True)
class Guest:
    """A guest of a run, and what was found out about it so far.

    Attributes:
        worked: from when to when its workload ran, by `time.monotonic`.
    """

    vm: Vm
    role: Literal["guest", "control", "plain"]
    boot_s: float
    worked: tuple[float, float] | None
    checksums: dict[str, str]
    residency: Residency | None = None
    comparison: MemoryComparison | None = None
    search: CanarySearch | None = None
    entropy: EntropyComparison | None = None
    timeline: Timeline | None = None

    def report(self) -> GuestReport:
        """For the run's document; the guest must still be there."""
        config = self.vm.config
        plain = config.plain
        status = None if plain else self.vm.status()
        return GuestReport(
            name=self.vm.name,
            role=self.role,
            memory_bytes=config.memory_bytes,
            vcpus=config.vcpus,
            track=config.track,
            algorithm=None if plain else config.algorithm,
            key_mode=None if plain else config.mode,
            keyid=None if plain else self.vm.keyid,
            dram_base=None if plain else self.vm.base,
            boot_s=self.boot_s,
            workload_s=0.0 if self.worked is None else self.worked[1] - self.worked[0],
            checksums=self.checksums,
            datapath=None if plain else config.datapath,
            traffic=None if status is None else status.traffic,
            paging=None if status is None else status.paging,
            residency=self.residency,
            comparison=self.comparison,
            canary=self.search,
            entropy=self.entropy,
            timeline=self.timeline,
        )


@dataclass(slots=True)
class RunOptions:
    """What `run` and `demo` have in common beside the guest's configuration.

    Attributes:
        platform: what firmware sets up; None for the defaults.
        audit: where to append the engine's audit log; None for a file that goes with the run.
        ca: directory of the platform CA that certifies the engine; None for one of its own.
        emulator: another QEMU than this machine's own.
        keep: called when all is proven, with the guests still there.
        look: called with the DRAM image while guests are held, its description beside it, and with
            what they are.
        arguments: the command line, for the report.
    """

    connect: str | None = None
    dram: Path | None = None
    audit: Path | None = None
    ca: Path | None = None
    reference: bool = True
    platform: PlatformConfig | None = None
    emulator: Path | None = None
    keep: Callable[[RunReport, Platform], None] | None = None
    look: Callable[[Path, str], None] | None = None
    arguments: tuple[str, ...] = ()


def run(
    config: VmConfig, narrator: Narrator, *, guests: int = 1, options: RunOptions | None = None
) -> RunReport:
    """Boot `guests` guests of one configuration, each under a key of its own, and prove."""
    names = [f"guest{index + 1}" for index in range(guests)]
    demand = run_demand(config.all_bytes, config.algorithm, config.pages, guests)
    session = _Session("run", narrator, options or RunOptions(), config, demand)
    with session.open():
        session.prove(names, config)
        session.compare_with_plain(config)
        return session.conclude()


def demo(config: VmConfig, narrator: Narrator, options: RunOptions | None = None) -> RunReport:
    """The main job: two guests side by side, all proofs, and each proof's control."""
    demand = demo_demand(config.memory_bytes, config.algorithm)
    session = _Session("demo", narrator, options or RunOptions(), config, demand)
    with session.open():
        session.prove(DEMO_GUESTS, config)
        session.compare_with_plain(config)
        session.controls(config)
        return session.conclude()


class _Session:
    """One run in progress."""

    def __init__(
        self,
        command: Literal["run", "demo"],
        narrator: Narrator,
        options: RunOptions,
        config: VmConfig,
        demand: Demand,
    ) -> None:
        demand.check(options.platform)
        self._command = command
        self._narrator = narrator
        self._options = options
        self._image = config.image
        wired = None if options.platform is None else options.platform.dram
        self._dram_bytes = demand.dram_bytes if wired is None else wired
        self._started = time.monotonic()
        self._checks: list[Check] = []
        self._guests: list[GuestReport] = []
        self._notices: list[str] = []
        self._isolation: IsolationMatrix | None = None
        self._sidecar: Path | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """The platform, for as long as the run takes."""
        started = datetime.datetime.now(datetime.UTC)
        self._started_at = started.isoformat(timespec="seconds")
        with ExitStack() as stack:
            with self._narrator.step("starting the engine and libvirt"):
                platform = Platform(
                    self._dram_bytes,
                    config=self._options.platform,
                    shared_ownership=self._options.keep is not None,
                    dram=self._options.dram,
                    audit=self._options.audit,
                    ca=self._options.ca,
                    connect=self._options.connect,
                    emulator=self._options.emulator,
                    notice=self._note,
                )
                self._platform = stack.enter_context(platform)
            self._kept = stack.enter_context(ExitStack())
            yield

    def compare_with_plain(self, config: VmConfig) -> None:
        """Run the same guest on plain QEMU, and compare what the guests so far computed."""
        if not self._options.reference:
            return
        plain = dataclasses.replace(
            config,
            datapath=DataPath.SHADOW,
            track=None,
            window_bytes=None,
            mode=KeyMode.RANDOM,
            key_file=None,
            pages=(),
            nvdimm=None,
            check_tlb=False,
            hardware=dataclasses.replace(config.hardware, vtpm=False),
            visible=False,
        )
        with ExitStack() as stack:
            reference = self._boot(stack, plain, "plain", "plain").report()
        for guest in self._guests:
            expected = reference.checksums.items()
            same = sum(guest.checksums.get(name) == value for name, value in expected)
            self._check(
                "transparency",
                guest.name,
                "its workload computes what it does on plain QEMU",
                guest.checksums == reference.checksums,
                f"{same} of {len(expected)} checksums equal",
            )
        self._guests.append(reference)

    def prove(self, names: Sequence[str], config: VmConfig) -> None:
        """Boot guests side by side and hold all of them while each proof is made."""
        canary = Canary.random()
        with ExitStack() as stack:
            with ExitStack() as holds:
                guests = self._work_and_hold(
                    holds,
                    (partial(self._boot, stack, config, name, "guest", canary) for name in names),
                )
                for guest in guests:
                    self._compare(guest)
                    self._search(guest, canary)
                    if guest.residency is not None:
                        self._check_bound(guest.vm.name, guest.residency)
                if len(guests) > 1:
                    matrix = isolation_matrix(
                        self._platform.engine,
                        [canary_subject(guest.vm, canary) for guest in guests],
                    )
                    self._isolation = matrix
                    off = sum(map(sum, matrix.readable)) - len(guests)
                    self._check(
                        "isolation",
                        " and ".join(names),
                        "a VM's memory is readable with its own KeyID only",
                        matrix.passed,
                        f"{len(guests)} x {len(guests)} reads, {max(off, 0)} beside the diagonal"
                        " readable",
                    )
                if self._options.dram is not None:
                    self._sidecar = self._platform.engine.write_sidecar()
                self._look(" and ".join(names))
                self._guests += [guest.report() for guest in guests]
            if self._options.keep is not None:
                self._kept.push(stack.pop_all())

    def controls(self, config: VmConfig) -> None:
        """Three cases made to fail, one for each proof; the checks must notice."""
        key_file = throw_away_key(self._platform.run_dir / "control.key", config)
        stores_only = dataclasses.replace(
            config, track=Track.STORES, mode=KeyMode.DIRECT, key_file=key_file
        )
        unencrypted = dataclasses.replace(config, track=Track.PAGES, mode=KeyMode.NO_ENCRYPT)
        canary = Canary.random()
        with ExitStack() as stack, ExitStack() as holds:
            stores, clear = self._work_and_hold(
                holds,
                (
                    partial(self._boot, stack, case, name, "control", canary, works=False)
                    for name, case in (
                        ("stores-only", stores_only),
                        ("no-encrypt", unencrypted),
                    )
                ),
            )
            self._compare(stores, control=True)
            clear.entropy = self._entropy(clear.vm)
            self._search(clear, canary, control=True)
            readable = _readable_with_the_same_key(self._platform, stores.vm, canary)
            self._check(
                "isolation",
                "stores-only",
                "another KeyID given the same key reads the memory",
                readable,
                "readable" if readable else "not readable",
                control=True,
            )
            if self._options.dram is None:  # else its description is of the guests before
                self._look("the controls stores-only and no-encrypt")
            self._guests += [stores.report(), clear.report()]

    def conclude(self) -> RunReport:
        """The run's document, and what is to happen before the guests go."""
        report = self._report()
        if self._options.keep is not None:
            self._options.keep(report, self._platform)
        return report

    def _report(self) -> RunReport:
        dram = self._options.dram
        return RunReport(
            schema="mktme.run",
            version=1,
            command=self._command,
            started=self._started_at,
            duration_s=time.monotonic() - self._started,
            passed=all(check.passed for check in self._checks),
            environment=environment(self._platform.host, self._image),
            guests=tuple(self._guests),
            checks=tuple(sorted(self._checks, key=lambda one: (one.control, _ORDER[one.proof]))),
            isolation=self._isolation,
            engine_memory=self._platform.engine.status().memory,
            dram=None if dram is None else spelled(dram.absolute()),
            sidecar=None if self._sidecar is None else spelled(self._sidecar),
            notices=tuple(self._notices),
            arguments=self._options.arguments,
        )

    def _boot(
        self,
        stack: ExitStack,
        config: VmConfig,
        name: str,
        role: Literal["guest", "control", "plain"],
        canary: Canary | None = None,
        *,
        works: bool = True,
    ) -> Guest:
        residency = None
        with self._narrator.step(f"{name}: booting"):
            vm = stack.enter_context(self._platform.launch(config, name, boot=False))
            if vm.config.window_bytes is not None:
                residency = stack.enter_context(sampled(vm, vm.config.window_bytes))
            vm.domain.boot(config.boot_deadline_s)
            boot_s = time.monotonic() - vm.domain.started
            equip(vm)
        checksums: dict[str, str] = {}
        worked = None
        if works:
            with self._narrator.step(f"{name}: working"), vm.domain.explained():
                before = time.monotonic()
                checksums = run_workload(vm.domain.shell)
                worked = (before, time.monotonic())
        if canary is not None:
            with vm.domain.explained():
                plant_canary(vm, canary)
        return Guest(vm, role, boot_s, worked, checksums, residency)

    def _work_and_hold(self, holds: ExitStack, jobs: Iterable[Callable[[], Guest]]) -> list[Guest]:
        """Guests side by side, then held; their counters are sampled up to the last flush."""
        with recording(self._platform.engine) as recorder:
            guests = self._side_by_side(jobs)
            self._hold(holds, guests)
        for guest in guests:
            vm = guest.vm
            guest.timeline = recorder.timeline(vm.uuid, vm.domain.started, guest.worked)
        return guests

    def _look(self, what: str) -> None:
        if self._options.look is not None:
            with self._narrator.step("taking pictures of DRAM"):
                try:
                    self._platform.engine.write_sidecar()
                    self._options.look(self._platform.dram_path, what)
                except (MktmeError, OSError) as error:  # it is no proof
                    self._note(f"no picture of DRAM: {error}")

    def _entropy(self, vm: Vm) -> EntropyComparison | None:
        """No proof either: a run goes on without it."""
        try:
            return compare_entropy(vm, self._platform.dram_path)
        except (MktmeError, OSError) as error:
            self._note(f"{vm.name}: entropy not compared: {error}")
            return None

    def _side_by_side(self, jobs: Iterable[Callable[[], _T]]) -> list[_T]:
        """Run jobs at once; if one fails or the user interrupts, the others' guests go too."""
        with ThreadPoolExecutor() as pool:
            try:
                futures = [pool.submit(job) for job in jobs]
                return [future.result() for future in futures]
            except BaseException:
                self._platform.abort()
                raise

    def _hold(self, holds: ExitStack, guests: Sequence[Guest]) -> None:
        for guest in guests:
            with self._narrator.step(f"{guest.vm.name}: flushing"):
                self._platform.check(guest.vm)
                holds.enter_context(guest.vm.held())

    def _compare(self, guest: Guest, *, control: bool = False) -> None:
        vm = guest.vm
        with self._narrator.step(f"{vm.name}: comparing DRAM with RAM") as progress:
            found = guest.comparison = compare_memory(vm, vm.require_engine(), progress)
            guest.entropy = self._entropy(vm)
        finding = f"{found.lines_mismatched:,} of {found.lines_compared:,} lines differ"
        if found.lines_mismatched:
            finding += (
                f" ({found.line_marked:,} line marked, {found.page_marked:,} page marked,"
                f" {found.unmarked:,} neither)"
            )
        claim = "DRAM, decrypted, is the guest's RAM"
        if vm.config.datapath is DataPath.INLINE:
            claim = "DRAM, decrypted, is what the window holds"
        if control:
            claim = "tracking stores alone leaves lines behind"
        self._check(
            "transparency",
            vm.name,
            claim,
            found.lines_mismatched > 0 if control else found.passed,
            finding,
            control=control,
        )

    def _check_bound(self, name: str, found: Residency) -> None:
        self._check(
            "confidentiality",
            name,
            "its plaintext in RAM never exceeds the window",
            found.passed,
            f"at most {found.peak_bytes / (1 << 20):.1f} of {found.limit_bytes / (1 << 20):.1f} MiB"
            f" in {found.samples:,} samples",
        )

    def _search(self, guest: Guest, canary: Canary, *, control: bool = False) -> None:
        vm = guest.vm
        with self._narrator.step(f"{vm.name}: searching DRAM for its canary"):
            found = guest.search = search_dram(vm, canary, self._platform.dram_path)
        claim = "what it holds in memory is nowhere in DRAM"
        if control:
            claim = "without encryption the canary is in DRAM"
        finding = (
            f"{found.dram_hits:,} blocks of the canary in"
            f" {found.dram_bytes_searched / (1 << 20):,.0f} MiB"
        )
        if found.clear_bytes:
            finding += f", {mib(found.clear_bytes)} of clear pages aside"
        self._check(
            "confidentiality",
            vm.name,
            claim,
            found.dram_hits > 0 if control else found.passed,
            finding,
            control=control,
        )

    def _check(
        self,
        proof: Literal["transparency", "confidentiality", "isolation"],
        subject: str,
        claim: str,
        passed: bool,
        finding: str,
        *,
        control: bool = False,
    ) -> None:
        self._checks.append(Check(proof, subject, claim, control, passed, finding))

    def _note(self, line: str) -> None:
        self._notices.append(line)
        self._narrator.notice(line)


def throw_away_key(path: Path, config: VmConfig) -> Path:
    """A key file that goes with the run's directory."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(config.algorithm.key_bytes))
    return path


def _readable_with_the_same_key(platform: Platform, vm: Vm, canary: Canary) -> bool:
    """Whether a second KeyID, programmed with the VM's own known key, reads its canary page."""
    address = vm.base + find_canary(vm, canary)
    engine = platform.engine
    twin = engine.program_key(KeyMode.DIRECT, vm.config.algorithm, key_file=vm.config.key_file)
    try:
        return engine.read_dram(address, PAGE_BYTES, twin) == canary.page
    finally:
        engine.clear_key(twin)
