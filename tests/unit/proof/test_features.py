# SPDX-License-Identifier: GPL-2.0-or-later
"""The feature table: its rows, the document, and what README shows of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from mktme.datapath.kinds import DataPath
from mktme.engine.errors import MktmeError
from mktme.proof.features.scenarios import SCENARIOS, Row, Scenario
from mktme.proof.features.subject import SkippedError, Subject, echo_server, until
from mktme.proof.features.table import (
    FeatureReport,
    Outcome,
    markdown,
    run_features,
    write_readme,
)
from mktme.proof.features.tap import HOST_ADDRESS, multi_queue_tap
from mktme.vm.host import UsageError
from mktme.vm.platform import Platform, Vm

README = Path(__file__).parents[3] / "README.md"
MARKED = "# x\n<!-- features: made by `make features` -->\nold\n<!-- end of features -->\ny\n"


def report(fails: str = "") -> FeatureReport:
    outcomes = tuple(
        Outcome(scenario.name, row.name, path, row.name != fails, "a | b\nc", 0.1)
        for scenario in SCENARIOS
        for path in DataPath
        for row in scenario.rows
    )
    return FeatureReport("mktme.features", 1, not fails, outcomes)


def test_rows_have_names_of_their_own_and_the_last_alone_ends_the_guest() -> None:
    for scenario in SCENARIOS:
        names = [row.name for row in scenario.rows]
        assert len(set(names)) == len(names)
        assert [row.ends for row in scenario.rows[:-1]] == [False] * (len(names) - 1)


def test_each_row_is_in_the_table_once_a_data_path() -> None:
    table = markdown(report())
    rows = sum(len(scenario.rows) for scenario in SCENARIOS)
    assert table.count("| works | works |") == rows
    assert "FAILS" not in table
    assert "a \\| b c" in table


def test_row_that_fails_shows() -> None:
    table = markdown(report(fails="kexec"))
    assert table.count("| kexec | **FAILS** | **FAILS** |") == 1


def test_row_that_was_skipped_shows_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def check(_subject: Subject) -> str:
        raise SkippedError("for root alone")

    @contextlib.contextmanager
    def booted(_scenario: Scenario, _datapath: DataPath) -> Iterator[Subject]:
        yield Subject(cast("Platform", None), cast("Vm", None), tmp_path)

    first = SCENARIOS[0]
    rows = (Row("some", lambda _subject: "found"), Row("of root", check))
    only = dataclasses.replace(first, rows=rows)
    monkeypatch.setattr(Scenario, "booted", booted)
    monkeypatch.setattr("mktme.proof.features.table.SCENARIOS", (only,))
    found = run_features([DataPath.SHADOW, DataPath.INLINE])
    assert found.passed
    assert [one.state for one in found.outcomes] == ["works", "skipped"] * 2
    assert "| of root | skipped | skipped | for root alone |" in markdown(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="a network device is for root to make")
def test_tap_takes_several_queues_and_is_gone_at_the_end() -> None:
    with multi_queue_tap() as device:
        # A device has several queues, or this is refused.
        flags = (Path("/sys/class/net") / device / "tun_flags").read_text()
        assert int(flags, 16) & 0x100
        with (
            echo_server(HOST_ADDRESS) as port,
            socket.create_connection((HOST_ADDRESS, port)) as connection,
        ):
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"
    assert not (Path("/sys/class/net") / device).exists()


def test_tap_that_may_not_be_made_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: object) -> bytes:
        raise PermissionError

    monkeypatch.setattr("fcntl.ioctl", refused)
    with pytest.raises(SkippedError, match="for root"), multi_queue_tap():
        pass


def test_readme_gets_the_table_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    write_readme(report(), readme)
    text = readme.read_text()
    assert text.startswith("# x\n")
    assert text.endswith("<!-- end of features -->\ny\n")
    assert "old" not in text
    write_readme(report(), readme)
    assert readme.read_text() == text


def test_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# x\n")
    with pytest.raises(MktmeError, match="no marks"):
        write_readme(report(), readme)
    assert readme.read_text() == "# x\n"
    with pytest.raises(MktmeError, match="No such file"):
        write_readme(report(), tmp_path / "none")


def test_projects_readme_has_the_rows_that_there_are() -> None:
    text = README.read_text()
    for scenario in SCENARIOS:
        assert f"| {scenario.summary} |" in text
        for row in scenario.rows:
            assert f"| {row.name} |" in text, "make features"


def test_unknown_scenario_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no scenario 'x'"):
        run_features([DataPath.SHADOW], "x")


def test_echo_server_says_what_it_hears() -> None:
    with echo_server() as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def test_waiting_has_an_end() -> None:
    assert until(lambda: True, 0.0)
    assert not until(lambda: False, 0.01)
