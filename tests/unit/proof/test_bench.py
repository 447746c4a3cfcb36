# SPDX-License-Identifier: GPL-2.0-or-later
"""What `mktme bench` measures: each configuration is a guest that there can be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mktme.proof import bench
from mktme.proof.runs import Narrator
from mktme.vm.config import VmConfig, check_config
from mktme.vm.host import EnvironmentUnfitError
from mktme.vm.visible import check_visible, visible_platform

from ..vm.test_domain_xml import IMAGE


@pytest.mark.parametrize("name", bench.CONFIGURATIONS)
def test_every_configuration_can_be(name: str) -> None:
    config = bench.CONFIGURATIONS[name].apply(VmConfig(IMAGE))
    check_config(config)
    assert config.visible == (name == bench.VISIBLE)
    if config.visible:
        check_visible(config, visible_platform(None))


def test_visible_differs_in_nothing_else() -> None:
    visible, invisible = (bench.CONFIGURATIONS[one] for one in (bench.VISIBLE, bench.INVISIBLE))
    assert (visible.qemu11, visible.track) == (invisible.qemu11, invisible.track)
    assert (visible.visible, invisible.visible) == (True, False)


def test_what_needs_qemu_11_is_left_out_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    listener = cast("Narrator", SimpleNamespace(notice=notices.append))
    names = list(bench.CONFIGURATIONS)
    monkeypatch.setattr(bench, "emulator_path", lambda _chosen: Path("/qemu"))
    assert bench._without_qemu11(names, listener) == names
    assert notices == []

    def missing(chosen: str) -> Path:
        raise EnvironmentUnfitError(f"there is no {chosen}", hint="make qemu11")

    monkeypatch.setattr(bench, "emulator_path", missing)
    left = bench._without_qemu11(names, listener)
    assert set(names) - set(left) == {bench.VISIBLE, bench.INVISIBLE}
    assert notices == ["left out what is on QEMU 11: there is no qemu11"]
