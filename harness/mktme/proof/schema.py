# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON Schemas of the documents that `--json` gives, kept in ``docs/schema``.

``make schema`` writes them; a test compares them with the types, so that they stay true.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from mktme.broker.report import BrokerListing
from mktme.dump.capture import CaptureReport
from mktme.dump.decrypt import DecryptReport
from mktme.dump.diff import DiffReport
from mktme.dump.info import InfoReport
from mktme.dump.search import SearchReport
from mktme.dump.stats import StatsReport
from mktme.proof.bench import BenchReport
from mktme.proof.features.table import FeatureReport
from mktme.proof.moving import MoveReport
from mktme.proof.platform_report import (
    KeyIdChange,
    KeyIdReport,
    PlatformCheck,
    PlatformReport,
)
from mktme.proof.report import RunReport, json_schema
from mktme.proof.tamper import TamperReport
from mktme.provision.report import ApplyReport, DestroyReport, PlanReport
from mktme.vm.doctor import DoctorReport

DOCUMENTS: Final[dict[str, type]] = {
    "run-1.json": RunReport,
    "bench-1.json": BenchReport,
    "doctor-1.json": DoctorReport,
    "platform-1.json": PlatformReport,
    "platform-check-1.json": PlatformCheck,
    "keyid-1.json": KeyIdReport,
    "keyid-change-1.json": KeyIdChange,
    "features-1.json": FeatureReport,
    "tamper-1.json": TamperReport,
    "migrate-1.json": MoveReport,
    "dump-search-1.json": SearchReport,
    "dump-stats-1.json": StatsReport,
    "dump-diff-1.json": DiffReport,
    "dump-capture-1.json": CaptureReport,
    "dump-info-1.json": InfoReport,
    "dump-decrypt-1.json": DecryptReport,
    "provision-plan-1.json": PlanReport,
    "provision-apply-1.json": ApplyReport,
    "provision-destroy-1.json": DestroyReport,
    "broker-list-1.json": BrokerListing,
}


def main() -> None:
    """Write each schema into the directory given."""
    directory = Path(sys.argv[1])
    for name, document in DOCUMENTS.items():
        (directory / name).write_bytes(json_schema(document))


if __name__ == "__main__":
    main()
