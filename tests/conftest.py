# SPDX-License-Identifier: GPL-2.0-or-later
"""How tests are shared out to workers (pytest-xdist, ``--dist loadgroup``)."""

from __future__ import annotations

import os

import pytest

WORKER_BYTES = 6 << 30
"""What the largest live test takes: a guest of 4 GiB, the engine, DRAM in the page cache."""

SHARED_GUESTS = {"mktme_platform", "mktme_vm"}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, as far as memory goes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // WORKER_BYTES))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests are for one worker, but for live tests that have guests of their own."""
    for item in items:
        if item.get_closest_marker("xdist_group") is not None:
            continue
        alone = item.path.parent.name == "live" and not SHARED_GUESTS & set(
            getattr(item, "fixturenames", ())
        )
        if not alone:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Each worker looks whether pytest-xdist knows the groups: it tells a test's by its node ID."""
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        if item.get_closest_marker("xdist_group") is not None and "@" not in item.nodeid:
            pytest.exit(f"pytest-xdist has no group for {item.nodeid}", returncode=3)
