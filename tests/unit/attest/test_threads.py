# SPDX-License-Identifier: GPL-2.0-or-later
"""Verifiers that have threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[3]
PROCESSES: Final = 8
SCRIPT: Final = """
import sys, threading
from mktme.attest.claims import decode_claims, encode_claims
from tests.unit.attest.signing import Platform

claims = encode_claims(Platform().evidence())
barrier = threading.Barrier(25)
decoded = []

def decode():
    barrier.wait()
    decoded.append(decode_claims(claims))

sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=decode) for _ in range(25)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(decoded))
"""


def test_first_decoding_in_several_threads_at_once() -> None:
    """One in three such processes crashed (msgspec 0.22.0) before claims.py saw to it."""
    for _ in range(PROCESSES):
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (ended.returncode, ended.stdout) == (0, "25\n"), ended.stderr
