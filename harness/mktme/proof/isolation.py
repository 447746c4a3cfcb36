# SPDX-License-Identifier: GPL-2.0-or-later
"""Isolation: memory makes sense under its own KeyID and under no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mktme.engine.xts import PAGE_BYTES
from mktme.proof.confidentiality import Canary, find_canary
from mktme.service.client import EngineClient
from mktme.vm.platform import Vm


@dataclass(frozen=True, slots=True)
class Subject:
    """A page that is to be readable under one KeyID only.

    Attributes:
        name: whose it is.
        keyid: what it is under.
        address: where it is in DRAM.
        page: what it holds.
    """

    name: str
    keyid: int
    address: int
    page: bytes


@dataclass(frozen=True, slots=True)
class IsolationMatrix:
    """Which subject's page is readable under which subject's KeyID.

    Attributes:
        names: the subjects, in the order of rows and columns.
        keyids: their KeyIDs.
        readable: row i, column j: the page of subject i is read rightly with the KeyID of j.
    """

    names: tuple[str, ...]
    keyids: tuple[int, ...]
    readable: tuple[tuple[bool, ...], ...]

    def __post_init__(self) -> None:
        """Check that it is a square."""
        if any(len(row) != len(self.names) for row in (self.keyids, self.readable, *self.readable)):
            raise ValueError("an isolation matrix has a row and a column for each name")

    @property
    def passed(self) -> bool:
        """Whether exactly the diagonal is readable, and there is something beside it."""
        return len(self.names) > 1 and all(
            readable == (row == column)
            for row, cells in enumerate(self.readable)
            for column, readable in enumerate(cells)
        )


def isolation_matrix(engine: EngineClient, subjects: Sequence[Subject]) -> IsolationMatrix:
    """Read each subject's page with each subject's KeyID; what it is of must be held."""
    return IsolationMatrix(
        names=tuple(subject.name for subject in subjects),
        keyids=tuple(subject.keyid for subject in subjects),
        readable=tuple(
            tuple(
                engine.read_dram(subject.address, PAGE_BYTES, other.keyid) == subject.page
                for other in subjects
            )
            for subject in subjects
        ),
    )


def canary_subject(vm: Vm, canary: Canary) -> Subject:
    """A held VM's canary page, under the VM's own KeyID."""
    return Subject(vm.name, vm.keyid, vm.base + find_canary(vm, canary), canary.page)
