# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages for the tests: of a demo with a DRAM image, and of a run on the inline data path."""

from __future__ import annotations

import numpy as np
import pytest

from mktme.report.dumps import Look, look_at
from mktme.report.page import render

from ..dump.conftest import PAGE, VM_BASE, MakeImage, make_image
from .example import DEMO, INLINE

__all__ = ["make_image"]


@pytest.fixture
def look(make_image: MakeImage) -> Look:
    """At an image with pages under two KeyIDs, of which some hold text."""
    random = np.random.default_rng(1)
    noise, text = random.bytes(8 * PAGE), (b"plain words, " * PAGE)[: 4 * PAGE]
    return look_at(make_image({0: text, VM_BASE: noise, VM_BASE + 32 * PAGE: noise}))


@pytest.fixture(params=["demo", "inline"])
def html(request: pytest.FixtureRequest, look: Look) -> str:
    """A page; each is made once."""
    name: str = request.param
    if name not in _made:
        _made[name] = (render(DEMO, [look]) if name == "demo" else render(INLINE)).decode()
    return _made[name]


_made: dict[str, str] = {}
