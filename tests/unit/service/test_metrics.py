# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics say what the engine's status says, in Prometheus's format and names."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mktme.cli import ExitCode
from mktme.service.client import EngineClient, EngineGoneError, EngineProcess
from mktme.service.metrics import PlatformCollector
from mktme.service.server import CONTROL_SOCKET

from ..conftest import Guests
from ..fake_qemu import PAGE

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    """What Prometheus reads: values by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(connect: Callable[[], contextlib.AbstractContextManager[EngineClient]]) -> Samples:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PlatformCollector(connect))
    return parsed(generate_latest(registry).decode())


def test_metrics_are_the_status(guests: Guests) -> None:
    qemu, added = guests.link()
    qemu.dma(0, bytes([7]) * (2 * PAGE))
    guests.client.flush(qemu.vm)
    samples = scrape(lambda: contextlib.nullcontext(guests.client))
    status = guests.status(qemu)
    assert status.traffic is not None
    assert status.traffic.lines_encrypted >= 2 * PAGE // 64
    who = (("name", status.name), ("vm", str(qemu.vm)))
    assert samples["mktme_up", ()] == 1
    assert samples["mktme_vm_lines_encrypted_total", who] == status.traffic.lines_encrypted
    linked = (("datapath", "shadow"), ("keyid", str(added.keyid)), *who)
    assert samples["mktme_vm_linked", tuple(sorted(linked))] == 1
    key = {"algorithm": "aes-xts-128", "keyid": str(added.keyid), "mode": "random"}
    pages = samples["mktme_keyid_pages", tuple(sorted((key | {"vm": str(qemu.vm)}).items()))]
    assert pages == qemu.ram_bytes // PAGE


def test_engine_that_does_not_answer_is_down() -> None:
    def nobody() -> contextlib.AbstractContextManager[EngineClient]:
        raise EngineGoneError("no engine")

    assert scrape(nobody) == {("mktme_up", ()): 0}


def test_names_are_prometheus_own(guests: Guests) -> None:
    for name, labels in scrape(lambda: contextlib.nullcontext(guests.client)):
        assert re.fullmatch(r"mktme_[a-z_]+", name)
        assert all(re.fullmatch(r"[a-z_]+", label) for label, _ in labels)


def test_served_until_interrupted(engine: EngineProcess) -> None:
    socket = engine.log_path.parent / CONTROL_SOCKET
    command = [sys.executable, "-m", "mktme.cli", "metrics", f"--engine={socket}", "--listen=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        found = re.search(r"http://\S+/metrics", serving.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(found[0]) as answer:
            samples = parsed(answer.read().decode())
        serving.send_signal(2)
        assert serving.wait(20) == ExitCode.INTERRUPTED
    assert samples["mktme_up", ()] == 1


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1:70000", ":80", "256.1.1.1:80"])
def test_nowhere_to_listen(engine: EngineProcess, listen: str) -> None:
    socket = engine.log_path.parent / CONTROL_SOCKET
    command = [sys.executable, "-m", "mktme.cli", "metrics", f"--engine={socket}"]
    ended = subprocess.run([*command, f"--listen={listen}"], capture_output=True, text=True)
    assert ended.returncode == ExitCode.USAGE
    assert "hint: " in ended.stderr
