# SPDX-License-Identifier: GPL-2.0-or-later
"""Write tracking: what this kernel gives, and what an older one or a filter refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mktme.datapath import pages, uffd
from mktme.datapath.uffd import WriteTrackingError, open_write_tracking, require_write_tracking


def test_this_kernel_tracks_writes() -> None:
    require_write_tracking()


def test_kernel_without_asynchronous_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a kernel, a feature that came later is an unknown bit: this one is unknown to all."""
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(uffd, "FEATURE_WP_ASYNC", 1 << 62)
    with pytest.raises(WriteTrackingError, match="no asynchronous write tracking") as caught:
        open_write_tracking()
    assert caught.value.hint is not None
    assert "6.7" in caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == before


def test_kernel_without_pagemap_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ioctl that came later is an unknown number to a kernel."""
    monkeypatch.setattr(pages, "PAGEMAP_SCAN", 0xC06066FF)
    with pytest.raises(WriteTrackingError, match="no PAGEMAP_SCAN"):
        require_write_tracking()


def test_tracking_needs_no_access_to_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(uffd, "DEVICE", tmp_path / "none")
    require_write_tracking()


def test_no_permission_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uffd, "DEVICE", tmp_path / "none")
    monkeypatch.setattr(uffd, "_SYSCALL_NUMBER", 1 << 20)  # fails, as under a filter
    with pytest.raises(WriteTrackingError, match=os.strerror(errno.ENOSYS)) as caught:
        open_write_tracking()
    assert caught.value.hint == f"sudo setfacl -m u:$USER:rw {tmp_path / 'none'}"
