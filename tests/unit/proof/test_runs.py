# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run shows beside its proofs voids none of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mktme.engine.errors import MktmeError
from mktme.proof import runs
from mktme.proof.demand import run_demand
from mktme.proof.runs import RunOptions
from mktme.proof.transparency import Progress
from mktme.vm.config import VmConfig
from mktme.vm.platform import Platform, Vm

from ..vm.test_domain_xml import IMAGE

ERRORS = [MktmeError("engine is busy"), OSError(28, "No space left on device")]


class Told:
    """A narrator that writes down what is noted."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def step(self, _what: str) -> AbstractContextManager[Progress]:
        return nullcontext(lambda _done, _total: None)

    def notice(self, line: str) -> None:
        self.notices.append(line)


def session(told: Told, look: Any = None, write_sidecar: Any = None) -> runs._Session:
    config = VmConfig(IMAGE, memory_bytes=64 << 20)
    demand = run_demand(config.all_bytes, config.algorithm, (), 1)
    made = runs._Session("run", told, RunOptions(look=look), config, demand)
    engine = SimpleNamespace(write_sidecar=write_sidecar or (lambda: None))
    made._platform = cast(Platform, SimpleNamespace(engine=engine, dram_path=Path("/none")))
    return made


@pytest.mark.parametrize("error", ERRORS, ids=["ours", "system"])
@pytest.mark.parametrize("where", ["sidecar", "look"])
def test_picture_that_cannot_be_taken(error: Exception, where: str) -> None:
    def fail(*_: object) -> None:
        raise error

    seen: list[str] = []
    told = Told()
    if where == "sidecar":
        session(told, lambda _path, what: seen.append(what), fail)._look("all guests")
    else:
        session(told, fail)._look("all guests")
    assert seen == []
    assert told.notices == [f"no picture of DRAM: {error}"]
    session(told, lambda _path, what: seen.append(what))._look("all guests")
    assert seen == ["all guests"]
    assert len(told.notices) == 1


@pytest.mark.parametrize("error", ERRORS, ids=["ours", "system"])
def test_entropy_that_cannot_be_compared(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(runs, "compare_entropy", fail)
    told = Told()
    made = session(told)
    assert made._entropy(cast(Vm, SimpleNamespace(name="alice"))) is None
    assert told.notices == made._notices == [f"alice: entropy not compared: {error}"]
