# SPDX-License-Identifier: GPL-2.0-or-later
"""The client, and brokers that are none."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Final, cast

import pytest

from mktme.attest.errors import AttestationError
from mktme.broker.client import ANSWER_MAX_BYTES, BrokerClient, recipient_key
from mktme.broker.directory import BrokerDirectory, create
from mktme.broker.errors import BrokerGoneError, DeniedError

from ..attest.signing import VM, Platform

ANSWERS: Final[dict[str, tuple[int, bytes]]] = {
    "no JSON": (200, b"<html>"),
    "another shape": (200, b'{"nonce": 7}'),
    "no base64": (200, b'{"nonce": "*"}'),
    "without end": (200, bytes(ANSWER_MAX_BYTES + 1)),
    "another place": (302, b""),
    "a proxy's error": (502, b"<html>bad gateway</html>"),
    "no UTF-8": (500, b'{"type": "\xff", "detail": ""}'),
}


class Impostor(HTTPServer):
    """Has the broker's certificate, and answers what a test wants."""

    answer: tuple[int, bytes] = (200, b"")


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        status, body = cast(Impostor, self.server).answer
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("location", "http://127.0.0.1:1/")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> BrokerDirectory:
    return create(tmp_path_factory.mktemp("client") / "broker")


@pytest.fixture
def impostor(directory: BrokerDirectory) -> Iterator[Impostor]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*directory.tls)
    with Impostor(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def client(server: Impostor, ca: Path) -> BrokerClient:
    return BrokerClient(f"https://127.0.0.1:{server.server_port}", ca, timeout_s=10)


def never(_nonce: bytes) -> bytes:
    raise AssertionError("no evidence is made for this")


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_answer_that_is_none(
    impostor: Impostor, directory: BrokerDirectory, answer: tuple[int, bytes]
) -> None:
    impostor.answer = answer
    with client(impostor, directory.ca) as broker, pytest.raises(BrokerGoneError) as caught:
        broker.attest(VM, never)
    assert "its answer is none" in str(caught.value)


def test_refusal(impostor: Impostor, directory: BrokerDirectory) -> None:
    problem = b'{"type": "https://x/errors/Busy", "status": 503, "detail": "no", "checks": ["a"]}'
    impostor.answer = (503, problem)
    with client(impostor, directory.ca) as broker, pytest.raises(DeniedError) as caught:
        broker.attest(VM, never)
    error = caught.value
    assert (error.status, error.kind, error.checks) == (503, "Busy", ("a",))


def test_nobody_listens(impostor: Impostor, directory: BrokerDirectory) -> None:
    with BrokerClient("https://127.0.0.1:1", directory.ca) as broker:
        with pytest.raises(BrokerGoneError, match="Connection refused"):
            broker.attest(VM, never)
        with pytest.raises(BrokerGoneError, match="Connection refused"):
            broker.resource("a/b/c")


def test_evidence_that_is_none(platform: Platform) -> None:
    with pytest.raises(AttestationError):
        recipient_key(b"none", VM)
    token = platform.sign(platform.evidence(platform.vm(name="other")))
    assert recipient_key(token, VM).public_key() == platform.recipient.public_key()
    with pytest.raises(AttestationError, match="says nothing of"):
        recipient_key(token, VM.__class__(int=1))
