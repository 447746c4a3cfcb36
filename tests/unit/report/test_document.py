# SPDX-License-Identifier: GPL-2.0-or-later
"""A report is read as it was written; what is none is refused with the reason."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mktme.proof.report import RunReport, encode, write_json
from mktme.report import document
from mktme.report.document import ReportError, read_report
from mktme.report.page import render

from ..proof.test_report import REPORT
from .example import DEMO, INLINE


@pytest.mark.parametrize("report", [DEMO, INLINE, REPORT], ids=["demo", "inline", "small"])
def test_is_read_as_it_was_written(tmp_path: Path, report: Any) -> None:
    write_json(tmp_path / "run.json", report)
    assert read_report(tmp_path / "run.json") == report


def test_report_from_before_the_newest_fields(tmp_path: Path) -> None:
    old = json.loads(encode(DEMO))
    del old["arguments"], old["environment"]["mktme"]
    for guest in old["guests"]:
        del guest["timeline"], guest["entropy"]
    (tmp_path / "run.json").write_text(json.dumps(old))
    found = read_report(tmp_path / "run.json")
    assert (found.arguments, found.environment.mktme) == ((), "")
    assert [guest.timeline for guest in found.guests] == [None] * 5
    assert found.checks == DEMO.checks


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    one = json.loads(encode(DEMO))
    change(one)
    return json.dumps(one).encode()


def shortened(one: dict[str, Any]) -> None:
    one["guests"][0]["timeline"]["lines_stored"].pop()


WRONG = {
    "empty": (b"", "no JSON: Input data was truncated"),
    "cut short": (encode(DEMO)[:5000], "no JSON: Input data was truncated"),
    "binary": (b"\x7fELF\x02\x01", "no JSON: "),
    "not UTF-8": (b'{"schema": "\xff"}', "no JSON: "),
    "very deep": (b"[" * 100_000, "no JSON: "),
    "a list": (b"[1, 2]", "no report of mktme's, not mktme.run"),
    "no schema": (b"{}", "no report of mktme's, not mktme.run"),
    "of a benchmark": (b'{"schema": "mktme.bench"}', '"mktme.bench", not mktme.run'),
    "newer": (
        changed(lambda one: one.update(version=2)),
        "version 2 of mktme.run, and this mktme reads 1",
    ),
    "without a version": (
        changed(lambda one: one.pop("version")),
        "version null of mktme.run, and this mktme reads 1",
    ),
    "without checks": (
        changed(lambda one: one.pop("checks")),
        "not as mktme.run is described: Object missing required field `checks`",
    ),
    "of another type": (
        changed(lambda one: one["guests"][1].update(boot_s="long")),
        r"Expected `float`, got `str` - at `\$\.guests\[1\]\.boot_s`",
    ),
    "with a number that is none": (
        changed(lambda one: one["guests"][0]["traffic"].update(drains=1 << 64)),
        "an integer of more than 64 bits",
    ),
    "with half a character": (
        changed(lambda one: one["guests"][0].update(name="HALF")).replace(b"HALF", rb"\ud800"),
        "no JSON: ",
    ),
    "with a ragged matrix": (
        changed(lambda one: one["isolation"]["readable"][0].pop()),
        r"a row and a column for each name - at `\$\.isolation`",
    ),
    "with samples missing": (
        changed(shortened),
        r"lines_stored has another number of samples than at_s - at `\$\.guests\[0\]\.timeline`",
    ),
}


@pytest.mark.parametrize(("data", "why"), WRONG.values(), ids=WRONG)
def test_what_is_no_report_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(ReportError, match=why) as caught:
        read_report(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.hint


def test_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="No such file or directory"):
        read_report(tmp_path / "none.json")
    with pytest.raises(ReportError, match="Is a directory"):
        read_report(tmp_path)


def test_file_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_BYTES", 1 << 20)
    with pytest.raises(ReportError, match="more than 1 MiB: no run's report"):
        read_report(Path("/dev/zero"))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_WHERE = [
    ("guests", 0, "traffic", "drains"),
    ("guests", 0, "timeline", "at_s"),
    ("guests", 0, "timeline", "worked_s"),
    ("guests", 0, "entropy", "plaintext"),
    ("guests", 0, "memory_bytes"),
    ("checks", 0),
    ("isolation", "keyids"),
    ("environment",),
    ("duration_s",),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(_WHERE), value=_VALUES)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path: Path, where: tuple[str | int, ...], value: object
) -> None:
    one = json.loads(encode(DEMO))
    inside = one
    for part in where[:-1]:
        inside = inside[part]
    inside[where[-1]] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(one))
    try:
        found = read_report(path)
    except ReportError:
        return
    assert found.schema == "mktme.run"


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, 10**12).map(lambda ms: ms / 1000), min_size=1, max_size=4).map(sorted),
    st.integers(0, (1 << 63) - 1),
)
@example([0.0, 5e-324], 1)
@example([0.0, 0.001, 1e9], (1 << 63) - 1)
def test_whatever_is_read_is_drawn(at_s: list[float], most: int) -> None:
    one = json.loads(encode(DEMO))
    guest = one["guests"][0]
    columns = {"lines_stored": most, "lines_other": 0}
    guest["timeline"] = {name: [value] * len(at_s) for name, value in columns.items()}
    guest["timeline"] |= {"at_s": at_s, "worked_s": [0, at_s[-1]]}
    one["guests"] = [guest]
    text = json.dumps(one)
    if any(later - earlier < 0.000_9 for earlier, later in itertools.pairwise(at_s)):
        with pytest.raises(msgspec.ValidationError, match="does not ascend"):
            msgspec.json.decode(text, type=RunReport)
        return
    assert b"</html>" in render(msgspec.json.decode(text, type=RunReport))
