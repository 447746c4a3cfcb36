# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the provisioning tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from mktme.provision.tenants import Deployment
from mktme.provision.tenants_file import deployment

from .bench import Site, write_files

Want: TypeAlias = Callable[..., Deployment]


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_files(tmp_path)
    return tmp_path


@pytest.fixture
def want(files: Path) -> Want:
    """A deployment of VMs of guest tiny, ``alice.web`` by default; arguments change its tables."""

    def make(vms: dict[str, dict[str, Any]] | None = None, **top: Any) -> Deployment:
        tenants: dict[str, Any] = {}
        for name, changes in ({"alice.web": {}} if vms is None else vms).items():
            tenant, vm = name.split(".")
            table = tenants.setdefault(
                tenant, {"policy": "policy.toml", "reference": "reference.json", "vms": {}}
            )
            table["vms"][vm] = {"guest": "tiny", "memory": "256M"} | changes
        return deployment({"name": "bench", "tenants": tenants} | top, files)

    return make
