# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that look encrypted, those that do not, and readers that find the same in them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from math import log
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mktme.dump.analysis import Tally
from mktme.dump.cluster import HERE, Source, Workers, fold, read_pages
from mktme.dump.image import DumpChangedError, DumpError, DumpImage
from mktme.dump.randomness import chi_square_p
from mktme.dump.stats import StatsReport, Verdict, ZoneStats, dump_stats, merge_tallies
from mktme.dump.zones import EXCLUDED, Zones
from mktme.engine.dram import Region
from mktme.engine.keys import KeyDescription, KeyMode
from mktme.engine.sidecar import ExclusionRecord, ModuleRecord, PageRange, sidecar_path
from mktme.engine.xts import Algorithm

from .conftest import DRAM_BYTES, PAGE, VM_BASE, VM_BYTES, VM_KEYID, MakeImage, describe
from .contents import counter, encrypt, encrypt_without_addresses, prose

PLAINTEXT = prose(VM_BYTES)
CLEAR = 5
"""A KeyID without encryption, for the VM's last 64 KiB."""
CLEAR_BYTES = 64 << 10
CLEAR_BASE = VM_BASE + VM_BYTES - CLEAR_BYTES


def zone(report: StatsReport, keyid: int, *, excluded: bool = False) -> ZoneStats:
    (found,) = (one for one in report.keyids if (one.keyid, one.excluded) == (keyid, excluded))
    return found


def with_line(line: bytes) -> bytes:
    """Ciphertext but for one line, in the middle of it."""
    ciphertext = encrypt(PLAINTEXT, VM_BASE)
    at = VM_BYTES // 4 + 64
    return ciphertext[:at] + line + ciphertext[at + 64 :]


def shifted_copies() -> bytes:
    """Noise, some of which comes again in each page, but not as a whole block of the cipher."""
    rng = random.Random(2)
    pages = []
    for _ in range(VM_BYTES // PAGE):
        page = rng.randbytes(PAGE - 200)
        pages.append(page[:1000] + page[:200] + page[1000:])
    return b"".join(pages)


def test_ciphertext_looks_encrypted(make_image: MakeImage) -> None:
    path = make_image({VM_BASE: encrypt(PLAINTEXT, VM_BASE)})
    report = dump_stats(Source(path))
    vm = zone(report, VM_KEYID)
    assert vm.verdict is Verdict.ENCRYPTED
    assert vm.reasons == ()
    assert report.passed
    assert (vm.pages, vm.pages_written, vm.vms) == (VM_BYTES // PAGE, VM_BYTES // PAGE, ("alice",))
    assert (vm.mode, vm.algorithm) == (KeyMode.DIRECT, Algorithm.AES_XTS_256)
    assert vm.entropy == pytest.approx(vm.entropy_of_random, abs=5e-4)
    assert vm.page_entropy == pytest.approx(vm.page_entropy_of_random, abs=2e-3)
    assert sum(vm.byte_histogram) == VM_BYTES
    assert sum(vm.page_histogram) == vm.pages
    assert vm.blocks.one_in == 1
    assert vm.blocks.counted == VM_BYTES // 16
    assert vm.compression.ratio == pytest.approx(1.003, abs=0.003)
    rest = zone(report, 0)
    assert (rest.verdict, rest.pages_written) == (Verdict.EMPTY, 0)
    assert rest.pages == (DRAM_BYTES - VM_BYTES) // PAGE
    assert rest.chi_square is rest.p_value is rest.compression.ratio is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (PLAINTEXT, "pages have too little entropy, the first at 0x40000"),
        (PLAINTEXT, "bytes not equally frequent"),
        (encrypt_without_addresses(PLAINTEXT[:PAGE] * 128), "8,192 of 8,192 lines come more"),
        (counter(VM_BYTES), "bytes more equally frequent than by chance"),
        (
            encrypt(PLAINTEXT[:-PAGE], VM_BASE) + PLAINTEXT[:PAGE],
            "1 of 128 pages have too little entropy, the first at 0xbf000",
        ),
        (random.Random(1).randbytes(VM_BYTES // 2 - 16) * 2 + bytes(32), "16-byte blocks come mor"),
        (with_line(PLAINTEXT[:64]), "67 printable characters of ASCII in a row, at 0x6003e"),
        (with_line(PLAINTEXT[:32].decode().encode("utf-16le")), "32 printable characters of UTF-1"),
        (shifted_copies(), "zlib makes it smaller: 96."),
    ],
    ids=[
        "plaintext",
        "plaintext-bytes",
        "no-tweak",
        "counter",
        "one-page",
        "copy",
        "one-line",
        "one-line-of-utf16",
        "shifted-copy",
    ],
)
def test_what_is_to_be_encrypted_and_is_not(
    make_image: MakeImage, content: bytes, reason: str
) -> None:
    """The control: each test notices what it is there for."""
    report = dump_stats(Source(make_image({VM_BASE: content})))
    vm = zone(report, VM_KEYID)
    assert vm.verdict is Verdict.STRUCTURED
    assert any(reason in one for one in vm.reasons), vm.reasons
    assert not report.passed


def test_memory_that_is_not_to_be_encrypted(make_image: MakeImage) -> None:
    record = describe()
    pages = (
        *record.pages[:1],
        PageRange(base=VM_BASE, size_bytes=VM_BYTES - CLEAR_BYTES, keyid=VM_KEYID),
        PageRange(base=CLEAR_BASE, size_bytes=CLEAR_BYTES, keyid=CLEAR),
        *record.pages[2:],
    )
    clear = KeyDescription(keyid=CLEAR, mode=KeyMode.NO_ENCRYPT, algorithm=None)
    record = msgspec.structs.replace(record, pages=pages, keys=(*record.keys, clear))
    encrypted = encrypt(PLAINTEXT[:-CLEAR_BYTES], VM_BASE)
    report = dump_stats(Source(make_image({VM_BASE: encrypted + PLAINTEXT[-CLEAR_BYTES:]}, record)))
    assert zone(report, VM_KEYID).verdict is Verdict.ENCRYPTED
    open_ = zone(report, CLEAR)
    assert (open_.verdict, open_.algorithm, open_.mode) == (
        Verdict.STRUCTURED,
        None,
        KeyMode.NO_ENCRYPT,
    )
    assert open_.pages == open_.pages_written == open_.pages_structured == CLEAR_BYTES // PAGE
    assert open_.first_structured == CLEAR_BASE
    (ascii_strings, _) = open_.strings
    assert ascii_strings.found == CLEAR_BYTES // PAGE
    assert ascii_strings.longest[0].chars == PAGE
    assert report.passed


def test_part_of_keyid_0_that_is_excluded(make_image: MakeImage) -> None:
    """0xC0000 to 0xDFFFF is plaintext, and what is around it is not."""
    base, size = 0xC0000, 0x20000
    mask = (1 << 40) - size
    record = msgspec.structs.replace(describe(), exclusion=ExclusionRecord(mask=mask, base=base))
    data = {base: PLAINTEXT[:size], base + size: encrypt(PLAINTEXT[:PAGE], base + size)}
    report = dump_stats(Source(make_image(data, record)))
    out, rest = zone(report, 0, excluded=True), zone(report, 0)
    assert (out.pages, out.pages_written, out.algorithm) == (size // PAGE, size // PAGE, None)
    assert out.verdict is Verdict.STRUCTURED
    assert (rest.verdict, rest.pages_written) == (Verdict.ENCRYPTED, 1)
    assert rest.pages == (DRAM_BYTES - VM_BYTES - size) // PAGE
    assert report.passed
    assert sum(one.pages for one in report.keyids) == report.pages


def test_limits_are_of_the_whole_image(make_image: MakeImage) -> None:
    """The more pages and KeyIDs, the more comes by chance: limits leave room for it."""
    one = dump_stats(Source(make_image({VM_BASE: encrypt(PLAINTEXT, VM_BASE)})))
    more = {VM_BASE: encrypt(PLAINTEXT, VM_BASE), 0: encrypt(PLAINTEXT[:PAGE], 0)}
    two = dump_stats(Source(make_image(more, name="two")))
    assert one.thresholds.p_value == 1e-6
    assert two.thresholds.p_value == 5e-7
    # A whole page that is that uneven: its chi-square's tail times the pages of 64 GiB.
    deficit = 8 - one.thresholds.whole_page_entropy
    assert chi_square_p(2 * PAGE * log(2) * deficit) * (1 << 24) < 1e-3


def test_little_memory_says_little(make_image: MakeImage) -> None:
    report = dump_stats(Source(make_image({VM_BASE: encrypt(PLAINTEXT[: 19 * 64], VM_BASE)})))
    assert zone(report, VM_KEYID).verdict is Verdict.LITTLE
    assert report.passed
    # And yet a page of text is none of a random one's.
    report = dump_stats(Source(make_image({VM_BASE: PLAINTEXT[: 19 * 64]}, name="text")))
    assert zone(report, VM_KEYID).verdict is Verdict.STRUCTURED


def test_file_that_nothing_describes(tmp_path: Path) -> None:
    path = tmp_path / "memory.raw"
    path.write_bytes(PLAINTEXT + bytes(PAGE) + b"and a tail of less than a page")
    report = dump_stats(Source(path, raw=True))
    (whole,) = report.keyids
    assert not report.described
    assert (whole.mode, whole.algorithm, whole.vms) == (None, None, ())
    assert report.pages == whole.pages == VM_BYTES // PAGE + 2
    assert whole.pages_written == VM_BYTES // PAGE + 1
    assert whole.verdict is Verdict.STRUCTURED
    assert report.passed  # nothing says that it is to be encrypted
    with pytest.raises(DumpError, match="nothing says how"):
        dump_stats(Source(path))


def test_nothing_was_written(make_image: MakeImage) -> None:
    report = dump_stats(Source(make_image({})))
    assert report.pages_written == report.lines_written == 0
    assert {one.verdict for one in report.keyids} == {Verdict.EMPTY}
    assert report.passed


def test_zeros_that_are_no_holes_change_nothing(make_image: MakeImage) -> None:
    """A copy that is not sparse."""
    path = make_image({VM_BASE: encrypt(PLAINTEXT, VM_BASE)})
    sparse = dump_stats(Source(path))
    path.write_bytes(path.read_bytes())
    assert dump_stats(Source(path)) == sparse


def test_nvdimm(make_image: MakeImage, tmp_path: Path) -> None:
    (tmp_path / "nvdimm.img").write_bytes(PLAINTEXT[: 8 * PAGE])
    module = ModuleRecord(base=2 * PAGE, size_bytes=8 * PAGE, file="nvdimm.img")
    record = msgspec.structs.replace(describe(), modules=(module,))
    report = dump_stats(Source(make_image({}, record)))
    assert zone(report, 0).pages_structured == 8
    assert zone(report, 0).first_structured == 2 * PAGE


# --- readers ----------------------------------------------------------------------------------


@pytest.fixture
def scattered(make_image: MakeImage) -> Source:
    """Some of everything, in runs of all sizes."""
    rng = random.Random(11)
    data: dict[int, bytes] = {}
    at = 0
    while at < DRAM_BYTES - 40 * PAGE:
        pages = rng.choice((1, 1, 2, 5, 20))
        kind = rng.randrange(3)
        if kind == 0:
            data[at] = rng.randbytes(pages * PAGE)
        elif kind == 1:
            data[at] = prose(pages * PAGE, rng.randrange(3))
        at += (pages + rng.randrange(3)) * PAGE
    return Source(make_image(data))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("task_bytes", [PAGE, 7 * PAGE, DRAM_BYTES])
def test_however_it_is_cut_up_and_whoever_reads_it(
    scattered: Source, threads: int, task_bytes: int
) -> None:
    report = dump_stats(scattered, Workers(threads=threads, task_bytes=task_bytes))
    assert msgspec.json.encode(report) == msgspec.json.encode(dump_stats(scattered, HERE))
    assert report.lines.repeated > 0
    assert report.pages_written > 80


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    from distributed import LocalCluster

    with LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address


def test_cluster_finds_the_same(scattered: Source, scheduler: str) -> None:
    assert scheduler.startswith("tcp://")
    report = dump_stats(scattered, Workers(scheduler=scheduler, task_bytes=20 * PAGE))
    assert msgspec.json.encode(report) == msgspec.json.encode(dump_stats(scattered, HERE))


def test_error_on_a_cluster_is_the_same(scattered: Source, scheduler: str) -> None:
    def gone(_regions: tuple[Region, ...]) -> dict[int, Tally]:
        raise DumpError("the worker does not have it", hint="share it")

    regions = [Region(0, PAGE)]
    with pytest.raises(DumpError, match="does not have it") as caught:
        fold(regions, gone, merge_tallies, Workers(scheduler=scheduler))
    assert caught.value.hint == "share it"


def test_no_scheduler(scattered: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mktme.dump.cluster._CONNECT_TIMEOUT_S", 0.2)
    for address in ("tcp://127.0.0.1:1", "nonsense://", "127.0.0.1:x"):
        with pytest.raises(DumpError, match="no Dask scheduler answers at") as caught:
            dump_stats(scattered, Workers(scheduler=address))
        assert "dask scheduler" in (caught.value.hint or "")


def test_scheduler_without_workers(scattered: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    with LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=0, processes=False, protocol="tcp", dashboard_address=":0"
    ) as cluster:
        monkeypatch.setattr("mktme.dump.cluster._CONNECT_TIMEOUT_S", 1)
        address = cluster.scheduler_address
        with pytest.raises(DumpError, match=f"no worker at {address}") as caught:
            dump_stats(scattered, Workers(scheduler=address))
        assert caught.value.hint == f"dask worker {address} starts one"


def test_progress_goes_up_to_the_end(scattered: Source) -> None:
    told: list[tuple[int, int]] = []
    lock = threading.Lock()

    def progress(done: int, total: int) -> None:
        with lock:
            told.append((done, total))

    dump_stats(scattered, Workers(threads=2, task_bytes=8 * PAGE), progress)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] > 1


def test_image_that_changes_meanwhile(scattered: Source) -> None:
    def write(_done: int, _total: int) -> None:
        with scattered.path.open("r+b") as file:
            file.write(b"x")

    with pytest.raises(DumpChangedError, match="changed while it was read"):
        dump_stats(scattered, HERE, write)


def test_image_that_is_cut_short_meanwhile(scattered: Source) -> None:
    with scattered.open() as image:
        regions = [Region(0, image.size_bytes)]
        with scattered.path.open("r+b") as file:
            file.truncate(DRAM_BYTES // 2)
        with pytest.raises(DumpChangedError, match="cut short at 0x80000"):
            list(read_pages(image, regions))


def test_pages_are_read_in_whichever_portions(scattered: Source) -> None:
    with scattered.open() as image:
        regions = image.data_ranges()
        for some in (regions, list(image.pieces(3 * PAGE)), [Region(0, image.size_bytes)]):
            for pages, numbers in read_pages(image, some):
                for page, number in zip(pages, numbers.tolist(), strict=True):
                    assert page.tobytes() == image.read(number * PAGE, PAGE).tobytes()


def test_zones_are_the_keyids(make_image: MakeImage) -> None:
    record = describe()
    unsorted = (record.pages[1], PageRange(base=8 * PAGE, size_bytes=PAGE, keyid=9))
    record = msgspec.structs.replace(record, pages=unsorted)
    with DumpImage.open(make_image({}, record)) as image:
        numbers = np.arange(DRAM_BYTES // PAGE)
        zones = Zones(image)
        assert zones.of(numbers).tolist() == image.keyids().tolist()
        assert zones.sizes() == {0: 256 - 128 - 1, VM_KEYID: 128, 9: 1}
        assert EXCLUDED not in zones.sizes()
    assert sidecar_path(image.path).exists()
