# SPDX-License-Identifier: GPL-2.0-or-later
"""The document of `mktme broker list --json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mktme.broker.store import Contents, Kind


@dataclass(frozen=True, slots=True)
class BrokerRow:
    """What may be told of a row.

    Attributes:
        tenant: whose it is.
        kind: what it is.
        name: of a resource, REPOSITORY/TYPE/TAG.
        version: the generation that it came with.
        policy: which one a resource needs.
        vm: which VM alone may have it.
        size_bytes: of the document or secret.
    """

    tenant: str
    kind: Literal["policy", "reference", "trust", "resource"]
    name: str
    version: int
    policy: str | None
    vm: str | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class BrokerListing:
    """The document.

    Attributes:
        generation: of the store.
        rows: by tenant, kind and name.
    """

    schema: Literal["mktme.broker-list"]
    version: Literal[1]
    generation: int
    rows: tuple[BrokerRow, ...]


def describe(contents: Contents) -> BrokerListing:
    """What a store has, and no secret of it."""
    kinds = list(Kind)
    order = sorted(
        contents.rows.values(), key=lambda row: (row.tenant, kinds.index(row.kind), row.name)
    )
    rows = []
    for row in order:
        terms = row.release if row.kind is Kind.RESOURCE else None
        rows.append(
            BrokerRow(
                row.tenant,
                row.kind.value,
                row.name,
                row.version,
                None if terms is None else terms.policy,
                None if terms is None else terms.vm,
                row.size_bytes,
            )
        )
    return BrokerListing("mktme.broker-list", 1, contents.generation, tuple(rows))
