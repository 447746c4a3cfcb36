# SPDX-License-Identifier: GPL-2.0-or-later
"""The feature table, a test for each row: real guests and devices, on both data paths.

Rows of one guest share it and go in order, so they are for one worker (xdist_group).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mktme.datapath.kinds import DataPath
from mktme.engine.errors import MktmeError
from mktme.proof.features.scenarios import SCENARIOS, Row, Scenario
from mktme.proof.features.subject import SkippedError, Subject

# A boot, or a second one, takes a minute where two share two cores.
pytestmark = pytest.mark.timeout(900)

GUESTS = [(scenario, datapath) for scenario in SCENARIOS for datapath in DataPath]
# The rest is for `make nightly`.
IN_EVERY_RUN = {"devices-inline", "iommu-shadow"}
NAMES = [f"{scenario.name}-{datapath.value}" for scenario, datapath in GUESTS]


def nightly(name: str, row: Row) -> list[pytest.MarkDecorator]:
    return [] if name in IN_EVERY_RUN and not row.nightly else [pytest.mark.nightly]


@pytest.fixture(scope="module")
def booted() -> Iterator[_Booted]:
    """Guests by name, as far as they were booted; of one that was lost, why."""
    with ExitStack() as stack:
        yield _Booted(stack)


class _Booted(dict[str, "Subject | str"]):
    """One guest at a time: the next one ends it."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__()
        self._stack = stack

    def get_or_boot(self, name: str, scenario: Scenario, datapath: DataPath) -> Subject | str:
        if name not in self:
            self._stack.close()
            try:
                self[name] = self._stack.enter_context(scenario.booted(datapath))
            except MktmeError as error:
                self[name] = str(error)
        return self[name]


@pytest.mark.parametrize(
    ("name", "scenario", "datapath", "row"),
    [
        pytest.param(
            name,
            scenario,
            datapath,
            row,
            id=f"{name}-{row.name}",
            marks=[pytest.mark.xdist_group(name), *nightly(name, row)],
        )
        for name, (scenario, datapath) in zip(NAMES, GUESTS, strict=True)
        for row in scenario.rows
    ],
)
def test_feature(
    booted: _Booted, name: str, scenario: Scenario, datapath: DataPath, row: Row
) -> None:
    subject = booted.get_or_boot(name, scenario, datapath)
    if isinstance(subject, str):
        pytest.fail(f"the guest was lost before: {subject}", pytrace=False)
    try:
        assert row.check(subject)
    except SkippedError as error:
        pytest.skip(str(error))
