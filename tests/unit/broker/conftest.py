# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the broker's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mktme.broker.broker import Broker

from ..attest.signing import Platform
from .setting import Setting


@pytest.fixture(scope="session")
def platform() -> Platform:
    """The platform that alice trusts; its identity is good at `signing.NOW`."""
    return Platform()


@pytest.fixture(scope="session")
def foreign() -> Platform:
    """A platform just as good, that alice knows nothing of."""
    return Platform()


@pytest.fixture
def setting(tmp_path: Path, platform: Platform) -> Setting:
    return Setting.make(tmp_path / "broker", platform)


@pytest.fixture
def broker(setting: Setting) -> Iterator[Broker]:
    broker = setting.open()
    yield broker
    broker.close()
