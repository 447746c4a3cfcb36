# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports with all that a page can show: of a demo, and of a run on the inline data path.

Figures are made up, each unlike the others, so that a page which shows one in the place of another
is found out.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import numpy as np

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.datapath.window import Policy
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.confidentiality import CanarySearch
from mktme.proof.entropy import BINS, EntropyComparison
from mktme.proof.isolation import IsolationMatrix
from mktme.proof.report import Check, Environment, GuestReport, RunReport
from mktme.proof.residency import Residency
from mktme.proof.timeline import Timeline
from mktme.proof.transparency import MemoryComparison
from mktme.service.wire import Memory, Paging, Traffic

MIB = 1 << 20
_SAMPLES = 301
_SUMS = {f"sha256-{name}": name.encode().hex() * 8 for name in ("files", "pipes", "sort")}


def _growing(seed: int, high: int, samples: int = _SAMPLES) -> tuple[int, ...]:
    """A counter that grows in bursts."""
    random = np.random.default_rng(seed)
    steps = random.integers(0, high, samples) * (1 + 3 * (random.random(samples) > 0.9))
    return tuple(accumulate(steps.tolist()))


def _entropy(seed: int, *, encrypted: bool) -> EntropyComparison:
    random = np.random.default_rng(seed)
    shape = np.concatenate([np.linspace(9, 1, BINS - 8), np.linspace(2, 14, 8)])
    plain = random.multinomial(2048, shape / shape.sum())
    plain_bins = tuple(plain.tolist())
    middle = (np.arange(BINS) + 0.5) / 4
    mean = float((plain * middle).sum() / 2048)
    return EntropyComparison(
        pages=2048,
        written_pages=91_000 + seed,
        plaintext=plain_bins,
        ciphertext=(0,) * (BINS - 1) + (2048,) if encrypted else plain_bins,
        plaintext_mean=mean,
        ciphertext_mean=7.9549 if encrypted else mean,
    )


def _timeline(seed: int, *, works: bool = True, samples: int = _SAMPLES) -> Timeline:
    return Timeline(
        at_s=tuple(round(0.05 + 0.1 * number, 3) for number in range(samples)),
        worked_s=(14.9, 27.5) if works else None,
        lines_stored=_growing(seed, 30_000, samples),
        lines_other=_growing(seed + 1, 9_000, samples),
    )


def _guest(number: int, name: str, track: Track, mode: KeyMode, **more: object) -> GuestReport:
    guest = GuestReport(
        name=name,
        role="guest",
        memory_bytes=512 * MIB,
        vcpus=1,
        track=track,
        algorithm=Algorithm.AES_XTS_128,
        key_mode=mode,
        keyid=number,
        dram_base=(number - 1) * 512 * MIB,
        boot_s=14.25 + number,
        workload_s=11.125 + number,
        checksums=_SUMS,
        datapath=DataPath.SHADOW,
        traffic=Traffic(
            drains=200 + number,
            drain_s=3.5 + number,
            interval_s=0.1,
            pending_pages=0,
            pages_written=190_000 + number,
            pages_vanished=0,
            lines_marked=4_900_000 + number,
            lines_encrypted=6_700_000 + number,
            lines_stored=4_399_000 + number,
            lines_other=2_273_000 + number,
            tlb_misses=1_000_000 + number,
        ),
        comparison=MemoryComparison(8_388_608, 1_470_000 + number, 0, 0, 0, 0),
        canary=CanarySearch(0x1234000 + 4096 * number, (700 + number) * MIB, 0, None),
        entropy=_entropy(number, encrypted=mode is not KeyMode.NO_ENCRYPT),
        timeline=_timeline(10 * number),
    )
    return dataclasses.replace(guest, **more)  # type: ignore[arg-type]


_PLAIN = dataclasses.replace(
    _guest(1, "plain", Track.STORES, KeyMode.RANDOM, boot_s=12.75, workload_s=9.5),
    role="plain",
    track=None,
    algorithm=None,
    key_mode=None,
    keyid=None,
    dram_base=None,
    datapath=None,
    traffic=None,
    comparison=None,
    canary=None,
    entropy=None,
    timeline=None,
)
_ENVIRONMENT = Environment(
    host_kernel="6.18.0",
    cpu="Intel(R) Xeon(R) Processor @ 2.60GHz",
    cores=2,
    memory_bytes=8 << 30,
    qemu="10.0.2",
    libvirt="11.3.0",
    libvirt_uri="qemu:///embed?root=/run/mktme/root",
    guest="tiny",
    guest_kernel_package="linux-image-6.1.0-41-cloud-amd64",
    guest_kernel_version="6.1.158-1",
    guest_kernel_sha256="5f" * 32,
    mktme="0.1.0",
)


def _check(proof: str, subject: str, claim: str, finding: str, *, control: bool = False) -> Check:
    return Check(proof, subject, claim, control, True, finding)  # type: ignore[arg-type]


_OWN = "a VM's memory is readable with its own KeyID only"
_SAME = "its workload computes what it does on plain QEMU"
_EXACT = "DRAM, decrypted, is the guest's RAM"
_NOWHERE = "what it holds in memory is nowhere in DRAM"
DEMO = RunReport(
    schema="mktme.run",
    version=1,
    command="demo",
    started="2026-01-01T00:00:00+00:00",
    duration_s=74.625,
    passed=True,
    environment=_ENVIRONMENT,
    guests=(
        _guest(1, "alice", Track.STORES_AND_PAGES, KeyMode.RANDOM),
        _guest(2, "bob", Track.STORES_AND_PAGES, KeyMode.RANDOM),
        _PLAIN,
        _guest(
            3,
            "stores-only",
            Track.STORES,
            KeyMode.DIRECT,
            role="control",
            checksums={},
            comparison=MemoryComparison(8_388_608, 1_100_003, 221_350, 1_350, 20_000, 200_000),
            canary=None,
            timeline=_timeline(40, works=False, samples=160),
        ),
        _guest(
            4,
            "no-encrypt",
            Track.PAGES,
            KeyMode.NO_ENCRYPT,
            role="control",
            algorithm=None,
            checksums={},
            comparison=None,
            canary=CanarySearch(0x5678000, 704 * MIB, 256, 0x25678000),
            timeline=_timeline(50, works=False, samples=160),
        ),
    ),
    checks=(
        *(
            _check("transparency", one, _EXACT, "0 of 8,388,608 lines differ")
            for one in ("alice", "bob")
        ),
        *(_check("transparency", one, _SAME, "3 of 3 checksums equal") for one in ("alice", "bob")),
        *(
            _check("confidentiality", one, _NOWHERE, "0 blocks of the canary in 701 MiB")
            for one in ("alice", "bob")
        ),
        _check("isolation", "alice and bob", _OWN, "2 x 2 reads, 0 beside the diagonal readable"),
        _check(
            "transparency",
            "stores-only",
            "tracking stores alone leaves lines behind",
            "221,350 of 8,388,608 lines differ (1,350 line marked, 20,000 page marked, 200,000"
            " neither)",
            control=True,
        ),
        _check(
            "confidentiality",
            "no-encrypt",
            "without encryption the canary is in DRAM",
            "256 blocks of the canary in 704 MiB",
            control=True,
        ),
        _check(
            "isolation",
            "stores-only",
            "another KeyID given the same key reads the memory",
            "readable",
            control=True,
        ),
    ),
    isolation=IsolationMatrix(("alice", "bob"), (1, 2), ((True, False), (False, True))),
    engine_memory=Memory(anonymous=60 * MIB, file=40 * MIB, shared=900 * MIB, peak=1003 * MIB),
    dram=None,
    sidecar=None,
    notices=(),
    arguments=("demo", "--html", "my report.html"),
)

_PAGING = Paging(
    service_s=4.5,
    policy=Policy.TWO_QUEUES,
    window_bytes=128 * MIB,
    resident_bytes=120 * MIB,
    peak_bytes=127 * MIB,
    faults=5_612,
    pages_fetched=51_903,
    pages_read_ahead=45_001,
    pages_evicted=23_777,
    lines_written=812_345,
    lines_stored=0,
    pages_vanished=0,
    pages_poisoned=0,
    fault_median_s=0.000127,
    fault_p99_s=0.000931,
)
_RESIDENT = np.minimum(127.0, np.linspace(0, 190, _SAMPLES)) * MIB
INLINE = dataclasses.replace(
    DEMO,
    command="run",
    guests=(
        dataclasses.replace(
            _guest(1, "guest1", Track.STORES, KeyMode.RANDOM),
            track=None,
            datapath=DataPath.INLINE,
            traffic=None,
            paging=_PAGING,
            residency=Residency(128 * MIB, 127 * MIB + 4096, 16_321),
            timeline=Timeline(
                at_s=tuple(round(0.05 + 0.1 * number, 3) for number in range(_SAMPLES)),
                worked_s=(14.9, 27.5),
                lines_stored=(0,) * _SAMPLES,
                lines_written=_growing(70, 5_000),
                pages_fetched=_growing(71, 300),
                pages_evicted=_growing(72, 150),
                faults=_growing(73, 40),
                resident_bytes=tuple(_RESIDENT.astype(int).tolist()),
            ),
        ),
        _PLAIN,
    ),
    checks=(
        _check(
            "transparency", "guest1", "DRAM, decrypted, is what the window holds", "0 of 9 differ"
        ),
        _check("transparency", "guest1", _SAME, "3 of 3 checksums equal"),
        _check("confidentiality", "guest1", _NOWHERE, "0 blocks of the canary in 512 MiB"),
        _check(
            "confidentiality",
            "guest1",
            "its plaintext in RAM never exceeds the window",
            "at most 127.0 of 128.0 MiB in 16,321 samples",
        ),
    ),
    isolation=None,
    notices=("QEMU 10 with more than one vCPU cannot track stores",),
    arguments=("run", "--datapath", "inline"),
)
