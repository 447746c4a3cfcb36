# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever is searched for is found, wherever it lies, once, and with its place."""

from __future__ import annotations

import itertools
import os
import random
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.dump.aes_keys import Form
from mktme.dump.image import CHUNK_BYTES, DumpChangedError, DumpImage
from mktme.dump.patterns import MAX_MATCH_BYTES, Pattern, PatternError, Searcher
from mktme.dump.search import SearchReport, search
from mktme.engine.errors import MktmeError
from mktme.engine.sidecar import GuestSegment

from .conftest import PAGE, VM_BASE, VM_BYTES, VM_KEYID, MakeImage, describe
from .key_schedules import linux_context, schedule

PAGES = 8
SIZE = PAGES * PAGE
NOISE = random.Random(1).randbytes(SIZE)
KEY = random.Random(2).randbytes(32)


@contextmanager
def raw_image(memory: bytes | bytearray, pages: set[int] | None = None) -> Iterator[DumpImage]:
    """An image of which some pages are data, and the others a hole; None: those not of zeros."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "memory"
        with path.open("wb") as file:
            os.truncate(file.fileno(), len(memory))
            for at in range(0, len(memory), PAGE):
                page = memory[at : at + PAGE]
                if any(page) if pages is None else at // PAGE in pages:
                    os.pwrite(file.fileno(), page, at)
        with DumpImage.open_raw(path) as image:
            yield image


def places(
    image: DumpImage, searcher: Searcher, chunk_bytes: int = CHUNK_BYTES, jobs: int | None = None
) -> list[tuple[int, int]]:
    """First byte, and the first behind, of whatever is found."""
    report = search(image, searcher, limit=1 << 20, chunk_bytes=chunk_bytes, jobs=jobs)
    assert report.counted
    assert report.more == 0
    return [(hit.address, hit.address + hit.size_bytes) for hit in report.hits]


# --- what is found ----------------------------------------------------------------------------


@given(
    st.binary(min_size=1, max_size=5),
    st.lists(st.sampled_from([b"\0", b"ab", b"a", b"\xff", bytes(PAGE - 3)]), max_size=60),
    st.sampled_from([PAGE, 2 * PAGE, CHUNK_BYTES]),
    st.integers(1, 3),
)
def test_bytes_are_found_at_each_place(
    wanted: bytes, parts: list[bytes], chunk_bytes: int, jobs: int
) -> None:
    """Against a search of the whole at once; what is in holes alone is not told."""
    memory = b"".join(parts)[: 4 * PAGE].ljust(4 * PAGE, b"\0")
    written = [any(memory[at : at + PAGE]) for at in range(0, len(memory), PAGE)]
    with raw_image(memory) as image:
        found = places(
            image, Searcher([Pattern.hexadecimal(wanted.hex())]), chunk_bytes=chunk_bytes, jobs=jobs
        )
    assert found == [
        (at, at + len(wanted))
        for at in range(len(memory) - len(wanted) + 1)
        if memory.startswith(wanted, at)
        and any(written[at // PAGE : (at + len(wanted) - 1) // PAGE + 1])
    ]


@given(
    st.integers(0, SIZE - 240),
    st.sampled_from([16, 24, 32]),
    st.sets(st.integers(0, PAGES - 1)),
    st.sampled_from([PAGE, 3 * PAGE, CHUNK_BYTES]),
)
def test_key_schedule_anywhere(at: int, key_bytes: int, noise: set[int], chunk_bytes: int) -> None:
    """Across pages and pieces, beside holes, and at the very ends."""
    content = schedule(KEY[:key_bytes])
    memory = bytearray(SIZE)
    for page in noise:
        memory[page * PAGE : (page + 1) * PAGE] = NOISE[page * PAGE : (page + 1) * PAGE]
    memory[at : at + len(content)] = content
    with raw_image(memory) as image:
        report = search(image, Searcher([], aes_keys=True), chunk_bytes=chunk_bytes)
    (hit,) = report.hits
    assert (hit.address, hit.size_bytes) == (at, len(content))
    assert hit.key is not None
    assert (hit.key.bits, hit.key.form, hit.key.key) == (8 * key_bytes, Form.ENCRYPTION, None)


@pytest.mark.parametrize("at", [0, SIZE - 240, PAGE - 1, PAGE - 239, 2 * PAGE, 3])
def test_key_schedule_at_the_ends(at: int) -> None:
    memory = bytearray(NOISE)
    memory[at : at + 240] = schedule(KEY)
    with raw_image(memory) as image:
        searcher = Searcher([], aes_keys=True)
        assert places(image, searcher, chunk_bytes=PAGE) == [(at, at + 240)]


def test_noise_and_zeros_hold_nothing() -> None:
    with raw_image(NOISE + bytes(SIZE), {*range(2 * PAGES)}) as image:
        searcher = Searcher([Pattern.text("mktme"), Pattern.regex("mk+tme")], aes_keys=True)
        report = search(image, searcher)
    assert (report.hits, report.more, report.searched_bytes) == ((), 0, 2 * SIZE)


# A beginning each, and as far as it goes: what Python's re finds as well.
EXPRESSIONS = [
    r"ab+c",
    r"[0-9]{2,9}x",
    r"\bcat\b",
    r"^cat",
    r"cat$",
    r"(?i)cAt\n",
    r"\x00\x01",
    r"[^\x00]\x00",
    r"(ab|ba){2,}c",
]
WORDS = [b"ab", b"b", b"c", b"cat", b"CAT", b"\n", b" ", b"\0", b"\1", b"12", b"x", b"ba"]


@given(
    st.lists(st.sampled_from(WORDS) | st.integers(0, 40).map(bytes), min_size=1, max_size=80),
    st.integers(0, 200),
    st.sampled_from([b".", b"\0"]),
)
def test_expressions_are_found_across_borders(words: list[bytes], back: int, around: bytes) -> None:
    """The same as in one piece, and as Python finds; into holes as well, but not in them alone."""
    text = b"".join(words)
    memory = bytearray(around * (3 * PAGE))
    at = PAGE - min(back, PAGE)
    memory[at : at + len(text)] = text
    data = [any(memory[page : page + PAGE]) for page in range(0, len(memory), PAGE)]
    with raw_image(memory) as image:
        for expression in EXPRESSIONS:
            searcher = Searcher([Pattern.regex(expression)], max_match_bytes=300)
            found = places(image, searcher, chunk_bytes=PAGE)
            assert found == places(image, searcher)
            compiled = re.compile(expression.encode(), re.M)
            theirs = (compiled.match(memory, at) for at in range(len(memory)))
            reached: dict[int, int] = {}  # by end: the leftmost beginning
            for one in theirs:
                if one is not None:
                    reached.setdefault(one.end(), one.start())
            assert dict(found) == {
                start: end
                for end, start in reached.items()
                if any(data[start // PAGE : (end - 1) // PAGE + 1])
            }, expression


def test_matches_of_an_expression() -> None:
    memory = b"...foo..foo..bar.bar..".ljust(PAGE, b".") + b"x" * PAGE
    with raw_image(memory) as image:

        def found(expression: str, longest: int = 4096) -> list[tuple[int, int]]:
            searcher = Searcher([Pattern.regex(expression)], max_match_bytes=longest)
            return places(image, searcher, chunk_bytes=PAGE)

        assert found("foo.*bar") == [(3, 20)]
        assert found("foo.*bar", 15) == [(3, 16), (8, 20)]
        assert found("foo.*?bar", 12) == [(8, 20)]
        assert found("foo.*?bar", 11) == [(8, 16)]
        assert found("foo.*?bar", 7) == []
        assert found("^.*bar", 12) == []
        assert found(r"\.foo.*bar", 12) == [(7, 16)]
        assert found(r"\Bfoo.*bar", 12) == []
        assert found(r"\bfoo.*bar", 12) == [(8, 20)]
        assert found("foo") == [(3, 6), (8, 11)]
        assert found("x+") == [(PAGE, 2 * PAGE)]
        assert found("x+", 100) == [(PAGE, PAGE + 100)]
        assert found(r"\A\.+f") == [(0, 4)]
        assert found(r"\Af") == []
        assert found(r"x{3}\z") == [(2 * PAGE - 3, 2 * PAGE)]
        assert found(r"(?s)\.x{20}", 21) == [(PAGE - 1, PAGE + 20)]


@given(
    st.lists(st.sampled_from([b"foo", b"bar", b".", b"\n"]), max_size=60),
    st.sampled_from(
        ["foo.*bar", "foo.*?bar", r"foo[\s\S]*?bar", "foo.*", r"\bfoo[^b]*ba", "^foo.*r"]
    ),
    st.integers(4, 60),
)
def test_what_is_too_long_hides_nothing(words: list[bytes], expression: str, longest: int) -> None:
    text = b"".join(words)
    memory = bytearray(b"." * (3 * PAGE))
    at = PAGE - len(text) // 2
    memory[at : at + len(text)] = text
    compiled = re.compile(expression.encode(), re.M)
    theirs: dict[int, int] = {}
    for end in range(at, at + len(text) + longest):
        near = range(max(0, end - longest), end)
        first = next((one for one in near if compiled.fullmatch(memory, one, end)), None)
        if first is not None:
            theirs[first] = end
    with raw_image(memory) as image:
        searcher = Searcher([Pattern.regex(expression)], max_match_bytes=longest)
        found = places(image, searcher)
        assert dict(found) == theirs
        assert found == places(image, searcher, chunk_bytes=PAGE)


def test_two_keys_that_are_apart() -> None:
    begin, end = b"-----BEGIN RSA PRIVATE KEY-----", b"-----END RSA"
    memory = bytearray(NOISE)
    for at in (100, 100 + (10 << 10)):
        memory[at : at + 1700] = begin + b"k" * (1700 - len(begin) - len(end)) + end
    with raw_image(memory) as image:
        searcher = Searcher([Pattern.regex(r"BEGIN RSA[\s\S]*?END RSA")])
        assert places(image, searcher) == [(105, 1800), (10 * 1024 + 105, 10 * 1024 + 1800)]


def test_long_run_over_several_pieces_is_one_match() -> None:
    with raw_image(b"." * 10 + b"y" * (4 * PAGE) + b"." * (PAGE - 10)) as image:
        searcher = Searcher([Pattern.regex("y+")])
        assert places(image, searcher, chunk_bytes=PAGE) == [(10, 10 + 4096)]


def test_text() -> None:
    words = "Größe 10".encode() + b"\0" + "Größe 10".encode("utf-16-le") + b"\0gr\xc3\xb6\xc3\x9fe"
    with raw_image(words.ljust(PAGE, b"\0")) as image:

        def found(text: str, *encoding: str, ignore_case: bool = False) -> list[int]:
            pattern = Pattern.text(text, *encoding, ignore_case=ignore_case)  # type: ignore[arg-type]
            return [start for start, _end in places(image, Searcher([pattern]))]

        assert found("Größe") == [0]
        assert found("größe", ignore_case=True) == [0, 28]
        assert found("Größe 10", "utf-16-le") == [11]
        assert found("gRÖSSE", "utf-16-le", ignore_case=True) == []
        assert found("gröSSe 10".replace("SS", "ß"), "utf-16-le", ignore_case=True) == [11]
        assert found(".") == []
        assert found("\udcc3\udcb6") == [2, 30]  # bytes that are no text of an argument


def test_names_are_what_was_typed() -> None:
    assert Pattern.regex(r"\d+\x00").name == r"regex '\d+\x00'"
    assert Pattern.text("é\n\x1b[2J").name == r"text 'é\n\x1b[2J'"
    assert Pattern.hexadecimal("DEad beef").name == "bytes de ad be ef"


def test_several_patterns_at_one_place() -> None:
    with raw_image(b"needle".ljust(PAGE, b"\0")) as image:
        patterns = [Pattern.text("need"), Pattern.hexadecimal("6e 65"), Pattern.regex("n.+e")]
        report = search(image, Searcher(patterns, aes_keys=True))
    assert [(hit.address, hit.size_bytes, hit.pattern) for hit in report.hits] == [
        (0, 2, "bytes 6e 65"),
        (0, 4, "text 'need'"),
        (0, 6, "regex 'n.+e'"),
    ]
    assert [bytes.fromhex(hit.excerpt or "") for hit in report.hits] == [b"ne", b"need", b"needle"]
    assert report.patterns == ("text 'need'", "bytes 6e 65", "regex 'n.+e'", "AES key schedules")


@pytest.mark.parametrize("size", [1, 255, 1000, 3000])
def test_long_bytes(size: int) -> None:
    with raw_image(NOISE) as image:
        searcher = Searcher([Pattern.hexadecimal(NOISE[100 : 100 + size].hex())])
        found = places(image, searcher, chunk_bytes=PAGE)
        assert (100, 100 + size) in found
        assert len(found) == 1 or size == 1


# --- where it is ------------------------------------------------------------------------------


def test_place_in_a_vm(make_image: MakeImage) -> None:
    """On a machine with a PCI hole: RAM's second half is at 4 GiB."""
    record = describe()
    half = VM_BYTES // 2
    segments = (
        GuestSegment(guest_physical=0, ram_offset=0, size_bytes=half),
        GuestSegment(guest_physical=4 << 30, ram_offset=half, size_bytes=half - PAGE),
    )
    (vm,) = record.vms
    record = msgspec.structs.replace(record, vms=(msgspec.structs.replace(vm, segments=segments),))
    at = [0x123, VM_BASE + 5, VM_BASE + half + 7, VM_BASE + VM_BYTES - PAGE, VM_BASE + VM_BYTES]
    path = make_image({address - address % PAGE: bytes(PAGE) for address in at}, record)
    with path.open("r+b") as file:
        for address in at:
            os.pwrite(file.fileno(), b"needle", address)
    with DumpImage.open(path) as image:
        report = search(image, Searcher([Pattern.text("needle")]))
    assert [(hit.address, hit.keyid, hit.vm, hit.guest_physical) for hit in report.hits] == [
        (at[0], 0, None, None),
        (at[1], VM_KEYID, "alice", 5),
        (at[2], VM_KEYID, "alice", (4 << 30) + 7),
        (at[3], VM_KEYID, "alice", None),
        (at[4], 0, None, None),
    ]


def test_keys_of_a_kernel_and_their_pair() -> None:
    tweak, key = random.Random(3).randbytes(32), KEY
    # struct aesni_xts_ctx: each context aligned to 16.
    memory = bytes(PAGE - 100) + linux_context(tweak).ljust(496, b"\0") + linux_context(key)
    with raw_image(memory.ljust(3 * PAGE, b"\0")) as image:
        searcher = Searcher([], aes_keys=True)
        hidden = search(image, searcher, chunk_bytes=PAGE)
        shown = search(image, searcher, chunk_bytes=PAGE, show_keys=True)
    first = PAGE - 100
    found = [
        (hit.address, hit.key.form, hit.key.xts_partner, hit.key.key)
        for hit in shown.hits
        if hit.key is not None
    ]
    assert found == [
        (first, Form.ENCRYPTION, first + 496, tweak.hex()),
        (first + 240, Form.DECRYPTION, first + 496, tweak.hex()),
        (first + 496, Form.ENCRYPTION, first, key.hex()),
        (first + 736, Form.DECRYPTION, first, key.hex()),
    ]
    document = msgspec.json.encode(hidden).decode()
    for secret in (tweak, key):
        assert secret.hex()[:16] not in document + repr(hidden)
        assert repr(secret)[2:20] not in repr(hidden)


# --- how much of it ---------------------------------------------------------------------------


def test_limit_says_how_many_more() -> None:
    memory = b"needle..".ljust(64, b".") * (SIZE // 64)
    with raw_image(memory) as image:
        searcher = Searcher([Pattern.text("needle")])
        reports = [
            search(image, searcher, limit=limit, chunk_bytes=PAGE) for limit in (1, 10, SIZE)
        ]
    assert [(len(one.hits), one.more) for one in reports] == [(1, 511), (10, 502), (512, 0)]
    for report in reports:
        assert [hit.address for hit in report.hits] == [64 * at for at in range(len(report.hits))]


def test_what_is_everywhere_is_not_counted_to_the_end() -> None:
    with raw_image(b"a" * (8 * PAGE)) as image:
        report = search(image, Searcher([Pattern.text("a")]), limit=3, chunk_bytes=4 * PAGE)
        assert [hit.address for hit in report.hits] == [0, 1, 2]
        assert not report.counted
        assert 3 + report.more < 8 * PAGE
        assert len(places(image, Searcher([Pattern.text("a")]))) == 8 * PAGE


def test_large_sparse_image_is_what_was_written_of_it(tmp_path: Path) -> None:
    path = tmp_path / "dram"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 64 << 30)
        for at in (0, 31 << 30, (64 << 30) - PAGE):
            os.pwrite(file.fileno(), b"x" + b"needle", at + PAGE - 7)
    seen: list[tuple[int, int]] = []
    with DumpImage.open_raw(path) as image:
        report = search(
            image,
            Searcher([Pattern.text("needle")], aes_keys=True),
            progress=lambda done, total: seen.append((done, total)),
        )
    assert [hit.address for hit in report.hits] == [
        PAGE - 6,
        (31 << 30) + PAGE - 6,
        (64 << 30) - 6,
    ]
    assert report.searched_bytes == 3 * PAGE
    assert seen[-1] == (3 * PAGE, 3 * PAGE)


def test_threads_share_a_searcher() -> None:
    """Scratch memory is each thread's own, and results come in order."""
    memory = np.frombuffer(NOISE * 8, np.uint8).copy()
    at = list(range(1000, len(memory), 5000))
    for one in at:
        memory[one : one + 6] = np.frombuffer(b"needle", np.uint8)
    with raw_image(memory.tobytes()) as image:
        searcher = Searcher([Pattern.text("needle"), Pattern.regex("ne{2}dle")], aes_keys=True)
        for _round in range(5):
            found = places(image, searcher, chunk_bytes=PAGE, jobs=8)
            assert found == [(one, one + 6) for one in at for _pattern in range(2)]
    assert not [one for one in threading.enumerate() if one.name.startswith("search")]


# --- what is refused --------------------------------------------------------------------------


def test_image_that_changes_while_it_is_searched(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(NOISE)

    def meddle(_done: int, _total: int) -> None:
        with path.open("r+b") as file:
            file.write(b"!")

    with (
        DumpImage.open_raw(path) as image,
        pytest.raises(DumpChangedError, match="changed while it was read"),
    ):
        search(image, Searcher([Pattern.text("needle")]), progress=meddle)


def test_image_that_shrinks_while_it_is_searched(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(NOISE)

    def meddle(_done: int, _total: int) -> None:
        os.truncate(path, PAGE)

    with (
        DumpImage.open_raw(path) as image,
        pytest.raises(DumpChangedError, match=r"cut short|changed while it was read"),
    ):
        search(image, Searcher([Pattern.text("x")]), progress=meddle, chunk_bytes=PAGE, jobs=1)


REFUSED = {
    "empty text": (lambda: Pattern.text(""), "text '': it is empty"),
    "no bytes": (lambda: Pattern.hexadecimal(" "), "bytes: it is empty"),
    "half a byte": (lambda: Pattern.hexadecimal("abc"), "'abc' are no bytes in hexadecimal"),
    "no digits": (lambda: Pattern.hexadecimal("0x12"), "'0x12' are no bytes"),
    "text that is none": (lambda: Pattern.text("\udcff", "utf-16-le"), "has no form in utf-16-le"),
    "empty expression": (lambda: Pattern.regex(""), "is empty"),
    "NUL": (lambda: Pattern.regex("a\0b"), "holds a NUL"),
    "nothing": (lambda: Searcher([]), "nothing to look for"),
    "matches nothing": (lambda: Searcher([Pattern.regex("a*")]), "it matches the empty string"),
    "an assertion": (lambda: Searcher([Pattern.regex("^")]), "it matches the empty string"),
    "bad syntax": (lambda: Searcher([Pattern.regex("a(b")]), r"regex 'a\(b': missing close"),
    "back-reference": (
        lambda: Searcher([Pattern.text("ok"), Pattern.regex(r"(a)\1")]),
        r"regex '\(a\)\\1': back-references are unsupported",
    ),
    "look-behind": (lambda: Searcher([Pattern.regex("(?<=a)b")]), "zero-width assertions"),
    "too large": (lambda: Searcher([Pattern.regex("[a-z]{9,9999}")]), "pattern is too large"),
    "too long": (lambda: Searcher([Pattern.hexadecimal("12" * 9999)]), "pattern length exceeds"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_looked_for(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(PatternError, match=message) as refused:
        make()
    assert isinstance(refused.value, MktmeError)
    assert len(str(refused.value)) < 160


def test_numbers_out_of_range() -> None:
    for longest in (0, MAX_MATCH_BYTES + 1):
        with pytest.raises(ValueError, match="matches have 1 to"):
            Searcher([Pattern.text("a")], max_match_bytes=longest)
    for errors in (-1, 13):
        with pytest.raises(ValueError, match="0 to 12 bits"):
            Searcher([], aes_keys=True, max_errors=errors)


def test_schema_is_of_the_report() -> None:
    with raw_image(NOISE) as image:
        report = search(image, Searcher([Pattern.hexadecimal(NOISE[5:9].hex())], aes_keys=True))
    document = msgspec.json.encode(report)
    assert msgspec.json.decode(document, type=SearchReport) == report
    assert list(itertools.islice(msgspec.json.decode(document), 2)) == ["schema", "version"]
