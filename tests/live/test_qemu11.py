# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU 11 in place of this machine's own: stores of several vCPUs, and proofs on them.

Tests of others run on both, by the fixture `emulator`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mktme.proof.transparency import compare_memory
from mktme.vm.host import QEMU11
from mktme.vm.platform import Platform, Vm

from .conftest import Command


@pytest.fixture(scope="module")
def mktme_emulator() -> str:
    return QEMU11


@pytest.mark.parametrize(
    ("vcpus", "more", "checks"),
    [
        pytest.param(1, (), 3, marks=pytest.mark.nightly),
        (2, ("--guests", "2", "--no-reference"), 5),
    ],
)
@pytest.mark.usefixtures("mktme_platform")  # which skips where there is no QEMU 11
def test_proofs(
    command: Command, tmp_path: Path, vcpus: int, more: tuple[str, ...], checks: int
) -> None:
    path = tmp_path / "run.json"
    words = ("--memory", "256M", "--vcpus", str(vcpus), *more, "--json", str(path))
    status, out, err = command.run("run", "--emulator", QEMU11, *words)
    assert status == 0, err
    assert f"passed: {checks} of {checks} checks" in out
    report = json.loads(path.read_bytes())
    assert report["environment"]["qemu"].startswith("11.")
    assert report["guests"][0]["track"] == "stores+pages"
    assert report["notices"] == []
    command.assert_nothing_left()


@pytest.mark.mktme(memory="256M", vcpus=2, track="stores", check_tlb=True)
def test_stores_of_two_vcpus(mktme_vm: Vm, mktme_platform: Platform) -> None:
    """Each cached translation is QEMU's; and the control: stores alone leave lines behind."""
    assert mktme_platform.host.qemu_version >= (11,)
    with mktme_vm.held() as engine:
        assert compare_memory(mktme_vm, engine).lines_mismatched > 10_000
    status = mktme_vm.status()
    assert status.plugin_api == mktme_platform.host.plugin_api == 7
    assert status.traffic is not None
    assert status.traffic.tlb_errors == 0
    assert status.traffic.tlb_checked is not None
    assert status.traffic.tlb_checked > 10_000_000
