# SPDX-License-Identifier: GPL-2.0-or-later
"""The schemas that users read are those of the documents that we write."""

from __future__ import annotations

from pathlib import Path

import pytest

from mktme.proof.report import json_schema
from mktme.proof.schema import DOCUMENTS

SCHEMAS = Path(__file__).parents[3] / "docs" / "schema"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documented_schema_is_the_types(name: str) -> None:
    assert (SCHEMAS / name).read_bytes() == json_schema(DOCUMENTS[name]), "run make schema"


def test_every_documented_schema_is_ours() -> None:
    assert {path.name for path in SCHEMAS.iterdir()} == set(DOCUMENTS)
