# SPDX-License-Identifier: GPL-2.0-or-later
"""The tamper suite on live guests, as a user runs it: one run, of which each row is a test."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from mktme.engine.xts import LINE_BYTES
from mktme.proof.attacks import ATTACKS, Attack
from mktme.proof.damage import Outcome
from mktme.proof.tamper import AttackReport, TamperReport

from .conftest import COMMAND_TIMEOUT_S, Command

pytestmark = [
    pytest.mark.usefixtures("quick_boots"),
    pytest.mark.xdist_group("tamper"),  # a worker each would be a run each
]

# Nine guests boot, two at a time.
takes_long = pytest.mark.timeout(2 * COMMAND_TIMEOUT_S + 60)


@dataclass(frozen=True)
class Run:
    """What a run of the command left."""

    status: int
    out: str
    err: str
    document: bytes
    report: TamperReport

    def row(self, attack: Attack) -> AttackReport:
        (row,) = (one for one in self.report.attacks if one.name == attack.name)
        return row


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    directory = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    command = Command(directory)
    try:
        path = directory / "tamper.json"
        process = command.start("tamper", "--json", str(path))
        out, err = process.communicate(timeout=2 * COMMAND_TIMEOUT_S)
        document = path.read_bytes()
        path.unlink()
        command.assert_nothing_left()
        report = msgspec.json.decode(document, type=TamperReport)
        yield Run(process.returncode, out, err, document, report)
    finally:
        for started in command.started:
            if started.poll() is None:
                started.kill()
                started.communicate()
        shutil.rmtree(directory, ignore_errors=True)


@takes_long
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_what_comes_of_an_attack(run: Run, attack: Attack) -> None:
    row = run.row(attack)
    assert (row.without.found, row.without.detail) == (attack.without, "")
    assert row.without.machine_checks == ()
    assert row.with_integrity.found is attack.with_integrity
    assert row.passed
    told = row.with_integrity.machine_checks
    if attack.with_integrity is not Outcome.MACHINE_CHECK:
        assert told == ()
        return
    # The guest's own word, and the host's: they agree on where it is.
    assert [one.guest for one in told] == ["alice", "bob"][: attack.guests]
    for one in told:
        assert "Fatal machine check" in one.console
        assert one.lines == attack.lines.bit_count()
        assert one.reported == one.guest_physical & ~0xFFF
        first = (attack.lines & -attack.lines).bit_length() - 1
        assert one.address % 4096 == one.guest_physical % 4096 == first * LINE_BYTES


@takes_long
def test_the_run_as_a_whole(run: Run) -> None:
    assert run.status == 0, run.err
    assert run.report.passed
    assert [row.name for row in run.report.attacks] == [attack.name for attack in ATTACKS]
    assert f"passed: {len(ATTACKS)} of {len(ATTACKS)} attacks as expected" in run.out
    plain = json.loads(run.document)
    assert (plain["schema"], plain["version"]) == ("mktme.tamper", 1)
    assert plain["environment"]["qemu"] in run.out
    assert "with integrity: booting alice" in run.err
