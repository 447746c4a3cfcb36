# SPDX-License-Identifier: GPL-2.0-or-later
"""How long evidence and its appraisal take.

::

    python -m tests.bench.attest [--rounds 200]

Evidence is asked of a real engine process over its socket, of a VM that runs (guest `tiny`), whose
files were hashed before; the time that this took is beside it. What is appraised is that evidence.
A median of the wall clock's times, and the slowest of 99 in 100.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from typing import Final

from cryptography import x509

from mktme.attest.identity import Trust
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.attest.token import Token, open_token
from mktme.attest.verify import verify
from mktme.pytest_plugin import vm_config
from mktme.vm.platform import Platform

EVIDENCE_TARGET_MS: Final = 20.0
VERIFICATION_TARGET_MS: Final = 50.0
_MEMORY_BYTES: Final = 256 << 20


def measure(name: str, target_ms: float, rounds: int, work: Callable[[], object]) -> bool:
    """Print the figures; whether the median is in time."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append((time.perf_counter() - started) * 1e3)
    slow = sorted(taken)[len(taken) * 99 // 100]
    print(
        f"{name:14} {statistics.median(taken):7.2f} ms  99 %: {slow:7.2f} ms"
        f"  (to be < {target_ms:g})"
    )
    return statistics.median(taken) < target_ms


def main() -> int:
    """Run it; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    config = vm_config(memory="256M", datapath="inline", algorithm="aes-xts-128-integrity")
    with Platform(_MEMORY_BYTES) as platform, platform.launch(config) as vm:
        engine, nonce = platform.engine, secrets.token_bytes(32)
        started = time.perf_counter()
        token = engine.evidence(nonce, vm.uuid)
        print(f"{'first':14} {(time.perf_counter() - started) * 1e3:7.2f} ms  (files are hashed)")
        said = open_token(token, Token.parse(token).key())
        trust = Trust((x509.load_pem_x509_certificate(engine.identity().root.encode()),))
        reference = Reference.of(said, said.vms[0])

        def appraise() -> None:
            verify(token, trust=trust, policy=Policy(), reference=reference, nonce=nonce).require()

        met = [
            measure(
                "evidence", EVIDENCE_TARGET_MS, rounds, lambda: engine.evidence(nonce, vm.uuid)
            ),
            measure("verification", VERIFICATION_TARGET_MS, rounds, appraise),
        ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
