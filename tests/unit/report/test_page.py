# SPDX-License-Identifier: GPL-2.0-or-later
"""The page: all of the report is on it, nothing else, and nobody's names do harm."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mktme.dump.cluster import Source
from mktme.dump.stats import dump_stats
from mktme.engine.sidecar import ExclusionRecord, PageRange
from mktme.proof.isolation import IsolationMatrix
from mktme.proof.report import Check, RunReport, encode
from mktme.proof.timeline import Timeline
from mktme.report.dumps import Look, look_at
from mktme.report.page import render

from ..dump.conftest import VM_BASE, MakeImage, describe
from ..proof.test_report import REPORT
from .example import DEMO, INLINE
from .markup import Parsed

REFERENCES = ("aria-labelledby", "aria-describedby", "for")


_pages: dict[bytes, str] = {}


def page(report: RunReport) -> str:
    """A report's page; each is made once."""
    key = encode(report)
    if key not in _pages:
        _pages[key] = render(report).decode()
    return _pages[key]


def text(html: str) -> str:
    """What is read, in one line."""
    return " ".join(Parsed.of(html).one("body").text.split())


def resolved(document: Any, pointer: str) -> Any:
    """What an RFC 6901 pointer points to."""
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def documents(parsed: Parsed) -> dict[str, Any]:
    return {
        one.attributes["id"].removeprefix("json-"): json.loads(one.text)
        for one in parsed.all("pre")
    }


# --- what it is made of -----------------------------------------------------------------------


def test_is_well_formed(html: str) -> None:
    parsed = Parsed.of(html)
    assert parsed.declarations == ["DOCTYPE html"]
    assert parsed.one("html").attributes["lang"] == "en"
    ids = [one.attributes["id"] for one in parsed.elements if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    for element in parsed.elements:
        for name in REFERENCES:
            assert set(element.attributes.get(name, "").split()) <= set(ids), element
        href = element.attributes.get("href", "")
        assert not href.startswith("#") or href[1:] in ids, element
        for value in element.attributes.values():
            assert set(re.findall(r"url\(#([^)]*)\)", value)) <= set(ids), element


def test_needs_nothing_else(html: str) -> None:
    parsed = Parsed.of(html)
    for element in parsed.elements:
        assert element.tag not in ("script", "iframe", "object", "embed", "base", "form"), element
        assert "style" not in element.attributes, element
        for name, value in element.attributes.items():
            assert not name.startswith("on"), element
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:")), element
            assert "url(" not in value or "url(#" in value, element
    style = parsed.one("style").text
    assert not re.search(r"url\(|@import|@font-face|https?:", style)


def test_policy_allows_the_style_sheet_and_no_other(html: str) -> None:
    parsed = Parsed.of(html)
    policy = parsed.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(parsed.one("style").text.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_same_report_makes_the_same_page(look: Look) -> None:
    assert render(DEMO, [look]) == render(DEMO, [look])


def test_settings_of_the_user_do_not_matter() -> None:
    import matplotlib as mpl

    expected = render(INLINE)
    with mpl.rc_context({"font.size": 40, "axes.grid": False, "svg.fonttype": "path"}):
        assert render(INLINE) == expected
        assert mpl.rcParams["font.size"] == 40  # and are as they were


def test_headings_are_in_order(html: str) -> None:
    levels = [
        int(one.tag[1]) for one in Parsed.of(html).elements if re.fullmatch("h[1-6]", one.tag)
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def test_landmarks_tables_and_charts_have_names(html: str) -> None:
    parsed = Parsed.of(html)
    for tag in ("header", "nav", "main", "footer"):
        assert len(parsed.all(tag)) == 1
    for table in parsed.all("table"):
        assert "div" in table.parents
    boxes = [one for one in parsed.elements if one.attributes.get("tabindex") == "0"]
    names = [one.attributes.get("aria-label") or one.attributes["aria-labelledby"] for one in boxes]
    assert len(set(names)) == len(boxes) > 10
    assert {one.attributes["role"] for one in boxes} == {"group"}
    assert len(boxes) == len(parsed.all("table")) + len(parsed.all("pre"))
    for cell in parsed.all("th"):
        assert cell.attributes["scope"] in ("row", "col")
    charts = parsed.all("svg")
    assert charts
    for chart in charts:
        one = chart.attributes["aria-labelledby"].removesuffix("-title")
        assert chart.attributes["role"] == "img"
        assert parsed.one("title", id=f"{one}-title").text
        assert parsed.one("desc", id=f"{one}-desc").text.endswith(".")


# --- what it says -----------------------------------------------------------------------------


def test_embeds_the_report(html: str) -> None:
    found = documents(Parsed.of(html))
    report = INLINE if found["run"]["command"] == "run" else DEMO
    assert msgspec.convert(found["run"], RunReport) == report


def test_digest_is_of_what_is_embedded(html: str) -> None:
    parsed = Parsed.of(html)
    for one in parsed.all("pre"):
        assert hashlib.sha256(one.text.encode()).hexdigest() in html.replace(one.text, "")


UNITS = {"": 1.0, " s": 1.0, " µs": 1e-6, " MiB": float(1 << 20)}


def shown(written: str) -> tuple[float, float]:
    """A number as it is written, and by how much it may be rounded."""
    if written.startswith("0x"):
        return int(written, 16), 0.0
    match = re.fullmatch(r"([\d,]+)(\.(\d+))?( \S+)?", written)
    assert match, written
    unit = UNITS[match[4] or ""]
    digits = len(match[3] or "")
    return float((match[1] + (match[2] or "")).replace(",", "")) * unit, 0.5001 * unit / 10**digits


def test_figures_are_those_of_the_json(html: str) -> None:
    parsed = Parsed.of(html)
    found = documents(parsed)
    figures = parsed.all("data")
    assert len(figures) > 50
    for one in figures:
        value = resolved(found[one.attributes["data-in"]], one.attributes["data-at"])
        if isinstance(value, str):
            assert one.attributes["value"] == one.text == value
            continue
        assert json.loads(one.attributes["value"]) == value
        if isinstance(value, bool):
            assert one.text == ("readable" if value else "noise")
        else:
            number, rounding = shown(one.text)
            assert number == pytest.approx(value, abs=rounding, rel=1e-12), one


@pytest.mark.parametrize("report", [DEMO, INLINE], ids=["demo", "inline"])
def test_nothing_of_the_report_is_left_out(report: RunReport) -> None:
    """Every part of every guest, check and notice is on the page, by its place in the report."""
    at = {one.attributes["data-at"] for one in Parsed.of(page(report)).all("data")}
    expected = {
        f"/checks/{number}/{name}"
        for number in range(len(report.checks))
        for name in ("subject", "claim", "finding")
    }
    expected |= {f"/notices/{number}" for number in range(len(report.notices))}
    for number, guest in enumerate(report.guests):
        here = f"/guests/{number}/"
        expected |= {f"{here}{name}" for name in ("name", "memory_bytes", "vcpus", "boot_s")}
        for part, names in {
            "comparison": ("lines_compared", "lines_nonzero", "lines_mismatched", "unmarked"),
            "canary": ("dram_bytes_searched", "dram_hits", "ram_offset"),
            "entropy": ("pages", "plaintext_mean", "ciphertext_mean"),
            "paging": ("window_bytes", "peak_bytes", "faults", "pages_evicted", "fault_p99_s"),
            "residency": ("peak_bytes", "samples"),
        }.items():
            if getattr(guest, part) is not None:
                expected |= {f"{here}{part}/{name}" for name in names}
        if guest.counts_stores and guest.traffic:
            expected.add(f"{here}traffic/lines_stored")
        if guest.counts_pages:
            expected.add(f"{here}traffic/lines_other")
    for name in ("qemu", "libvirt", "host_kernel", "cpu", "guest_kernel_sha256", "mktme"):
        expected.add(f"/environment/{name}")
    assert expected <= at


def verdict(report: RunReport) -> str:
    return " ".join(Parsed.of(page(report)).one("h1").text.split())


SMALL = dataclasses.replace(DEMO, guests=DEMO.guests[2:3])
FAILED = dataclasses.replace(DEMO.checks[0], passed=False)


def test_verdict_is_in_words() -> None:
    assert verdict(SMALL) == "Passed 10 of 10 checks"
    failed = dataclasses.replace(SMALL, passed=False, checks=(FAILED, *DEMO.checks[1:]))
    assert verdict(failed) == "Failed 9 of 10 checks"
    html = page(failed)
    assert "<title>FAILED" in html
    assert html.count('"state fail">FAIL<') == 2  # the check, and its proof in the summary
    assert 'state fail">' not in page(SMALL)


@pytest.mark.parametrize(
    "report",
    [
        dataclasses.replace(SMALL, checks=(FAILED, *DEMO.checks[1:])),
        dataclasses.replace(SMALL, passed=False),
    ],
)
def test_report_that_contradicts_itself_has_not_passed(report: RunReport) -> None:
    html = page(report)
    assert "Failed" in verdict(report)
    assert "This report contradicts itself" in html
    assert "This report contradicts itself" not in page(SMALL)


def test_no_checks_are_no_success() -> None:
    empty = dataclasses.replace(SMALL, checks=())
    assert verdict(empty) == "Failed 0 of 0 checks"
    assert "Nothing was checked in this run" in text(page(empty))


def test_proof_without_a_control_says_so() -> None:
    assert "made no control" not in page(DEMO)
    assert text(page(INLINE)).count("This run made no control of it") == 3


def test_report_from_before_there_were_timelines() -> None:
    html = page(REPORT)
    assert "it is older than they are" in html
    assert "<svg" not in html
    assert verdict(REPORT) == "Passed 1 of 1 checks"


@pytest.mark.parametrize("samples", [1, 2, 3, 512])
def test_few_samples_and_many(samples: int) -> None:
    steps = tuple(range(samples))
    timeline = Timeline(
        tuple(map(float, steps)), None, lines_stored=steps, lines_other=(0,) * samples
    )
    guest = dataclasses.replace(DEMO.guests[0], timeline=timeline)
    html = render(dataclasses.replace(DEMO, guests=(guest,))).decode()
    assert ("Writes of alice" in html) == (samples > 1)
    Parsed.of(html)


def test_isolation_that_is_wrong_is_shown() -> None:
    assert DEMO.isolation is not None
    wrong = dataclasses.replace(DEMO.isolation, readable=((True, True), (False, True)))
    html = render(dataclasses.replace(SMALL, isolation=wrong)).decode()
    assert html.count('<td class="readable wrong">') == 1
    assert " wrong" not in Parsed.of(page(SMALL)).one("main").text
    assert 'class="readable wrong"' not in page(SMALL)


# --- names of others --------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></details><b>out</b>",
    "{{ 7 * 7 }}{% raw %}",
    "$x^2$ \\alpha &amp; <!-- -->",
    "a\x00b\x1b[31m\x7f\u202etxt.exe\ufeff",
    "\u65e5\u672c\u8a9e \U0001f512",
    "/~1~0/",
    "x" * 5000,
    "",
]


def named(name: str) -> RunReport:
    """A report in which all that can be named has one name."""
    guest = dataclasses.replace(INLINE.guests[0], name=name, checksums={name: name})
    return dataclasses.replace(
        INLINE,
        guests=(guest,),
        checks=(Check("isolation", name, name, False, True, name),),
        isolation=IsolationMatrix((name, "other"), (1, 2), ((True, False), (False, True))),
        notices=(name,),
        arguments=(name, "--json", name),
        environment=dataclasses.replace(INLINE.environment, cpu=name, libvirt_uri=name),
    )


@pytest.fixture(scope="module")
def harmless() -> list[str]:
    return [one.tag for one in Parsed.of(render(named("harmless")).decode()).elements]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_text(name: str, harmless: list[str]) -> None:
    html = render(named(name)).decode()
    parsed = Parsed.of(html)
    assert [one.tag for one in parsed.elements] == harmless
    names = {attribute for one in parsed.elements for attribute in one.attributes}
    assert not {attribute for attribute in names if attribute.startswith("on")}
    readable = re.sub("[\x00-\x08\x0b-\x1f\x7f\u202e\ufeff]", "\ufffd", name)
    assert parsed.one("body").text.count(readable) >= 8
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ufeff]", html)
    assert documents(parsed)["run"] == json.loads(encode(named(name)))  # to the last character


def test_name_of_an_image_is_text(make_image: MakeImage) -> None:
    name = "<b>\x00</pre>&amp;"
    html = render(REPORT, [look_at(make_image({0: bytes(4096)}), name)]).decode()
    parsed = Parsed.of(html)
    assert not parsed.all("b")
    assert documents(parsed)["dumps"][0]["name"] == name
    assert "<b>\ufffd</pre>&amp;" in [one.text for one in parsed.all("h3")]


# --- DRAM images ------------------------------------------------------------------------------


def test_image_is_shown_by_keyid(look: Look) -> None:
    figures = look.figures
    assert figures.written_pages == 4 + 8 + 8
    assert [(one.keyid, one.vms, one.written_pages) for one in figures.keyids] == [
        (0, (), 4),
        (3, ("alice",), 16),
    ]
    plain, encrypted = (one.entropy_mean for one in figures.keyids)
    assert plain is not None
    assert encrypted is not None
    assert plain < 4
    assert encrypted == pytest.approx(7.955, abs=0.01)
    cells = look.map
    assert cells.cell_pages == 1
    written = [number for number, bits in enumerate(cells.entropy.tolist()) if bits == bits]
    assert written == [*range(4), *range(64, 72), *range(96, 104)]


def test_maps_are_part_of_the_page(look: Look) -> None:
    parsed = Parsed.of(render(REPORT, [look]).decode())
    titles = [one.text for one in parsed.all("title")]
    assert {"Entropy in dram", "KeyIDs in dram", "Entropy of pages under KeyID 3"} <= set(titles)
    pictures = parsed.all("image")
    assert len(pictures) >= 2
    for one in pictures:
        kind, _, data = one.attributes["href"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")


def test_image_that_was_never_written(make_image: MakeImage) -> None:
    look = look_at(make_image({}))
    assert look.figures.written_pages == 0
    html = render(REPORT, [look]).decode()
    assert "KeyIDs that were written under: none." in html


def test_large_image_has_no_more_cells(tmp_path: Path, make_image: MakeImage) -> None:
    sidecar = describe(8 << 30)
    look = look_at(make_image({(8 << 30) - 4096: os.urandom(4096), 0: bytes(4096)}, sidecar))
    assert look.map.cell_pages == 16
    assert len(look.map.entropy) == len(look.map.keyid) == 1 << 17
    assert look.figures.written_pages == 1  # a page of zeros was not


def test_keyids_are_told_that_no_cell_shows(make_image: MakeImage) -> None:
    """A cell is 16 pages, and shows the first one's KeyID."""
    sidecar = describe(8 << 30)
    pages = (
        PageRange(base=0, size_bytes=4096, keyid=0),
        PageRange(base=4096, size_bytes=4096, keyid=7),
        PageRange(base=64 << 10, size_bytes=4096, keyid=9),  # never written
    )
    sidecar = msgspec.structs.replace(sidecar, vms=(), pages=pages)
    html = render(REPORT, [look_at(make_image({4096: os.urandom(4096)}, sidecar))]).decode()
    assert "16 pages, the KeyID of the first of them, left to right" in html
    assert "KeyIDs that were written under: 7." in html


def test_page_and_stats_say_the_same(make_image: MakeImage) -> None:
    """Of pages that are written in part, of zeros that are no holes, and of what is excluded."""
    base, size = 0xC0000, 0x20000
    record = msgspec.structs.replace(
        describe(), exclusion=ExclusionRecord(mask=(1 << 40) - size, base=base)
    )
    data = {
        0: os.urandom(4096),
        base: b"plaintext " * 1000,
        VM_BASE: os.urandom(64) + bytes(8192) + os.urandom(4096),
    }
    image = make_image(data, record)
    with image.open("r+b") as file:
        file.seek(VM_BASE + (64 << 10))
        file.write(bytes(4096))
    figures, stats = look_at(image).figures, dump_stats(Source(image))
    assert figures.written_pages == stats.pages_written
    assert len(figures.keyids) == len(stats.keyids) == 3
    for one, zone in zip(figures.keyids, stats.keyids, strict=True):
        assert (one.keyid, one.excluded, one.vms) == (zone.keyid, zone.excluded, zone.vms)
        assert (one.pages, one.written_pages) == (zone.pages, zone.pages_written)
        assert one.entropy_mean == pytest.approx(zone.page_entropy, abs=1e-5)
        assert one.entropy == tuple(np.array(zone.page_histogram).reshape(32, 4).sum(1).tolist())
    html = render(REPORT, [look_at(image)]).decode()
    assert "excluded: plaintext" in html
    assert "Entropy of pages under KeyID 0, excluded" in html
