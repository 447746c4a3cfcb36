# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's metrics for Prometheus.

Workers are processes; prometheus-client keeps their values in files of a directory
(PROMETHEUS_MULTIPROC_DIR), which `mktme.broker.serving` makes, and adds them up for a scrape. No
metric has a secret, nor anything that depends on one, nor the name of a tenant or VM.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)

REQUESTS: Final = Counter(
    "mktme_broker_requests", "Requests answered", ("endpoint", "status"), registry=None
)
REQUEST_SECONDS: Final = Histogram(
    "mktme_broker_request_seconds",
    "From a request's last byte to its answer's",
    ("endpoint",),
    buckets=_SECONDS,
    registry=None,
)
ATTESTATIONS: Final = Counter(
    "mktme_broker_attestations", "Evidence appraised", ("verdict",), registry=None
)
RELEASES: Final = Counter(
    "mktme_broker_releases", "Resources asked for in a session", ("outcome",), registry=None
)
FAILED_CHECKS: Final = Counter(
    "mktme_broker_failed_checks", "Checks that failed", ("check",), registry=None
)
SESSIONS: Final = Gauge(
    "mktme_broker_sessions",
    "Sessions that were used and are remembered",
    multiprocess_mode="mostrecent",
    registry=None,
)
GENERATION: Final = Gauge(
    "mktme_broker_store_generation",
    "Of the store, as last read; 0 if it is not to be trusted",
    multiprocess_mode="mostrecent",
    registry=None,
)


def of_all_workers(directory: str) -> CollectorRegistry:
    """What a scrape gets.

    Args:
        directory: where the workers' values are.
    """
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=directory)  # type: ignore[no-untyped-call]
    return registry
