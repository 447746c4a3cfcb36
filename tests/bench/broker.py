# SPDX-License-Identifier: GPL-2.0-or-later
"""How many VMs a broker can serve: attest-and-release cycles in a second.

::

    python -m tests.bench.broker [--clients 50] [--seconds 20] [--workers 2]

Clients run at the same time, each on a TLS connection that it keeps and with a VM of its own, in
processes beside the broker, on the same CPUs. A cycle is a challenge, evidence that is signed for
it, the attestation, and a key that is fetched and decrypted. At the end what the clients have got
is compared with the broker's audit log and its metrics: each cycle that a client began has ended,
and is there once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import secrets
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.serialization import Encoding
from joserfc import jwe
from joserfc.jwk import ECKey

from mktme.attest.claims import RecipientKey
from mktme.attest.identity import CertificateAuthority, Identity
from mktme.broker.client import BrokerClient
from mktme.broker.directory import create
from mktme.broker.errors import BrokerError
from mktme.broker.store import Kind, Terms
from mktme.engine.xts import Algorithm
from tests.unit.attest.signing import Platform
from tests.unit.broker.server import Server, evidence_now, serving

TARGET_PER_S: Final = 100.0
PATH: Final = "bench/key/1"
PROCESSES: Final = 2
_REGISTRY: Final = jwe.JWERegistry(algorithms=["ECDH-ES+A256KW", "A256GCM"])
_DEADLINE_S: Final = 120


@dataclass(frozen=True)
class Done:
    """What a process's clients did.

    Attributes:
        seconds: of each cycle.
        errors: what went wrong, by its text.
        cpu_s: processor time of the process.
    """

    seconds: list[float]
    errors: Counter[str]
    cpu_s: float


def main() -> int:
    """Parse the command line, measure and compare; the exit status says whether all is well."""
    parser = argparse.ArgumentParser(description="Put a key broker under load.")
    parser.add_argument("--clients", type=int, default=50, help="at the same time")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--workers", type=int, default=2, help="of the broker")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mktme-bench-") as directory:
        return measure(
            Path(directory), arguments.clients, arguments.seconds, str(arguments.workers)
        )


def measure(directory: Path, clients: int, seconds: float, workers: str) -> int:
    """Run broker and clients."""
    authority = CertificateAuthority.make("bench")
    authority.save(directory / "ca")
    broker = create(directory / "broker")
    broker.put(Kind.TRUST, "bench", "platforms", authority.certificate.public_bytes(Encoding.PEM))
    broker.put(Kind.POLICY, "bench", "strict", b'name = "strict"\n')
    broker.put(Kind.REFERENCE, "bench", "strict", Platform().reference().encode())
    key = secrets.token_bytes(Algorithm.AES_XTS_256.key_bytes)
    broker.put(Kind.RESOURCE, "bench", PATH, key, Terms("strict"))
    with serving(broker.path, "--workers", workers, "--auth-rate", "10000") as server:
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(PROCESSES + 1)
        results = context.Queue()
        shares = [clients // PROCESSES + (n < clients % PROCESSES) for n in range(PROCESSES)]
        processes = [
            context.Process(
                target=run_clients,
                args=(server.url, directory, share, seconds, key, barrier, results),
                daemon=True,
            )
            for share in shares
        ]
        for process in processes:
            process.start()
        barrier.wait(_DEADLINE_S)  # all are connected, and have done one cycle
        before, started = broker_cpu_s(server), time.monotonic()
        done = [results.get(timeout=seconds + _DEADLINE_S) for _ in processes]
        elapsed_s, broker_s = time.monotonic() - started, broker_cpu_s(server) - before
        for process in processes:
            process.join()
        scraped = urllib.request.urlopen(server.metrics, timeout=10).read().decode()
    return report(broker.audit_log, done, elapsed_s, broker_s, scraped, clients)


def report(
    audit_log: Path, done: list[Done], elapsed_s: float, broker_s: float, scraped: str, clients: int
) -> int:
    """Print what was found."""
    times = sorted(one for each in done for one in each.seconds)
    errors = sum((each.errors for each in done), Counter[str]())
    records = [json.loads(line) for line in audit_log.read_text().splitlines()]
    sessions = {
        event: Counter(one["session"] for one in records if one["event"] == event)
        for event in ("attest", "release")
    }
    cycles = len(times) + clients  # each client had one before the measurement
    counted = {
        name: int(float(value))
        for name, value in re.findall(
            r'^mktme_broker_requests_total\{endpoint="(\w+)",status="200"\} (\S+)', scraped, re.M
        )
    }
    per_s = len(times) / elapsed_s
    client_s = sum(each.cpu_s for each in done)
    print(f"{clients} clients, {len(os.sched_getaffinity(0))} CPUs, {elapsed_s:.1f} s")
    print(f"cycles a second      {per_s:.0f}, to reach {TARGET_PER_S:.0f}")
    print(
        f"a cycle takes        median {statistics.median(times) * 1e3:.0f} ms,"
        f" p99 {times[len(times) * 99 // 100] * 1e3:.0f} ms, most {times[-1] * 1e3:.0f} ms"
    )
    print(
        f"processor time       broker {broker_s / len(times) * 1e3:.1f} ms a cycle,"
        f" clients {client_s / len(times) * 1e3:.1f} ms"
    )
    alone = len(os.sched_getaffinity(0)) * len(times) / (broker_s + client_s)
    print(
        f"                     with nothing beside, these CPUs have time for {alone:.0f} a second"
    )
    print(f"failed               {errors.total()}{dict(errors) if errors else ''}")
    once = all(
        len(of) == cycles and max(of.values()) == 1 for of in sessions.values()
    ) and counted == dict.fromkeys(("auth", "attest", "resource"), cycles)
    counts = "each once" if once else f"NOT each once: {counted}"
    print(f"in the audit log     {cycles} cycles, {counts}")
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"load average         {load} (of this too; what else runs takes its share)")
    return 0 if per_s >= TARGET_PER_S and not errors and once else 1


def run_clients(
    url: str,
    directory: Path,
    clients: int,
    seconds: float,
    key: bytes,
    barrier: Barrier,
    results: multiprocessing.Queue[Done],
) -> None:
    """In a process: so many clients, each in a thread."""
    identity = Identity.create(directory / "ca")
    ready, go = threading.Semaphore(0), threading.Event()
    times: list[float] = []
    errors: Counter[str] = Counter()

    def run() -> None:
        platform, vm = Platform(identity), uuid4()
        with BrokerClient(url, directory / "broker" / "keys" / "ca.crt") as client:
            cycle(client, platform, vm, key)
            ready.release()
            go.wait()
            while (started := time.monotonic()) < until:
                try:
                    cycle(client, platform, vm, key)
                except (BrokerError, ValueError) as error:
                    errors[f"{type(error).__name__}: {error}"] += 1
                else:
                    times.append(time.monotonic() - started)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert ready.acquire(timeout=_DEADLINE_S)
    barrier.wait(_DEADLINE_S)
    cpu_s, until = time.process_time(), time.monotonic() + seconds
    go.set()
    for thread in threads:
        thread.join()
    results.put(Done(times, errors, time.process_time() - cpu_s))


def cycle(client: BrokerClient, platform: Platform, vm: UUID, key: bytes) -> None:
    """Attest, fetch the key and look whether it is that."""

    def evidence(nonce: bytes) -> bytes:
        recipient = RecipientKey.of(platform.recipient.public_key())
        claims = evidence_now(platform, nonce)
        (one,) = claims.vms
        changed = platform.vm(uuid=vm, name=one.name, recipient_key=recipient)
        return platform.sign(platform.evidence(changed, nonce=nonce, issued_at=claims.issued_at))

    client.attest(vm, evidence, policy="bench/strict")
    sealed = json.loads(client.resource(PATH))
    opened = jwe.decrypt_json(sealed, ECKey.import_key(platform.recipient), registry=_REGISTRY)
    if opened.plaintext != key:
        raise ValueError("another key")


def broker_cpu_s(server: Server) -> float:
    """Processor time of the broker's processes so far."""
    ticks = 0
    for pid in {server.process.pid, *server.workers()}:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime: proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
