# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that works while it moves to another host, and what is proven of it on both.

Here its key is a known one, so that this host can try it, afterwards, on what the other's DRAM
holds of the same page: a read with the wrong key, whose control is the right one.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Literal

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.confidentiality import BLOCK_BYTES, Canary
from mktme.proof.demand import run_demand
from mktme.proof.held import HeldProof, prove_held
from mktme.proof.report import Check, Environment, environment
from mktme.proof.runs import Narrator, throw_away_key
from mktme.proof.transparency import WORKLOAD_TIMEOUT_S
from mktme.remote import RemotePlatform, check_can_move
from mktme.vm.arrival import Side
from mktme.vm.config import VmConfig
from mktme.vm.migration import Migration, MigrationReport
from mktme.vm.platform import Platform
from mktme.vm.shell import Shell

NAME: Final = "guest1"
_TIMEOUT_S: Final = 60.0
_SUM: Final = re.compile(r"^@mktme sum (\S+) ([0-9a-f]+)$", re.M)
# Round after round, each of which checks itself, until it is told to stop or a round fails.
_WORK: Final = (
    "(until [ -e /run/stop ]; do workload || break; echo @mktme round; done"
    " >/run/work 2>&1; echo >/run/stopped) & echo"
)
_BEGUN: Final = "while ! grep -q '@mktme sum' /run/work; do sleep 1; done"
_RESULT: Final = ": >/run/stop; while ! [ -s /run/stopped ]; do sleep 1; done; cat /run/work"


@dataclass(frozen=True, slots=True)
class Work:
    """What a guest computed all the time.

    Attributes:
        rounds: how often it came to the end.
        parts: results in all; a round has one of each name.
        names: of results.
        failed: what it found wrong itself, in its words.
    """

    rounds: int
    parts: int
    names: tuple[str, ...]
    failed: str | None

    @property
    def passed(self) -> bool:
        """Whether all that it computed was right, and it computed anything."""
        whole = self.parts == self.rounds * len(self.names)
        return self.failed is None and self.rounds > 0 and whole


@dataclass(frozen=True, slots=True)
class MoveReport:
    """The document of `mktme migrate`.

    Attributes:
        started: UTC, ISO 8601.
        environment: this host's.
        destination: the other's.
        track: here; there, the host may fall back from it.
        migration: what the move took.
        work: what the guest computed before, while and after it moved.
        here: of the guest before it moved.
        there: of it after.
        notices: what was not as asked for, on either host.
        arguments: the command line, after `mktme`.
    """

    schema: Literal["mktme.migrate"]
    version: Literal[1]
    started: str
    duration_s: float
    passed: bool
    environment: Environment
    destination: Side
    memory_bytes: int
    vcpus: int
    datapath: DataPath
    track: Track | None
    algorithm: Algorithm
    migration: MigrationReport
    work: Work
    here: HeldProof
    there: HeldProof
    checks: tuple[Check, ...]
    notices: tuple[str, ...]
    arguments: tuple[str, ...] = ()


def migrate(
    config: VmConfig,
    destination: str,
    narrator: Narrator,
    *,
    connect: str,
    command: str = "mktme",
    arguments: tuple[str, ...] = (),
) -> MoveReport:
    """Boot a guest, have it work, move it to another host, and prove on both.

    Args:
        config: the guest; on both hosts, but for its key.
        destination: libvirt's URI of the other host (`mktme.remote`).
        narrator: is told of the steps.
        connect: libvirt's URI of this host.
        command: mktme's own on the other host.
        arguments: the command line, for the report.

    Raises:
        MigrationError: the guest did not move, or cannot.
    """
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    notices: list[str] = []

    def note(line: str) -> None:
        notices.append(line)
        narrator.notice(line)

    check_can_move(config)
    demand = run_demand(config.all_bytes, config.algorithm, config.pages, 1)
    remote = RemotePlatform(destination, demand.dram_bytes, command=command, notice=note)
    canary = Canary.random()
    with ExitStack() as stack:
        with narrator.step("starting an engine here"):
            platform = Platform(demand.dram_bytes, connect=connect, notice=note)
            here = stack.enter_context(platform)
            here.side()
        with narrator.step(f"starting one on {remote.host}"):
            there = stack.enter_context(remote)
        key_file = throw_away_key(here.run_dir / "known.key", config)
        known = dataclasses.replace(config, mode=KeyMode.DIRECT, key_file=key_file)
        with narrator.step("booting"):
            vm = stack.enter_context(here.launch(known, NAME))
        shell: Shell = vm.domain.shell
        with narrator.step("proving it here") as progress, vm.domain.explained():
            canary.plant(shell)
            shell.run(_WORK, _TIMEOUT_S)
            shell.run(_BEGUN, WORKLOAD_TIMEOUT_S)
            before = prove_held(here, vm, canary, progress)
        with narrator.step(f"moving to {remote.host}"):
            moved = stack.enter_context(Migration(vm, here, there, config=config))
        with narrator.step("proving it there"):
            after = moved.vm.prove(canary)
        with narrator.step("working"):
            work = work_of(moved.vm.run(_RESULT, WORKLOAD_TIMEOUT_S).output)
        with narrator.step("trying this host's key on that one's DRAM"):
            crossed = _readable(here, vm.config, after, canary)
            own = _readable(here, vm.config, before, canary)
        checks = _checks(remote.host, work, (before, after), (crossed, own))
        return MoveReport(
            schema="mktme.migrate",
            version=1,
            started=started.isoformat(timespec="seconds"),
            duration_s=time.monotonic() - begun,
            passed=all(check.passed for check in checks),
            environment=environment(here.host, config.image),
            destination=there.side(),
            memory_bytes=config.memory_bytes,
            vcpus=config.vcpus,
            datapath=config.datapath,
            track=vm.config.track,
            algorithm=config.algorithm,
            migration=moved.report,
            work=work,
            here=before,
            there=after,
            checks=checks,
            notices=tuple(notices),
            arguments=arguments,
        )


def work_of(said: str) -> Work:
    """What a guest's rounds of work have said."""
    parts = Counter(name for name, _sum in _SUM.findall(said))
    failed = next((line for line in said.splitlines() if "FAILED" in line), None)
    rounds = said.count("@mktme round")
    return Work(rounds, parts.total(), tuple(sorted(parts)), failed)


def _readable(platform: Platform, config: VmConfig, found: HeldProof, canary: Canary) -> int:
    """How many blocks of a canary page a guest's known key makes readable."""
    engine = platform.engine
    keyid = engine.program_key(KeyMode.DIRECT, config.algorithm, key_file=config.key_file)
    try:
        plain = engine.decrypt(keyid, found.address, found.ciphertext).data
    finally:
        engine.clear_key(keyid)
    pairs = zip(_blocks(plain), _blocks(canary.page), strict=True)
    return sum(one == expected for one, expected in pairs)


def _blocks(page: bytes) -> list[bytes]:
    return [page[at : at + BLOCK_BYTES] for at in range(0, len(page), BLOCK_BYTES)]


def _checks(
    host: str, work: Work, proofs: tuple[HeldProof, HeldProof], readable: tuple[int, int]
) -> tuple[Check, ...]:
    places = ("here", f"on {host}")
    crossed, own = readable
    checks = [
        Check(
            "transparency",
            place,
            "DRAM, decrypted, is the guest's RAM",
            False,
            proof.comparison.passed,
            f"{proof.comparison.lines_mismatched:,} of {proof.comparison.lines_compared:,}"
            " lines differ",
        )
        for place, proof in zip(places, proofs, strict=True)
    ]
    computed = f"{work.parts} results right, rounds: {work.rounds}"
    checks.append(
        Check(
            "transparency",
            "all the way",
            "it computes what is known beforehand",
            False,
            work.passed,
            work.failed or computed,
        )
    )
    checks += [
        Check(
            "confidentiality",
            place,
            "what it holds in memory is nowhere in DRAM",
            False,
            proof.search.passed,
            f"{proof.search.dram_hits:,} blocks of the canary in"
            f" {proof.search.dram_bytes_searched / (1 << 20):,.0f} MiB",
        )
        for place, proof in zip(places, proofs, strict=True)
    ]
    blocks = len(proofs[0].ciphertext) // BLOCK_BYTES
    checks.append(
        Check(
            "isolation",
            f"on {host}",
            "its key here does not read its memory there",
            False,
            crossed == 0,
            f"{crossed} of {blocks} blocks readable",
        )
    )
    checks += [
        Check(
            "confidentiality",
            place,
            "the search finds what is in DRAM: ciphertext",
            True,
            proof.ciphertext_hits > 0,
            f"{proof.ciphertext_hits:,} blocks found",
        )
        for place, proof in zip(places, proofs, strict=True)
    ]
    checks.append(
        Check(
            "isolation",
            "here",
            "that key reads its memory here",
            True,
            own == blocks,
            f"{own} of {blocks} blocks readable",
        )
    )
    return tuple(checks)
