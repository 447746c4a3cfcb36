# SPDX-License-Identifier: GPL-2.0-or-later
"""DRAM of a running guest, looked at without a key: ciphertext, and its plaintext beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mktme.dump.cluster import Source
from mktme.dump.diff import dump_diff
from mktme.dump.drawing import Format, render
from mktme.dump.pictures import Request, make_picture
from mktme.dump.stats import StatsReport, Verdict, ZoneStats, dump_stats
from mktme.engine.keys import KeyMode
from mktme.engine.sidecar import sidecar_path
from mktme.proof.guest_ram import memory_of
from mktme.pytest_plugin import vm_config
from mktme.vm.platform import Platform, Vm

pytestmark = pytest.mark.usefixtures("quick_boots")

MEMORY = 192 << 20
CLEAR = "16M@64M=no-encrypt"


def zone(report: StatsReport, mode: KeyMode) -> ZoneStats:
    (found,) = (one for one in report.keyids if one.mode is mode)
    return found


def copy_of(platform: Platform, to: Path) -> Source:
    """An image that stays as it is."""
    assert platform.dram_path is not None
    shutil.copy(platform.dram_path, to)
    shutil.copy(platform.engine.write_sidecar(), sidecar_path(to))
    return Source(to)


def save_plaintext(vm: Vm, to: Path) -> Source:
    """A held guest's RAM, by RAM offset."""
    with memory_of(vm) as memory, to.open("wb") as file:
        file.truncate(MEMORY)
        for ram_offset, chunk in memory.chunks():
            if chunk.strip(b"\0"):
                file.seek(ram_offset)
                file.write(chunk)
    return Source(to, raw=True)


@pytest.mark.parametrize("datapath", ["shadow", "inline"])
def test_dram_of_a_guest_is_noise_but_for_what_is_not_to_be(tmp_path: Path, datapath: str) -> None:
    window = "32M" if datapath == "inline" else None
    config = vm_config(memory="192M", datapath=datapath, window=window, pages=(CLEAR,))
    with Platform(MEMORY) as platform, platform.launch(config, "alice") as vm:
        # Text in most of the memory that is free, and so in the pages that are not encrypted.
        shell = vm.domain.shell
        shell.run("mkdir /text && mount -t tmpfs -o size=90% text /text", 20)
        shell.run("dd if=/dev/zero bs=1M count=96 | tr '\\0' m >/text/all", 60)
        with vm.held():
            first = copy_of(platform, tmp_path / "first")
            plaintext = save_plaintext(vm, tmp_path / "plain")
        shell.run("head -c 1000000 /text/all | tr m M >/text/more", 20)
        with vm.held():
            second = copy_of(platform, tmp_path / "second")

    report = dump_stats(first)
    own = zone(report, KeyMode.RANDOM)
    assert own.verdict is Verdict.ENCRYPTED, own.reasons
    assert own.pages_written > 10_000
    assert own.vms == ("alice",)
    assert own.compression.ratio is not None
    assert own.compression.ratio > 1
    assert own.strings[0].found < 3 * own.strings[0].by_chance + 30
    clear = zone(report, KeyMode.NO_ENCRYPT)
    assert clear.verdict is Verdict.STRUCTURED
    assert clear.pages_structured > 1000
    assert report.passed

    # The control: the same memory, as its owner sees it.
    (in_plain,) = dump_stats(plaintext).keyids
    assert in_plain.verdict is Verdict.STRUCTURED
    assert in_plain.blocks.repeated > 0.5 * in_plain.blocks.counted
    assert in_plain.strings[0].found > 1000

    # Most of it did not change in between, and so did its ciphertext not.
    (same_key,) = (
        one for one in dump_diff(first, second).keyids if one.keyid_a == one.keyid_b == own.keyid
    )
    assert same_key.lines.equal > 10 * same_key.lines.changed > 0
    assert same_key.bits_changed == pytest.approx(0.5, abs=0.01)

    picture = make_picture(Request(first, plaintext=plaintext, vm="alice"))
    for form in Format:
        (tmp_path / f"map.{form.value}").write_bytes(render(picture, form))
    dram, plain = (panel.values.shown for panel in picture.panels)
    written = dram[dram == dram]
    assert (written > 7.9).mean() > 0.8
    assert (plain[plain == plain] < 7).mean() > 0.8
