# SPDX-License-Identifier: GPL-2.0-or-later
"""What live guests leave in the report: counters over time, entropy, pictures of DRAM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mktme.proof.report import GuestReport, encode
from mktme.report.document import read_report

from ..unit.report.markup import Parsed
from .conftest import Command


def check_timeline(guest: GuestReport) -> None:
    found = guest.timeline
    assert found is not None
    # From the first instruction to the last flush.
    assert len(found.at_s) > guest.boot_s  # more than one a second
    assert found.at_s[0] < guest.boot_s / 2
    assert found.at_s[-1] > guest.boot_s + guest.workload_s
    if guest.checksums:
        assert found.worked_s is not None
        begun, ended = found.worked_s
        assert ended - begun == pytest.approx(guest.workload_s, abs=0.01)
        assert guest.boot_s - 0.001 < begun < ended <= found.at_s[-1]  # they are whole milliseconds
    counters = guest.paging or guest.traffic
    for column in ("lines_stored", "lines_other", "lines_written", "faults", "pages_evicted"):
        values = getattr(found, column)
        if values:
            assert list(values) == sorted(values)
            assert values[-1] == getattr(counters, column)  # held guests write no more


def test_demo_leaves_a_page(command: Command, tmp_path: Path) -> None:
    json_file, html = tmp_path / "run.json", tmp_path / "report.html"
    words = ("demo", "--memory", "192M", "--json", str(json_file), "--html", str(html))
    code, _out, err = command.run(*words)
    assert code == 0, err
    report = read_report(json_file)
    assert report.arguments == words
    guests = {guest.name: guest for guest in report.guests}
    assert set(guests) == {"alice", "bob", "plain", "stores-only", "no-encrypt"}
    plain = guests.pop("plain")
    assert (plain.timeline, plain.entropy) == (None, None)
    for name, guest in guests.items():
        check_timeline(guest)
        entropy = guest.entropy
        assert entropy is not None
        assert entropy.pages > 1000
        assert entropy.plaintext_mean < 6
        if name == "no-encrypt":  # the control
            assert entropy.ciphertext == entropy.plaintext
        else:
            assert entropy.ciphertext_mean > 7.9
    parsed = Parsed.of(html.read_text())
    documents = {one.attributes["id"]: json.loads(one.text) for one in parsed.all("pre")}
    assert documents["json-run"] == json.loads(json_file.read_bytes()) == json.loads(encode(report))
    (held, controls) = documents["json-dumps"]
    assert held["name"] == "alice and bob"
    assert [one["vms"] for one in held["keyids"]] in (
        [["alice"], ["bob"]],
        [["bob"], ["alice"]],
    )
    assert all(one["entropy_mean"] > 7.95 for one in held["keyids"])
    (clear,) = (one for one in controls["keyids"] if one["key"] == "no-encrypt")
    assert clear["entropy_mean"] < 6
    command.assert_nothing_left()


def test_inline_run_tells_of_its_window_and_its_image_is_shown(
    command: Command, tmp_path: Path
) -> None:
    dram, json_file, html = tmp_path / "dram.img", tmp_path / "run.json", tmp_path / "report.html"
    words = ("run", "--datapath", "inline", "--memory", "192M", "--window", "25%")
    more = ("--no-reference", "--dram", str(dram), "--json", str(json_file))
    code, out, err = command.run(*words, *more)
    assert code == 0, err
    assert "its plaintext in RAM never exceeds the window" in out
    assert "of 48.0 MiB in" in out
    (guest,) = read_report(json_file).guests
    check_timeline(guest)
    assert guest.timeline is not None
    assert 36 << 20 < max(guest.timeline.resident_bytes) <= 48 << 20
    assert guest.timeline.faults[-1] > 1000
    assert guest.entropy is not None
    assert guest.entropy.ciphertext_mean > 7.9 > 6 > guest.entropy.plaintext_mean
    command.assert_nothing_left()

    code, out, err = command.run("report", str(json_file), str(dram), "-o", str(html))
    assert code == 0, err
    parsed = Parsed.of(html.read_text())
    (document,) = json.loads(parsed.one("pre", id="json-dumps").text)
    (keyid,) = (one for one in document["keyids"] if one["vms"] == ["guest1"])
    assert keyid["entropy_mean"] > 7.95
    assert keyid["written_pages"] == document["written_pages"] > 10_000
