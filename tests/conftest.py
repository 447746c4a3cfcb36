# SPDX-License-Identifier: GPL-2.0-or-later
"""How tests are shared out to workers (pytest-xdist, ``--dist loadgroup``)."""

from __future__ import annotations

import os
import signal

import pytest

WORKER_BYTES = 6 << 30
"""What the largest live test takes: a guest of 4 GiB, the engine, DRAM in the page cache."""

SHARED_GUESTS = {"mktme_platform", "mktme_vm", "evidence", "unencrypted"}
"""Fixtures of guests, or of what was made with them, that the tests of a file share."""


def pytest_configure() -> None:
    """Let tests interrupt what they start, also if a shell has us in the background.

    It ignores SIGINT for what it starts there (POSIX, 2.11), and so would all that we start.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, as far as memory goes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // WORKER_BYTES))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests are for one worker, but for live tests that have guests of their own.

    Work is handed out in this order: what takes minutes comes first, and at the end, when one
    worker waits for the other, there are only tests that take no time.
    """
    items.sort(key=_turn)
    for item in items:
        if item.get_closest_marker("xdist_group") is not None:
            continue
        if not _is_live(item) or _shares_guests(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


def _turn(item: pytest.Item) -> int:
    if not _is_live(item):
        return 2
    return 0 if item.get_closest_marker("xdist_group") or _shares_guests(item) else 1


def _is_live(item: pytest.Item) -> bool:
    return item.path.parent.name == "live"


def _shares_guests(item: pytest.Item) -> bool:
    return bool(SHARED_GUESTS & set(getattr(item, "fixturenames", ())))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Each worker looks whether pytest-xdist knows the groups: it tells a test's by its node ID."""
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        if item.get_closest_marker("xdist_group") is not None and "@" not in item.nodeid:
            pytest.exit(f"pytest-xdist has no group for {item.nodeid}", returncode=3)
