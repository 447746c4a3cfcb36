# SPDX-License-Identifier: GPL-2.0-or-later
"""The page in a browser: it is quiet, readable at any width, by keyboard, in light and dark."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = (360, 768, 1280)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; CI has no excuse not to have it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CI"):
            raise FileNotFoundError("chromium: tools/setup installs it")
        pytest.skip("no chromium: tools/setup installs it")
    # Its sandbox is not for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page in a tab, and what the browser said and asked for meanwhile."""

    page: Page
    url: str
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def file(html: str, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(html)
    return path


class Open:
    """Opens a file in tabs that go with the test."""

    def __init__(self, browser: Browser, file: Path) -> None:
        self._browser = browser
        self._file = file
        self.tabs: list[Opened] = []

    def __call__(self, width: int = 1280, scheme: Literal["light", "dark"] = "light") -> Opened:
        context = self._browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        tab = Opened(context.new_page(), self._file.as_uri())
        tab.page.on("console", lambda message: tab.said.append(message.text))
        tab.page.on("pageerror", lambda error: tab.said.append(str(error)))
        tab.page.on("request", lambda request: tab.asked.append(request.url))
        tab.page.goto(tab.url)
        self.tabs.append(tab)
        return tab


@pytest.fixture
def open_tab(browser: Browser, file: Path) -> Iterator[Open]:
    opener = Open(browser, file)
    yield opener
    for tab in opener.tabs:
        tab.page.context.close()


def opened(tab: Opened) -> Page:
    """The page with nothing folded away."""
    tab.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    return tab.page


def test_is_quiet_and_alone(open_tab: Open) -> None:
    tab = open_tab()
    opened(tab).wait_for_load_state("networkidle")
    assert tab.said == []
    assert [url for url in tab.asked if not url.startswith("data:")] == [tab.url]


def test_policy_holds(open_tab: Open) -> None:
    """What somebody smuggled in would neither run nor reach out."""
    tab = open_tab()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        tab.page.evaluate(
            """port => {
                window.refused = [];
                document.addEventListener('securitypolicyviolation', event =>
                    window.refused.push(event.effectiveDirective));
                const script = document.createElement('script');
                script.textContent = 'window.ran = true';
                document.body.append(script);
                const image = document.createElement('img');
                image.src = `http://127.0.0.1:${port}/beacon`;
                document.body.append(image);
                document.body.setAttribute('style', 'opacity: 0.5');
            }""",
            server.getsockname()[1],
        )
        tab.page.wait_for_function("window.refused.length >= 3")
        with pytest.raises(BlockingIOError):  # nobody came
            server.accept()
    refused = tab.page.evaluate("window.refused.sort()")
    assert refused == ["img-src", "script-src-elem", "style-src-attr"]
    assert tab.page.evaluate("window.ran") is None
    assert tab.page.evaluate("getComputedStyle(document.body).opacity") == "1"
    assert len(tab.said) == 3  # control of the test above: it hears of such things


CHECK = """() => {
    const documents = {};
    for (const one of document.querySelectorAll('pre[id^="json-"]'))
        documents[one.id.slice(5)] = JSON.parse(one.textContent);
    const units = {s: 1, 'µs': 1e-6, MiB: 1048576};
    return [...document.querySelectorAll('data')].map(one => {
        let value = documents[one.dataset.in];
        for (const part of one.dataset.at.split('/').slice(1))
            value = value[part.replaceAll('~1', '/').replaceAll('~0', '~')];
        const text = one.textContent;
        const at = one.dataset.at;
        if (typeof value === 'string') return [at, value === text && one.value === text];
        if (typeof value === 'boolean') return [at, text === (value ? 'readable' : 'noise')];
        const [number, unit] = text.replaceAll(',', '').split(' ');
        const scale = unit ? units[unit] : 1;
        const digits = (number.split('.')[1] || '').length;
        const rounding = 0.5001 * scale / 10 ** digits;
        const near = Math.abs(Number(number) * scale - value) <= rounding;
        return [at, JSON.parse(one.value) === value && near];
    });
}"""


def test_figures_are_those_of_the_json(open_tab: Open) -> None:
    page = open_tab().page
    figures = page.evaluate(CHECK)
    assert len(figures) > 50
    assert [at for at, right in figures if not right] == []
    assert page.evaluate(
        """() => {
            const run = JSON.parse(document.getElementById('json-run').textContent);
            const text = selector => document.querySelector(selector).textContent;
            return Number(text('#checks-all')) === run.checks.length
                && Number(text('#checks-passed')) === run.checks.filter(one => one.passed).length
                && text('.verdict') === (run.passed ? 'Passed' : 'Failed');
        }"""
    )
    page.evaluate("document.querySelector('td data').textContent = '123456789'")
    assert len([at for at, right in page.evaluate(CHECK) if not right]) == 1  # control


OVERFLOW = "document.scrollingElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("width", [320, *WIDTHS])
def test_nothing_is_wider_than_the_screen(open_tab: Open, width: int) -> None:
    page = opened(open_tab(width))
    assert page.evaluate(OVERFLOW) == 0
    if width < 768:  # what is wide scrolls in a box of its own
        boxes = page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter("
            "one => one.scrollWidth > one.clientWidth).length"
        )
        assert boxes > 0


def test_width_is_measured(open_tab: Open) -> None:
    """Control: a table out of its box is noticed."""
    page = open_tab(360).page
    page.evaluate("for (const one of document.querySelectorAll('.scroll')) one.className = ''")
    assert page.evaluate(OVERFLOW) > 0


# All that a keyboard must reach, in the order of the document.
REACHED = "a[href], summary, [tabindex='0']"
NUMBER = f"""() => {{
    window.all = [...document.querySelectorAll("{REACHED}")].filter(one => one.checkVisibility());
    return window.all.length;
}}"""
FOCUSED = """() => {
    const one = document.activeElement, style = getComputedStyle(one);
    return [window.all.indexOf(one), style.outlineStyle, parseFloat(style.outlineWidth)];
}"""


@pytest.mark.parametrize("unfolded", [False, True])
def test_keyboard_reaches_everything_in_order(open_tab: Open, unfolded: bool) -> None:
    tab = open_tab()
    page = opened(tab) if unfolded else tab.page
    count = page.evaluate(NUMBER)
    assert count > 20
    for expected in range(count):
        page.keyboard.press("Tab")
        number, outline, width = page.evaluate(FOCUSED)
        assert number == expected
        assert outline == "solid"
        assert width >= 2


def test_skip_link_skips(open_tab: Open) -> None:
    page = open_tab(360).page
    page.keyboard.press("Tab")
    box = page.locator(".skip").bounding_box()
    assert box is not None
    assert box["y"] >= 0  # seen, once it is reached
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate("document.getElementById('main').contains(document.activeElement)")


def test_tables_scroll_and_unfold_by_keyboard(open_tab: Open) -> None:
    page = open_tab(360).page
    wide = page.locator(".scroll:has(#compared), .scroll:has(#guests-table)").first
    wide.focus()
    page.keyboard.press("ArrowRight")
    # wait_for_function would be an eval in the page, which its policy forbids.
    wide.evaluate(
        "box => new Promise(done => box.scrollLeft > 0 ? done()"
        " : box.addEventListener('scroll', () => done(), {once: true}))"
    )
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")


# Text against what is behind it, and the least ratio that WCAG 2.2 (1.4.3) allows.
CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    const rgb = colour => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return canvas.getImageData(0, 0, 1, 1).data;
    };
    const luminance = colour => {
        const [r, g, b] = [...rgb(colour)].slice(0, 3).map(one => one / 255).map(
            one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = one => {
        for (; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if (rgb(colour)[3] === 255) return colour;
        }
        return 'Canvas';
    };
    const ratio = (a, b) => {
        const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05);
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const one = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !one.checkVisibility()) continue;
        if (one.closest('title, desc')) continue;
        const style = getComputedStyle(one);
        const colour = one.closest('svg') ? style.fill : style.color;
        found.push(['text', one.textContent.slice(0, 40), ratio(colour, behind(one))]);
    }
    for (const one of document.querySelectorAll('svg [class*="-c"]')) {
        const style = getComputedStyle(one);
        const name = one.getAttribute('class');
        const colour = name.includes('fill-c') ? style.fill : style.stroke;
        found.push(['line', name, ratio(colour, behind(one))]);
    }
    return found;
}"""
LEAST = {"text": 4.5, "line": 3.0}


def too_faint(page: Page) -> list[Any]:
    found = page.evaluate(CONTRAST)
    assert {kind for kind, _what, _ratio in found} == {"text", "line"}
    assert len(found) > 300
    return [one for one in found if one[2] < LEAST[one[0]]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_have_contrast(open_tab: Open, scheme: Literal["light", "dark"]) -> None:
    page = opened(open_tab(1280, scheme))
    assert too_faint(page) == []
    # Control: of a page that is grey, both kinds are noticed.
    page.evaluate(
        """() => {
            const sheet = new CSSStyleSheet();
            sheet.replaceSync('.chart { background: #808080 !important }');
            document.adoptedStyleSheets = [sheet];
        }"""
    )
    assert {kind for kind, _what, _ratio in too_faint(page)} == {"text", "line"}


def test_schemes_differ(open_tab: Open) -> None:
    colours = {
        page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('svg .fill-c1')).fill].join()"
        )
        for page in (open_tab(1280, scheme).page for scheme in SCHEMES)
    }
    assert len(colours) == 2


@pytest.mark.parametrize("width", WIDTHS)
def test_text_of_charts_is_in_them(open_tab: Open, width: int) -> None:
    """The page's font is another than the one that Matplotlib measured; it fits all the same."""
    page = open_tab(width).page
    outside = page.evaluate(
        """() => [...document.querySelectorAll('svg text')].filter(one => {
            const a = one.getBoundingClientRect();
            const b = one.closest('figure').getBoundingClientRect();
            return a.width === 0 || a.left < b.left || a.right > b.right
                || a.top < b.top || a.bottom > b.bottom;
        }).map(one => one.textContent)"""
    )
    assert outside == []
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect().height)"
    )
    assert min(sizes) > 100


def test_on_paper_there_is_nothing_to_click(open_tab: Open) -> None:
    page = open_tab(680).page  # what A4 leaves between its margins
    page.emulate_media(media="print")
    assert page.evaluate(OVERFLOW) == 0
    for selector in ("nav", ".skip", "summary", "pre"):
        assert not page.locator(selector).first.is_visible()
    assert page.locator("h1").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")
