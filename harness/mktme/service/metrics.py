# SPDX-License-Identifier: GPL-2.0-or-later
"""A platform's state as Prometheus metrics.

The engine serves no HTTP. An exporter beside it asks as an observer does, once for each scrape:

::

    registry = CollectorRegistry(auto_describe=False)
    registry.register(PlatformCollector(lambda: connected(None, Role.OBSERVER)))
    start_http_server(port, registry=registry)

Names are as Prometheus has them (https://prometheus.io/docs/practices/naming): base units, and
counters end in ``_total``. No metric has a key, nor anything that depends on one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mktme.engine.errors import MktmeError
from mktme.service import wire
from mktme.service.client import EngineClient

log = logging.getLogger(__name__)

_VM: Final = ("vm", "name")
# Both data paths count these; the fields of `wire.Traffic`, then of `wire.Paging`.
_TRAFFIC: Final = {
    "lines_encrypted": ("lines_encrypted", "Lines encrypted into DRAM"),
    "lines_stored": ("lines_stored", "Of these, lines that a vCPU's store was seen for"),
    "lines_other": ("lines_other", "Of these, lines that devices or the system wrote"),
    "pages_written": ("pages_written", "Pages that trackers told of"),
    "drain_s": ("drain_seconds", "Time spent bringing writes into DRAM"),
}
_PAGING: Final = {
    "lines_written": ("lines_encrypted", "Lines encrypted into DRAM"),
    "lines_stored": ("lines_stored", "Of these, lines that a vCPU's store was seen for"),
    "faults": ("page_faults", "Page faults served"),
    "pages_fetched": ("pages_decrypted", "Pages decrypted into the window"),
    "pages_evicted": ("pages_evicted", "Pages that left the window"),
    "pages_poisoned": ("pages_poisoned", "Pages with a line that does not match its MAC"),
    "service_s": ("service_seconds", "Time spent serving faults and flushing"),
}


class PlatformCollector(Collector):
    """What a scrape gets.

    Args:
        connect: connects to the engine, for one scrape.
    """

    def __init__(self, connect: Callable[[], AbstractContextManager[EngineClient]]) -> None:
        self._connect = connect

    def collect(self) -> Iterator[Metric]:
        """Ask the engine; ``mktme_up`` is 0, and nothing else there, if it does not answer."""
        up = GaugeMetricFamily("mktme_up", "Whether the engine answers")
        try:
            with self._connect() as client:
                status = client.status()
        except MktmeError as error:
            log.warning("no metrics: %s", error)
            up.add_metric((), 0)
            yield up
            return
        up.add_metric((), 1)
        yield up
        yield from _platform(status)
        yield from _keyids(status)
        yield from _vms(status.vms)


def _platform(status: wire.Status) -> Iterator[Metric]:
    yield GaugeMetricFamily("mktme_dram_bytes", "Size of DRAM", status.dram_bytes)
    yield GaugeMetricFamily("mktme_keyids_free", "KeyIDs not programmed", status.keyids_free)
    yield CounterMetricFamily("mktme_engine_cpu_seconds", "Processor time used", status.cpu_s)
    memory = GaugeMetricFamily("mktme_engine_memory_bytes", "The engine's memory", labels=("kind",))
    for kind in ("anonymous", "file", "shared", "peak"):
        memory.add_metric((kind,), getattr(status.memory, kind))
    yield memory
    custody = GaugeMetricFamily(
        "mktme_engine_custody",
        "How the engine keeps its memory, as labels",
        labels=("dumpable", "memory_locked", "key_memory"),
    )
    kept = status.custody
    labels = (str(kept.dumpable).lower(), kept.memory_locked, kept.key_memory.value)
    custody.add_metric(labels, 1)
    yield custody


def _keyids(status: wire.Status) -> Iterator[Metric]:
    pages = GaugeMetricFamily(
        "mktme_keyid_pages",
        "Pages of 4096 bytes assigned to a programmed KeyID",
        labels=("keyid", "mode", "algorithm", "vm"),
    )
    for key in status.keys:
        algorithm = "" if key.algorithm is None else key.algorithm.value
        owner = "" if key.vm is None else str(key.vm)
        pages.add_metric((str(key.keyid), key.mode.value, algorithm, owner), key.pages)
    yield pages


def _vms(vms: Iterable[wire.VmStatus]) -> Iterator[Metric]:
    linked = GaugeMetricFamily(
        "mktme_vm_linked", "Whether a VM's QEMU is connected", labels=(*_VM, "datapath", "keyid")
    )
    faulty = GaugeMetricFamily(
        "mktme_vm_faulty", "Whether a VM's memory is not followed", labels=_VM
    )
    pending = GaugeMetricFamily(
        "mktme_vm_pending_pages", "shadow: pages written and not in DRAM yet", labels=_VM
    )
    resident = GaugeMetricFamily(
        "mktme_vm_window_resident_bytes", "inline: plaintext in the window", labels=_VM
    )
    counters: dict[str, CounterMetricFamily] = {}
    for name, text in (*_TRAFFIC.values(), *_PAGING.values()):
        counters[name] = CounterMetricFamily(f"mktme_vm_{name}", text, labels=_VM)
    for vm in vms:
        who = (str(vm.vm), vm.name)
        linked.add_metric((*who, vm.datapath.value, str(vm.keyid)), int(vm.linked))
        faulty.add_metric(who, int(vm.fault is not None))
        if vm.traffic is not None:
            pending.add_metric(who, vm.traffic.pending_pages)
            for field, (name, _) in _TRAFFIC.items():
                counters[name].add_metric(who, getattr(vm.traffic, field))
        if vm.paging is not None:
            resident.add_metric(who, vm.paging.resident_bytes)
            for field, (name, _) in _PAGING.items():
                counters[name].add_metric(who, getattr(vm.paging, field))
    yield from (linked, faulty, pending, resident, *counters.values())
