# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker as it runs: processes, TLS, HTTP; and what it makes of clients that mean no good."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwe, jwt
from joserfc.jwk import ECKey

from mktme.attest.claims import RecipientKey
from mktme.broker.app import BODY_MAX_BYTES, BODY_TIMEOUT_S, PROBLEM_TYPE, PROBLEMS
from mktme.broker.broker import public_jwk
from mktme.broker.client import BrokerClient
from mktme.broker.directory import BrokerDirectory, create
from mktme.broker.errors import BrokerGoneError, BrokerSetupError, DeniedError
from mktme.broker.serving import HEAD_MAX_BYTES, HEAD_TIMEOUT_S

from ..attest.signing import VM, Platform
from .server import Server, evidence_now, outlived, platform_now, serving
from .setting import KEY_PATH, SECRET, furnish

AUTH: Final = {"version": "0.4.0", "tee": "mktme", "extra-params": ""}
SELECT: Final = {"extra-params": {"attestation-policy-selector": "alice/strict"}}


@pytest.fixture(scope="module")
def alices() -> Platform:
    return platform_now()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, alices: Platform) -> BrokerDirectory:
    broker = create(tmp_path_factory.mktemp("broker") / "broker")
    furnish(broker, alices)
    return broker


@pytest.fixture(scope="module")
def server(directory: BrokerDirectory) -> Iterator[Server]:
    with serving(directory.path, "--workers", "2", "--auth-rate", "10000") as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client that may send anything."""
    with raw_client(server) as client:
        yield client


def raw_client(server: Server) -> httpx.Client:
    context = ssl.create_default_context(cafile=server.directory.ca)
    url = f"{server.url}/kbs/v0"
    return httpx.Client(base_url=url, verify=context, timeout=30, trust_env=False)


def text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def attestation(platform: Platform, nonce: str, **changes: Any) -> dict[str, Any]:
    """What a good client sends."""
    token = platform.sign(evidence_now(platform, base64.b64decode(nonce)))
    key = public_jwk(RecipientKey.of(platform.recipient.public_key()))
    evidence = {"evidence": text(token), "vm": str(VM)} | changes
    return {
        "runtime-data": {"nonce": nonce, "tee-pubkey": key},
        "tee-evidence": {"primary_evidence": evidence, "additional_evidence": "{}"},
    }


def problem(response: httpx.Response, status: int, kind: str, *checks: str) -> None:
    """An answer is a problem, and says nothing else."""
    assert response.status_code == status
    assert response.headers["content-type"] == PROBLEM_TYPE
    body = response.json()
    assert body.pop("detail")
    assert body == {"type": PROBLEMS + kind, "status": status, "checks": list(checks)}


# --- as it is meant to be used ----------------------------------------------------------------


def test_attest_and_release(server: Server, alices: Platform) -> None:
    with server.client() as client:
        token = server.attest(client, alices)
        sealed = json.loads(client.resource(KEY_PATH))
    key = ECKey.import_key(alices.recipient)
    registry = jwe.JWERegistry(algorithms=["ECDH-ES+A256KW", "A256GCM"])
    assert jwe.decrypt_json(sealed, key, registry=registry).plaintext == SECRET
    # A relying party checks the token with the public key that `init` wrote.
    signer = ECKey.import_key((server.directory.keys / "token.pub").read_bytes())
    claims = jwt.decode(token, signer, algorithms=["ES256"]).claims
    assert claims["submods"][str(VM)]["ear.status"] == "affirming"


def test_session_is_for_who_has_its_cookie(server: Server, alices: Platform) -> None:
    with server.client() as client, server.client() as other:
        server.attest(client, alices)
        with pytest.raises(DeniedError) as caught:
            other.resource(KEY_PATH)
    assert (caught.value.status, caught.value.checks) == (401, ("session",))


def test_cookie_is_for_https_and_this_path(http: httpx.Client) -> None:
    response = http.post("/auth", json=AUTH)
    assert response.headers["cache-control"] == "no-store"
    assert "server" not in response.headers
    attributes = set(response.headers["set-cookie"].split("; ")[1:])
    assert attributes >= {"Secure", "HttpOnly", "SameSite=strict", "Path=/kbs/v0"}


def test_refusal_reaches_the_client(server: Server, alices: Platform) -> None:
    with server.client() as client, pytest.raises(DeniedError) as caught:
        server.attest(client, platform_now())
    assert (caught.value.status, caught.value.kind) == (401, "AttestationError")
    assert str(caught.value) == "the broker refuses: the evidence does not pass (chain)"
    with server.client() as client:
        server.attest(client, alices)
        with pytest.raises(DeniedError) as caught:
            client.resource("alice/key/none")
    assert (caught.value.status, caught.value.checks) == (404, ())


def test_requests_on_the_wire(http: httpx.Client, alices: Platform) -> None:
    """Replay, substitution of the key, another VM: what somebody between could do."""
    challenge = http.post("/auth", json=AUTH | SELECT).json()
    sent = attestation(alices, challenge["nonce"])
    assert http.post("/attest", json=sent).status_code == 200
    problem(http.post("/attest", json=sent), 401, "AttestationError", "freshness")
    http.cookies.clear()
    problem(http.post("/attest", json=sent), 401, "SessionError", "session")
    http.post("/auth", json=AUTH | SELECT)
    problem(http.post("/attest", json=sent), 401, "AttestationError", "freshness")
    nonce = http.post("/auth", json=AUTH | SELECT).json()["nonce"]
    sent = attestation(alices, nonce)
    his = RecipientKey.of(ec.generate_private_key(ec.SECP256R1()).public_key())
    sent["runtime-data"]["tee-pubkey"] = public_jwk(his)
    problem(http.post("/attest", json=sent), 401, "AttestationError", "recipient-key")
    nonce = http.post("/auth", json=AUTH | SELECT).json()["nonce"]
    sent = attestation(alices, nonce, vm="3f6ae9a2-7d70-4a4f-9a52-7b1a6a1f5a02")
    problem(http.post("/attest", json=sent), 401, "AttestationError", "vm")
    problem(http.get(f"/resource/{KEY_PATH}"), 401, "SessionError", "session")


def test_metrics(server: Server, alices: Platform) -> None:
    def scraped() -> dict[str, float]:
        with urllib.request.urlopen(server.metrics, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    released = 'mktme_broker_releases_total{outcome="released"}'
    chain = 'mktme_broker_failed_checks_total{check="chain"}'
    with server.client() as client:
        server.attest(client, alices)
        client.resource(KEY_PATH)
        before = scraped()
        client.resource(KEY_PATH)
        with pytest.raises(DeniedError):
            server.attest(client, platform_now())
    after = scraped()
    assert after[released] == before[released] + 1
    assert after[chain] == before.get(chain, 0) + 1
    assert after["mktme_broker_store_generation"] == 5
    assert after["mktme_broker_sessions"] >= 2
    assert not [name for name in after if "alice" in name or not name.startswith("mktme_broker_")]


def test_metrics_are_not_on_the_https_listener(http: httpx.Client) -> None:
    problem(http.get(str(http.base_url).replace("/kbs/v0/", "/metrics")), 404, "NotFound")


# --- TLS --------------------------------------------------------------------------------------


def test_client_verifies_the_brokers_certificate(server: Server, tmp_path: Path) -> None:
    other = create(tmp_path / "other")
    with (
        BrokerClient(server.url, other.ca) as client,
        pytest.raises(BrokerGoneError, match="certificate verify failed"),
    ):
        client.resource(KEY_PATH)


def test_client_verifies_the_brokers_name(directory: BrokerDirectory, tmp_path: Path) -> None:
    named = create(tmp_path / "named", names=["broker.example"])
    with serving(named.path, "--workers", "1") as server:
        with (
            server.client() as client,
            pytest.raises(BrokerGoneError, match=r"certificate is not valid for '127\.0\.0\.1'"),
        ):
            client.resource(KEY_PATH)
        context = ssl.create_default_context(cafile=named.ca)
        host, port = server.url.removeprefix("https://").split(":")
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname="broker.example") as secure,
        ):
            assert secure.version() == "TLSv1.3"


def test_no_older_tls(server: Server) -> None:
    context = ssl.create_default_context(cafile=server.directory.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with connection(server, context=None) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_client_takes_https_alone(server: Server, tmp_path: Path) -> None:
    with pytest.raises(BrokerSetupError, match="is no broker"):
        BrokerClient(server.url.replace("https", "http"), server.directory.ca)
    with pytest.raises(BrokerSetupError, match="no PEM file"):
        BrokerClient(server.url, tmp_path / "none")


def test_operators_own_certificate(directory: BrokerDirectory, tmp_path: Path) -> None:
    certificate, key = directory.tls
    broker = create(tmp_path / "own", certificate=(certificate, key))
    assert not broker.ca.exists()
    assert [one.read_bytes() for one in broker.tls] == [certificate.read_bytes(), key.read_bytes()]
    with pytest.raises(BrokerSetupError, match="no certificate and its key"):
        create(tmp_path / "wrong", certificate=(certificate, directory.keys / "token.key"))
    assert not (tmp_path / "wrong").exists()


# --- requests that are none -------------------------------------------------------------------

BODIES: Final[dict[str, bytes]] = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"version": "\xff"}',
    "a number": b"1",
    "a list": b"[]",
    "null": b"null",
    "nested deeply": b"[" * 100_000,
    "a long number": b"9" * 100_000,
    "no number": b'{"version": NaN}',
    "no fields": b"{}",
    "another type": b'{"version": 4, "tee": "mktme"}',
    "a long string": b'{"version": "' + b"0" * 1000 + b'", "tee": "mktme"}',
    "selector of another form": json.dumps(
        AUTH | {"extra-params": {"attestation-policy-selector": "../x"}}
    ).encode(),
    "selector with a line feed": json.dumps(
        AUTH | {"extra-params": {"attestation-policy-selector": "a/b\n"}}
    ).encode(),
}


@pytest.mark.parametrize("path", ["/auth", "/attest"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_body_that_is_none(http: httpx.Client, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    problem(http.post(path, content=body, headers=headers), 400, "MalformedRequest")


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", ""])
def test_body_of_another_type(http: httpx.Client, kind: str) -> None:
    body = json.dumps(AUTH).encode()
    response = http.post("/auth", content=body, headers={"content-type": kind})
    problem(response, 400, "MalformedRequest")


@pytest.mark.parametrize(
    "change", [{"version": "0.5.0"}, {"version": "x"}, {"version": ""}, {"tee": "tdx"}]
)
def test_protocol_that_is_not_spoken(http: httpx.Client, change: dict[str, str]) -> None:
    problem(http.post("/auth", json=AUTH | change), 401, "UnsupportedRequest")


def spoil(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(sent: dict[str, Any]) -> None:
        *outer, last = path
        for name in outer:
            sent = sent[name]
        sent[last] = value

    return change


KEY: Final = ("runtime-data", "tee-pubkey")
PRIMARY: Final = ("tee-evidence", "primary_evidence")
SPOILED: Final = {
    "nonce that is no base64": spoil("runtime-data", "nonce", value="é"),
    "nonce of another alphabet": spoil("runtime-data", "nonce", value="-_-_"),
    "RSA key": spoil(*KEY, value={"kty": "RSA", "alg": "RSA-OAEP-256", "n": "A", "e": "AQAB"}),
    "another curve": spoil(*KEY, "crv", value="P-521"),
    "another algorithm": spoil(*KEY, "alg", value="ECDH-ES"),
    "short coordinate": spoil(*KEY, "x", value="AAAA"),
    "point that is not on the curve": spoil(*KEY, "x", value="A" * 43),
    "evidence that is no base64": spoil(*PRIMARY, "evidence", value="a b"),
    "evidence of a length that base64 has not": spoil(*PRIMARY, "evidence", value="A"),
    "no evidence": spoil(*PRIMARY, "evidence", value=""),
    "no UUID": spoil(*PRIMARY, "vm", value="alice"),
    "UUID in braces": spoil(*PRIMARY, "vm", value=f"{{{VM}}}"),
    "further evidence": spoil("tee-evidence", "additional_evidence", value='{"tpm": 1}'),
}


@pytest.mark.parametrize("change", SPOILED.values(), ids=SPOILED.keys())
def test_attestation_that_is_none(
    http: httpx.Client, alices: Platform, change: Callable[[dict[str, Any]], None]
) -> None:
    """It is refused before it uses the nonce up."""
    nonce = http.post("/auth", json=AUTH | SELECT).json()["nonce"]
    sent = attestation(alices, nonce)
    spoiled = json.loads(json.dumps(sent))
    change(spoiled)
    problem(http.post("/attest", json=spoiled), 400, "MalformedRequest")
    assert http.post("/attest", json=sent).status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/resource/a/b", 404),
        ("/resource/a/b/c/d", 404),
        ("/resource/a/b/", 404),
        ("/resource/a/b/%2e%2e", 400),
        ("/resource/a/b/%00", 400),
        ("/resource/a/b/" + "x" * 64, 400),
        ("/resource/a/b/%F0%9F%94%91", 400),
        ("/auth/", 404),
        ("", 404),
    ],
)
def test_path_that_is_none(http: httpx.Client, path: str, status: int) -> None:
    kind = {404: "NotFound", 400: "MalformedRequest"}[status]
    problem(http.get(path), status, kind)


def test_method_that_is_none(http: httpx.Client) -> None:
    for method, path in (("GET", "/auth"), ("DELETE", f"/resource/{KEY_PATH}"), ("PUT", "/attest")):
        response = http.request(method, path)
        problem(response, 405, "MethodNotAllowed")
        assert response.headers["allow"]


def test_body_that_is_too_large(http: httpx.Client, server: Server) -> None:
    problem(http.post("/attest", content=bytes(BODY_MAX_BYTES + 1)), 413, "TooLarge")

    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(1 << 16)

    # Or the broker closed the connection already, which is what it is about.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        problem(http.post("/attest", content=endless()), 413, "TooLarge")
    with connection(server) as client:  # it is not waited for
        client.sendall(
            b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n"
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def connection(server: Server, context: ssl.SSLContext | str | None = "default") -> socket.socket:
    host, port = server.url.removeprefix("https://").split(":")
    plain = socket.create_connection((host, int(port)), 30)
    if context is None:
        return plain
    context = ssl.create_default_context(cafile=server.directory.ca)
    return context.wrap_socket(plain, server_hostname=host)


def rest(client: socket.socket) -> bytes:
    """What comes until the broker closes the connection."""
    answer = b""
    try:
        while part := client.recv(1 << 16):
            answer += part
    except (ConnectionError, ssl.SSLError):
        pass
    return answer


def test_clients_that_do_not_go_on(server: Server) -> None:
    """Three that stop at different places, at once; the broker gives each of them up."""
    with connection(server) as silent, connection(server) as head, connection(server) as body:
        head.sendall(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\n")
        body.sendall(
            b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        started = time.monotonic()
        assert rest(silent) == b""
        assert rest(head) == b""
        assert rest(body).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started < 2 * max(HEAD_TIMEOUT_S, BODY_TIMEOUT_S)


def send_headers(client: socket.socket, size_bytes: int) -> None:
    for _ in range(size_bytes // 1000):
        client.sendall(b"X: " + b"x" * 1000 + b"\r\n")


def test_endless_head(server: Server) -> None:
    with connection(server) as client:
        client.sendall(b"GET /kbs/v0/auth HTTP/1.1\r\n")
        with pytest.raises((ConnectionError, ssl.SSLError)):
            send_headers(client, 64 * HEAD_MAX_BYTES)


@pytest.mark.parametrize(
    "data",
    [b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"POST /kbs/v0/auth HTTP/1.1\r\n"
     b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
def test_what_is_not_http(server: Server, data: bytes) -> None:
    with connection(server) as client:
        client.sendall(data)
        answer = rest(client)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")


def test_server_tells_nobody_of_its_insides(server: Server, http: httpx.Client) -> None:
    """After all these requests: no traceback in its log, nor in any answer here."""
    for body in BODIES.values():
        answer = http.post("/attest", content=body).text
        assert not re.search(r"Traceback|File |\.py|pydantic|sqlite", answer)
    assert not re.search(r"Traceback|Error", "".join(server.log))


def test_no_secret_is_on_the_wire_or_in_the_log(server: Server, alices: Platform) -> None:
    with server.client() as client:
        server.attest(client, alices)
        answer = client.resource(KEY_PATH)
    for content in (answer, "".join(server.log).encode(), server.directory.audit_log.read_bytes()):
        assert SECRET[:16] not in content
        assert text(SECRET)[:16].encode() not in content


# --- processes --------------------------------------------------------------------------------


def test_clients_rate_is_limited(directory: BrokerDirectory) -> None:
    with (
        serving(directory.path, "--workers", "1", "--auth-rate", "0.1") as server,
        raw_client(server) as client,
    ):
        assert client.post("/auth", json=AUTH).status_code == 200
        response = client.post("/auth", json=AUTH)
        problem(response, 429, "TooManyRequests")
        assert int(response.headers["retry-after"]) >= 1


def test_nonce_at_another_listener_and_after_a_restart(
    server: Server, directory: BrokerDirectory, alices: Platform
) -> None:
    with raw_client(server) as client:
        nonce = client.post("/auth", json=AUTH | SELECT).json()["nonce"]
        sent = attestation(alices, nonce)
        assert client.post("/attest", json=sent).status_code == 200
        cookies = {"kbs-session-id": client.cookies["kbs-session-id"]}
    for _ in range(2):
        with serving(directory.path, "--workers", "1") as other, raw_client(other) as client:
            client.cookies.update(cookies)
            problem(client.post("/attest", json=sent), 401, "AttestationError", "freshness")
            assert client.get(f"/resource/{KEY_PATH}").status_code == 200


def test_worker_that_dies_is_started_anew(directory: BrokerDirectory, alices: Platform) -> None:
    with serving(directory.path, "--workers", "1") as server:
        with raw_client(server) as client:
            nonce = client.post("/auth", json=AUTH | SELECT).json()["nonce"]
            sent = attestation(alices, nonce)
            assert client.post("/attest", json=sent).status_code == 200
            cookies = {"kbs-session-id": client.cookies["kbs-session-id"]}
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        with raw_client(server) as client:  # waits until the next one takes the connection
            client.cookies.update(cookies)
            problem(client.post("/attest", json=sent), 401, "AttestationError", "freshness")
        assert server.workers() != {worker}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_leaves_nothing(directory: BrokerDirectory, number: signal.Signals) -> None:
    with serving(directory.path, "--workers", "2") as server:
        with server.client() as client, pytest.raises(DeniedError):
            client.resource(KEY_PATH)
        mapped = "".join(Path(f"/proc/{one}/maps").read_text() for one in server.workers())
        (values,) = {Path(one).parent for one in re.findall(r"\S+/metrics-\S+", mapped)}
        assert values.is_dir()
        with outlived(server.processes()):
            assert server.stop(number) == 0
        assert not values.exists()
        assert not re.search("Traceback|Error", "".join(server.log))
    records = directory.audit_log.read_text().splitlines()
    assert json.loads(records[-1])["event"] == "stop"


def test_workers_do_not_outlive_the_broker(directory: BrokerDirectory) -> None:
    with serving(directory.path, "--workers", "2") as server:
        with server.client() as client, pytest.raises(DeniedError):
            client.resource(KEY_PATH)
        with outlived(server.processes()):
            server.process.kill()
            server.wait()


def test_others_cannot_read_a_workers_memory(server: Server) -> None:
    with server.client() as client, pytest.raises(DeniedError):
        client.resource(KEY_PATH)
    for worker in server.workers():
        # What is not dumpable is root's (proc(5)), and has no core.
        limits = Path(f"/proc/{worker}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)


def test_what_keeps_a_broker_from_starting(
    directory: BrokerDirectory, server: Server, tmp_path: Path
) -> None:
    def started(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "mktme.broker", "serve", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in ended.stderr
        return ended.returncode, ended.stderr

    status, said = started(str(tmp_path))
    assert status == 2
    assert "no broker's directory" in said
    taken = server.url.removeprefix("https://")
    status, said = started(str(directory.path), "--listen", taken)
    assert status == 2
    assert "Address already in use" in said
    status, said = started(str(directory.path), "--listen", "127.0.0.1:0", "--metrics", taken)
    assert status == 2
    assert "choose another --metrics" in said
    spoiled = create(tmp_path / "spoiled")
    (spoiled.keys / "generation").write_text("7")
    status, said = started(str(spoiled.path), "--listen", "127.0.0.1:0")
    assert status == 4
    assert "put back to generation 1, the last is 7" in said
    keyless = create(tmp_path / "keyless")
    (keyless.keys / "token.key").write_text("none")
    status, said = started(str(keyless.path), "--listen", "127.0.0.1:0", "--metrics", "none")
    assert status == 4
    assert "token.key: no PEM file" in said
    bare = create(tmp_path / "bare")
    bare.tls[1].write_text("none")
    status, said = started(str(bare.path), "--listen", "127.0.0.1:0", "--metrics", "none")
    assert status == 2
    assert "no certificate and its key" in said
