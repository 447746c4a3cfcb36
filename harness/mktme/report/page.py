# SPDX-License-Identifier: GPL-2.0-or-later
"""What the page shows, and where each figure on it is from.

Every figure in a table of results is an HTML `data` element. It has the value as the JSON at the
page's end has it, and the JSON Pointer (RFC 6901) to it there, so that a program can check the page
against the document: `data-in` is the document's element, `data-at` the pointer.

Names of guests, files and commands are whoever's who made the report. Jinja escapes them; what
could still deceive a reader (control characters, those that turn the direction of writing) is
replaced.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import jinja2
import msgspec
from markupsafe import Markup

from mktme.engine.text import UNSAFE, shown
from mktme.proof.report import Check, GuestReport, RunReport, encode
from mktme.report import charts
from mktme.report.charts import Chart, Traffic
from mktme.report.dumps import Look

_HERE: Final = Path(__file__).parent
_PROOFS: Final = {
    "transparency": (
        "The guest cannot tell. Its memory, decrypted from DRAM, is what the guest has; and what"
        " its workload computes is what it computes on plain QEMU."
    ),
    "confidentiality": (
        "What a guest holds in memory is not in DRAM. It fills a page with random bytes, and DRAM"
        " is searched for every 16-byte block of them, at any alignment."
    ),
    "isolation": (
        "A guest's memory makes sense under its own KeyID alone. The page of each guest is read"
        " with the KeyID of each."
    ),
}
_FORMATS: Final[dict[str, Callable[[Any], str]]] = {
    "text": str,
    "count": lambda value: f"{value:,}",
    "seconds": lambda value: f"{value:,.1f} s",
    "µs": lambda value: f"{value * 1e6:,.0f} µs",
    "MiB": lambda value: f"{value / (1 << 20):,.1f} MiB",
    "whole MiB": lambda value: f"{value / (1 << 20):,.0f} MiB",
    "bits": lambda value: f"{value:.3f}",
    "hex": lambda value: f"{value:#x}",
}


@dataclass(frozen=True, slots=True)
class Proof:
    """A proof of the run: its checks, and its controls; each with its place in the report."""

    name: Literal["transparency", "confidentiality", "isolation"]
    meaning: str
    checks: tuple[tuple[int, Check], ...]
    controls: tuple[tuple[int, Check], ...]

    @property
    def passed(self) -> bool:
        """Whether all of it did."""
        return all(check.passed for _at, check in (*self.checks, *self.controls))


@dataclass(frozen=True, slots=True)
class Checksum:
    """A value that workloads computed: the place of the first guest, and the names of all."""

    name: str
    value: str
    at: int
    guests: tuple[str, ...]


def render(report: RunReport, looks: Sequence[Look] = ()) -> bytes:
    """The page; the same for the same arguments.

    Args:
        report: of the run.
        looks: at DRAM images.

    Returns:
        HTML, UTF-8.
    """
    texts = {
        "run": _json_escaped(encode(report).decode()),
        "dumps": _json_escaped(encode([look.figures for look in looks]).decode()),
    }
    documents = {name: msgspec.json.decode(text) for name, text in texts.items()}
    style = (_HERE / "style.css").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
    )
    checks_passed = sum(check.passed for check in report.checks)
    html = environment.get_template("template.html.j2").render(
        report=report,
        looks=looks,
        passed=report.passed and 0 < checks_passed == len(report.checks),
        checks_passed=checks_passed,
        agree=report.passed == all(check.passed for check in report.checks),
        proofs=_proofs(report.checks),
        guests=tuple(enumerate(report.guests)),
        data_path=_data_path,
        checksums=_checksums(report.guests),
        command=shlex.join(("mktme", *report.arguments)) if report.arguments else None,
        entropy_charts=[
            charts.entropy_chart(f"entropy-{at}", shown(guest.name), guest.entropy)
            for at, guest in enumerate(report.guests)
            if guest.entropy is not None and guest.entropy.pages
        ],
        traffic_charts=_traffic_charts(report.guests),
        window_charts=_window_charts(report.guests),
        dump_charts=[_dump_charts(at, look) for at, look in enumerate(looks)],
        figure=lambda pointer, form="text", document="run": _figure(
            documents[document], document, pointer, form
        ),
        markup=lambda chart: Markup(chart.svg),  # ElementTree has escaped it
        has_comparisons=any(guest.comparison for guest in report.guests),
        has_searches=any(guest.canary for guest in report.guests),
        has_traffic=any(guest.traffic for guest in report.guests),
        has_windows=any(guest.paging for guest in report.guests),
        pointer_part=lambda name: name.replace("~", "~0").replace("/", "~1"),
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        documents={name: _json_text(text) for name, text in texts.items()},
        digests={name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
    )
    return html.encode()


def _json_escaped(text: str) -> str:
    """The same JSON without what `shown` would replace: all of it is in strings."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _json_text(text: str) -> Markup:
    # Quotes need no escape in text, and there are many.
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(plain)  # escaped above


def _figure(document: Any, name: str, pointer: str, form: str) -> Markup:
    value = document
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    if value is None:
        return Markup('<span class="none">none</span>')
    raw = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return Markup('<data value="{}" data-in="{}" data-at="{}">{}</data>').format(
        shown(raw), name, shown(pointer), shown(_FORMATS[form](value))
    )


def _proofs(checks: tuple[Check, ...]) -> tuple[Proof, ...]:
    numbered = tuple(enumerate(checks))
    return tuple(
        Proof(
            name,  # type: ignore[arg-type]
            meaning,
            tuple(one for one in numbered if one[1].proof == name and not one[1].control),
            tuple(one for one in numbered if one[1].proof == name and one[1].control),
        )
        for name, meaning in _PROOFS.items()
    )


def _data_path(guest: GuestReport) -> str:
    if guest.datapath is None and guest.track is None:
        return "plain QEMU"
    if guest.paging is not None:
        return f"inline, {guest.paging.policy.value}"
    return "shadow" if guest.datapath is None else guest.datapath.value


def _checksums(guests: tuple[GuestReport, ...]) -> tuple[Checksum, ...]:
    computed: dict[tuple[str, str], list[int]] = {}
    for at, guest in enumerate(guests):
        for one in guest.checksums.items():
            computed.setdefault(one, []).append(at)
    return tuple(
        Checksum(name, value, where[0], tuple(guests[at].name for at in where))
        for (name, value), where in sorted(computed.items())
    )


def _traffic_charts(guests: tuple[GuestReport, ...]) -> list[Chart]:
    found = {
        f"traffic-{at}": traffic
        for at, guest in enumerate(guests)
        if (traffic := _traffic(guest)) is not None
    }
    top = max((traffic.peak for traffic in found.values()), default=0.0)
    return [charts.traffic_chart(one, traffic, top) for one, traffic in found.items()]


def _traffic(guest: GuestReport) -> Traffic | None:
    """What a guest wrote, by what tells of it; None if that was not sampled."""
    timeline = guest.timeline
    if timeline is None or len(timeline.at_s) < 2:
        return None
    if timeline.lines_written:
        tracker, series = "evictions", {"lines_written": "written on eviction"}
    elif guest.counts_stores and guest.counts_pages:
        tracker = "stores and pages"
        series = {"lines_stored": "stores", "lines_other": "DMA, system"}
    elif guest.counts_stores:
        tracker, series = "stores alone", {"lines_stored": "stores"}
    else:
        tracker, series = "pages alone", {"lines_other": "all, not told apart"}
    if not all(getattr(timeline, column) for column in series):
        return None
    return Traffic(shown(guest.name), tracker, timeline, series)


def _window_charts(guests: tuple[GuestReport, ...]) -> list[Chart]:
    drawn = []
    for at, guest in enumerate(guests):
        timeline, paging, name = guest.timeline, guest.paging, shown(guest.name)
        if timeline is None or paging is None or len(timeline.at_s) < 2:
            continue
        if timeline.resident_bytes:
            drawn.append(charts.window_chart(f"window-{at}", name, timeline, paging.window_bytes))
        if timeline.faults and timeline.pages_evicted:
            drawn.append(charts.paging_chart(f"paging-{at}", name, timeline))
    return drawn


def _dump_charts(at: int, look: Look) -> tuple[list[Chart], list[Chart]]:
    """An image's maps, and the entropy of its KeyIDs."""
    name = shown(look.figures.name)
    written = sorted({one.keyid for one in look.figures.keyids if one.written_pages})
    maps = [
        charts.entropy_map(f"dump-{at}-entropy", name, look.map),
        charts.keyid_map(f"dump-{at}-keyids", name, look.map, written),
    ]
    keyids = [
        charts.keyid_entropy_chart(
            f"dump-{at}-keyid-{one.keyid}{'-excluded' * one.excluded}",
            f"{one.keyid}{', excluded' * one.excluded}",
            one.written_pages,
            one.entropy,
            one.entropy_mean,
        )
        for one in look.figures.keyids
        if one.entropy_mean is not None
    ]
    return maps, keyids
