# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of the engine process share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mktme.engine.secret import KeyMemory
from mktme.service.client import EngineProcess
from mktme.service.custody import Custody

from ..conftest import DRAM_BYTES

CUSTODY = Custody(
    dumpable=True, core_limit_bytes=0, memory_locked="none", key_memory=KeyMemory.PAGEABLE
)
"""Of an engine within the tests' own process, which is not to be hardened."""


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that the tests of a module share; its control socket takes owners."""
    run_dir = tmp_path_factory.mktemp("engine")
    with EngineProcess(run_dir, run_dir / "dram.img", DRAM_BYTES, shared_ownership=True) as engine:
        yield engine
