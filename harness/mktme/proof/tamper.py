# SPDX-License-Identifier: GPL-2.0-or-later
"""The tamper suite: attacks on live guests, and what came of each without and with integrity.

All guests are `inline`: DRAM is their memory, so what is done to it is what they get. What they
get, they say themselves, on their consoles. Where a machine check is to come, it is the unmodified
kernel that has to report it, and the host's record has to name the line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Literal

from mktme.datapath.kinds import DataPath
from mktme.datapath.window import Policy
from mktme.engine.errors import IntegrityError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import PAGE_BYTES, Algorithm
from mktme.proof.attacks import ATTACKS, Attack, Scene
from mktme.proof.confidentiality import Canary
from mktme.proof.damage import Damage, Outcome, Written, classify
from mktme.proof.dimms import Dimms, Stored
from mktme.proof.eviction import check_window
from mktme.proof.report import Environment, environment
from mktme.proof.runs import Narrator
from mktme.proof.victim import MachineCheck, Victim
from mktme.service.client import EngineRefusedError
from mktme.vm.config import VmConfig, region_bytes
from mktme.vm.host import UsageError
from mktme.vm.platform import Platform

WITHOUT: Final = Algorithm.AES_XTS_128
WITH_INTEGRITY: Final = Algorithm.AES_XTS_128_INTEGRITY
_GUESTS: Final = ("alice", "bob")
# A guest and its engine take turns: with two jobs two processors are busy.
_JOBS_AT_ONCE: Final = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of an attack, on guests of one kind.

    Attributes:
        passed: whether it is what was expected.
        detail: why it is not, or more about it.
        machine_checks: bad lines that the host recorded, and what the guests said of them.
    """

    expected: Outcome
    found: Outcome
    passed: bool
    detail: str
    machine_checks: tuple[MachineCheck, ...]


@dataclass(frozen=True, slots=True)
class AttackReport:
    """A row of the table; the first four as in `mktme.proof.attacks.Attack`."""

    name: str
    action: str
    remark: str | None
    control: bool
    without: Finding
    with_integrity: Finding
    passed: bool


@dataclass(frozen=True, slots=True)
class TamperReport:
    """The document of `mktme tamper`.

    Attributes:
        started: UTC, ISO 8601.
        without, with_integrity: the guests' algorithms.
    """

    schema: Literal["mktme.tamper"]
    version: Literal[1]
    started: str
    duration_s: float
    passed: bool
    environment: Environment
    memory_bytes: int
    window_bytes: int
    without: Algorithm
    with_integrity: Algorithm
    attacks: tuple[AttackReport, ...]
    notices: tuple[str, ...]


def tamper(
    config: VmConfig,
    narrator: Narrator,
    *,
    attacks: Sequence[Attack] = ATTACKS,
    connect: str | None = None,
) -> TamperReport:
    """Attack live guests in every way, without and with integrity.

    Args:
        config: the guests', `inline` and with a window; their algorithm, key and policy are not
            looked at.
        narrator: is told what goes on.
        attacks: which.
        connect: a libvirt URI in place of the embedded driver.

    Raises:
        UsageError: the guests cannot be attacked.
        MktmeError: the run itself failed.
    """
    if config.datapath is not DataPath.INLINE or config.window_bytes is None:
        raise UsageError("what happens to DRAM does not reach a guest without a window")
    check_window(config.window_bytes, config.memory_bytes)
    suite = _Suite(config, narrator, connect)
    started, before = datetime.datetime.now(datetime.UTC), time.monotonic()
    findings = suite.run(attacks)
    rows = tuple(
        AttackReport(
            name=attack.name,
            action=attack.action,
            remark=attack.remark,
            control=attack.control,
            without=(without := findings[attack.name, False]),
            with_integrity=(with_integrity := findings[attack.name, True]),
            passed=without.passed and with_integrity.passed,
        )
        for attack in attacks
    )
    return TamperReport(
        schema="mktme.tamper",
        version=1,
        started=started.isoformat(timespec="seconds"),
        duration_s=time.monotonic() - before,
        passed=all(row.passed for row in rows),
        environment=suite.environment(),
        memory_bytes=config.memory_bytes,
        window_bytes=config.window_bytes,
        without=WITHOUT,
        with_integrity=WITH_INTEGRITY,
        attacks=rows,
        notices=tuple(suite.notices),
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """Attacks that follow each other on one platform."""

    attacks: tuple[Attack, ...]
    integrity: bool


def _jobs(attacks: Sequence[Attack]) -> list[_Job]:
    """Split attacks into jobs, the longest first.

    To boot a guest takes longer than to attack it. So attacks share guests as long as these last;
    with integrity, each attack that ends a single guest is a job.
    """
    single = [one for one in attacks if one.ends_guests and one.guests == 1]
    shared = sorted((one for one in attacks if one not in single), key=lambda one: one.ends_guests)
    jobs = [_Job(tuple(attacks), integrity=False), _Job(tuple(shared), integrity=True)]
    jobs += [_Job((one,), integrity=True) for one in single]
    return [one for one in jobs if one.attacks]


class _Suite:
    """One run of the suite."""

    def __init__(self, config: VmConfig, narrator: Narrator, connect: str | None) -> None:
        self._config = config
        self._narrator = narrator
        self._connect = connect
        self._lock = threading.Lock()
        self._platforms: list[Platform] = []
        self._aborted = False
        self._environment: Environment | None = None
        self.notices: list[str] = []

    def run(self, attacks: Sequence[Attack]) -> dict[tuple[str, bool], Finding]:
        """Run all attacks, some at once: what came of each, by name and with integrity or not."""
        found: dict[tuple[str, bool], Finding] = {}
        with ThreadPoolExecutor(_JOBS_AT_ONCE) as pool:
            try:
                futures = [pool.submit(self._run, job) for job in _jobs(attacks)]
                for future in futures:
                    found |= future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._abort()
                raise
        return found

    def environment(self) -> Environment:
        """What it ran on and with."""
        assert self._environment is not None
        return self._environment

    def _run(self, job: _Job) -> dict[tuple[str, bool], Finding]:
        algorithm = WITH_INTEGRITY if job.integrity else WITHOUT
        config = dataclasses.replace(
            self._config,
            algorithm=algorithm,
            mode=KeyMode.RANDOM,
            key_file=None,
            # Any page goes when the window is full. Better policies keep one that is in use.
            policy=Policy.FIFO,
        )
        guests = max(attack.guests for attack in job.attacks)
        with self._platform(guests) as platform, ExitStack() as stack:
            stage = _Stage(platform, config, self._narrator, stack)
            return {
                (attack.name, job.integrity): stage.attempt(attack, job.integrity)
                for attack in job.attacks
            }

    @contextlib.contextmanager
    def _platform(self, guests: int) -> Iterator[Platform]:
        dram_bytes = guests * region_bytes(self._config.memory_bytes)
        with Platform(dram_bytes, connect=self._connect, notice=self._note) as platform:
            with self._lock:
                self._platforms.append(platform)
                if self._environment is None:
                    self._environment = environment(platform.host, self._config.image)
                if self._aborted:
                    platform.abort()
            yield platform

    def _abort(self) -> None:
        """Take all guests down, so that whoever waits for one ends."""
        with self._lock:
            self._aborted = True
            platforms = tuple(self._platforms)
        for platform in platforms:
            platform.abort()

    def _note(self, line: str) -> None:
        self.notices.append(line)
        self._narrator.notice(line)


class _Stage:
    """Guests of one kind on a platform; those that an attack ended are replaced."""

    def __init__(
        self, platform: Platform, config: VmConfig, narrator: Narrator, stack: ExitStack
    ) -> None:
        self._platform = platform
        self._config = config
        self._narrator = narrator
        self._stack = stack
        self._victims: dict[str, tuple[Victim, ExitStack]] = {}
        self._kind = "with integrity" if config.algorithm.has_integrity else "without integrity"

    def attempt(self, attack: Attack, integrity: bool) -> Finding:
        """Make one attack, and find out what comes of it."""
        victims = [self._victim(name) for name in _GUESTS[: attack.guests]]
        with self._narrator.step(f"{self._kind}: {attack.name}"):
            own = Canary.random().page
            read = self._strike(attack, victims, own)
            looks = [
                victim.look(
                    attack.lines if read is None else 0,
                    (own, *(other.page for other in victims if other is not victim)),
                )
                for victim in victims
            ]
        damage = _in_one([damage for damage, _ in looks])
        if read is not None and damage.outcome is Outcome.INTACT:
            damage = read
        expected = attack.expected(integrity)
        return Finding(
            expected=expected,
            found=damage.outcome,
            passed=damage.outcome is expected,
            detail=damage.detail,
            machine_checks=tuple(told for _, told in looks if told is not None),
        )

    def _strike(self, attack: Attack, victims: Sequence[Victim], own: bytes) -> Damage | None:
        """Do it, to guests that are held; what the attacker reads, if it is about that."""
        dimms, engine = Dimms(self._platform.dram_path), self._platform.engine
        recorded: Stored | None = None
        for victim in victims:
            victim.write(again=attack.needs_history)
            if attack.needs_history:
                with victim.held_out_of_window():
                    recorded = dimms.get(victim.address, PAGE_BYTES)
                victim.write_again()
        keyid = engine.program_key(KeyMode.RANDOM, self._config.algorithm)
        try:
            with ExitStack() as holds:
                for victim in victims:
                    holds.enter_context(victim.held_out_of_window())
                pages = tuple(victim.address for victim in victims)
                scene = Scene(dimms, engine, keyid, pages, recorded, own)
                try:
                    read = attack.strike(scene)
                except EngineRefusedError as error:
                    if error.error != IntegrityError.__name__:
                        raise
                    return Damage(Outcome.REFUSED, str(error))
        finally:
            engine.clear_key(keyid)
        if read is None:
            return None
        return classify(read, Written(victims[0].page, None, (own,)), attack.lines)

    def _victim(self, name: str) -> Victim:
        """The guest of that name, booted unless it is there."""
        if name in self._victims:
            victim, life = self._victims[name]
            if not victim.is_lost:
                return victim
            life.close()
        life = self._stack.enter_context(ExitStack())
        with self._narrator.step(f"{self._kind}: booting {name}"):
            victim = Victim(
                self._platform, life.enter_context(self._platform.launch(self._config, name))
            )
        self._victims[name] = victim, life
        return victim


def _in_one(damages: Sequence[Damage]) -> Damage:
    """What became of several guests' pages, which is to be the same."""
    outcomes = {damage.outcome for damage in damages}
    details = "; ".join(damage.detail for damage in damages if damage.detail)
    if len(outcomes) == 1:
        return Damage(outcomes.pop(), details)
    named = ", ".join(damage.outcome.value for damage in damages)
    return Damage(
        Outcome.OTHER, f"{named} in different guests" + (f": {details}" if details else "")
    )
