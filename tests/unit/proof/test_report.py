# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports: a documented, versioned JSON, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from mktme.datapath.shadow import Track
from mktme.engine.errors import MktmeError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.bench import BenchReport
from mktme.proof.confidentiality import CanarySearch
from mktme.proof.isolation import IsolationMatrix
from mktme.proof.report import (
    SCHEMA_VERSION,
    Check,
    Environment,
    GuestReport,
    RunReport,
    encode,
    environment,
    json_schema,
    write_json,
)
from mktme.proof.transparency import MemoryComparison
from mktme.service.wire import Memory
from mktme.vm.doctor import DoctorReport
from mktme.vm.host import Host

from ..service.test_wire import TRAFFIC
from ..vm.test_domain_xml import IMAGE

GUEST = GuestReport(
    name="alice",
    role="guest",
    memory_bytes=512 << 20,
    vcpus=1,
    track=Track.STORES_AND_PAGES,
    algorithm=Algorithm.AES_XTS_128,
    key_mode=KeyMode.RANDOM,
    keyid=1,
    dram_base=0,
    boot_s=2.5,
    workload_s=3.5,
    checksums={"sha256": "00ff"},
    traffic=TRAFFIC,
    comparison=MemoryComparison(10, 5, 0, 0, 0, 0),
    canary=CanarySearch(4096, 1 << 20, 0, None),
)
PLAIN = dataclasses.replace(
    GUEST,
    name="plain",
    role="plain",
    track=None,
    algorithm=None,
    key_mode=None,
    keyid=None,
    dram_base=None,
    traffic=None,
    comparison=None,
    canary=None,
)
ENVIRONMENT = Environment(
    host_kernel="6.18",
    cpu="some",
    cores=2,
    memory_bytes=8 << 30,
    qemu="10.0.2",
    libvirt="11.3.0",
    libvirt_uri="qemu:///embed",
    guest="tiny",
    guest_kernel_package="linux-image-amd64",
    guest_kernel_version="6.1",
    guest_kernel_sha256="0" * 64,
)
REPORT = RunReport(
    schema="mktme.run",
    version=1,
    command="demo",
    started="2026-01-01T00:00:00+00:00",
    duration_s=30.0,
    passed=True,
    environment=ENVIRONMENT,
    guests=(GUEST, PLAIN),
    checks=(Check("isolation", "alice and bob", "only its own", False, True, "none"),),
    isolation=IsolationMatrix(("alice", "bob"), (1, 2), ((True, False), (False, True))),
    engine_memory=Memory(anonymous=1, file=2, shared=3, peak=4),
    dram=None,
    sidecar=None,
    notices=(),
)


def test_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, REPORT)
    data = path.read_bytes()
    assert msgspec.json.decode(data, type=RunReport) == REPORT
    assert data.endswith(b"}\n")
    assert os.listdir(tmp_path) == ["out.json"]


def test_report_can_be_understood_by_others(tmp_path: Path) -> None:
    write_json(tmp_path / "out.json", REPORT)
    plain = json.loads((tmp_path / "out.json").read_text())
    assert (plain["schema"], plain["version"], plain["passed"]) == ("mktme.run", 1, True)
    guest = plain["guests"][0]
    assert (guest["track"], guest["algorithm"], guest["key_mode"]) == (
        "stores+pages",
        "aes-xts-128",
        "random",
    )
    assert guest["traffic"]["lines_stored"] == 7
    assert plain["guests"][1]["traffic"] is None
    assert plain["isolation"]["readable"] == [[True, False], [False, True]]


def test_numbers_in_a_row_are_on_one_line() -> None:
    numbers: list[object] = [[1, -2.5e-7], [[3], []], ["[\n1,\n2]", 4]]
    text = encode({"numbers": numbers}).decode()
    assert json.loads(text) == {"numbers": numbers}
    assert "[1, -2.5e-7]" in text
    assert "[3]" in text
    assert r"[\n1,\n2]" in text  # what a string says stays as it is
    assert len(text.splitlines()) == 13


@pytest.mark.parametrize("document", [RunReport, BenchReport, DoctorReport])
def test_schema_names_its_document_and_version(document: type) -> None:
    described = json.loads(json_schema(document))
    definition = described["$defs"][document.__name__]
    assert definition["properties"]["version"] == {"enum": [SCHEMA_VERSION]}
    (name,) = definition["properties"]["schema"]["enum"]
    assert name in ("mktme.run", "mktme.bench", "mktme.doctor")
    required = set(definition["required"])
    assert {"schema", "version"} < required <= set(definition["properties"])


def test_another_version_is_not_read_as_this_one() -> None:
    newer = json.loads(msgspec.json.encode(REPORT)) | {"version": 2}
    with pytest.raises(msgspec.ValidationError, match=r"\$\.version"):
        msgspec.json.decode(json.dumps(newer), type=RunReport)


def test_guest_says_what_its_counts_mean() -> None:
    for track in Track:
        guest = dataclasses.replace(GUEST, track=track)
        assert guest.counts_stores == track.stores
        assert guest.counts_pages == track.pages
    assert not PLAIN.counts_stores
    assert not PLAIN.counts_pages


def test_new_report_replaces_the_old_one_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"number": 1})
    with path.open() as reader:
        write_json(path, {"number": 2})
        assert json.load(reader) == {"number": 1}
    assert json.loads(path.read_text()) == {"number": 2}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o666)])
def test_report_is_as_readable_as_any_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "out.json", REPORT)
        assert os.umask(umask) == umask  # and is left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.json").stat().st_mode) == mode


def test_report_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, object())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_report_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    with pytest.raises(MktmeError, match="cannot write the report: Is a directory") as caught:
        write_json(tmp_path / "out.json", REPORT)
    assert "--json FILE" in str(caught.value.hint)
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("failing", ["chmod", "replace"])
def test_report_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "out.json"
    path.write_text("old")
    monkeypatch.setattr(os, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, REPORT)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_report_with_no_place_to_go(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "out.json", Path("/proc/out.json")):
        with pytest.raises(MktmeError, match=r"out\.json: cannot write the report"):
            write_json(path, REPORT)


def test_environment_is_this_machine() -> None:
    host = SimpleNamespace(qemu_version=(10, 0, 2), libvirt_version=(11, 3, 0), uri="qemu:///embed")
    found = environment(cast("Host", host), IMAGE)
    assert found.host_kernel == os.uname().release
    assert found.cores == os.cpu_count()
    assert found.memory_bytes > 64 << 20
    assert (found.qemu, found.libvirt) == ("10.0.2", "11.3.0")
    assert (found.guest, found.guest_kernel_version) == ("tiny", "6.1")
    assert found.cpu != ""
