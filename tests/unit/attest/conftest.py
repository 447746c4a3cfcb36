# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the attestation tests."""

from __future__ import annotations

import pytest

from .signing import Platform


@pytest.fixture(scope="session")
def platform() -> Platform:
    """A platform; its identity is good at `signing.NOW`."""
    return Platform()
