# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP surface under schemathesis: what its OpenAPI document allows, and what it does not.

Each request goes to a real server over TLS. Of those that are as the document wants them, each
second one has what it takes to get further: a session's cookie, its nonce, a key that is one.
Whatever is sent, the answer is one of those that the document has for it, and of the form that it
has.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from mktme.attest.claims import RecipientKey
from mktme.broker.app import PREFIX, SESSION_COOKIE, openapi
from mktme.broker.broker import public_jwk
from mktme.broker.directory import create
from mktme.broker.openapi import document

from ..attest.signing import Platform
from .server import Server, platform_now, serving
from .setting import KEY_PATH, SECRET, furnish
from .test_server import AUTH, SELECT, raw_client

DOCUMENT: Final = Path(__file__).parents[3] / "docs" / "broker" / "openapi.json"
EXAMPLES: Final = 100
CHECKS: Final = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
ANSWERS: Final[list[tuple[str, int]]] = []

schema = schemathesis.openapi.from_dict(openapi())


@pytest.fixture(scope="module")
def alices() -> Platform:
    return platform_now()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, alices: Platform) -> Iterator[Server]:
    broker = create(tmp_path_factory.mktemp("broker") / "broker")
    furnish(broker, alices)
    with serving(broker.path, "--workers", "1", "--auth-rate", "10000") as server:
        yield server


def test_document_in_the_repository_is_the_applications() -> None:
    assert DOCUMENT.read_text("utf-8") == document(), "python -m mktme.broker.openapi " + str(
        DOCUMENT.relative_to(Path.cwd())
    )


def further(case: Case[Any], server: Server, alices: Platform) -> None:
    """Give a request what random values do not hit."""
    match case.operation.path.removeprefix(PREFIX):
        case "/attest":
            with raw_client(server) as client:
                nonce = client.post("/auth", json=AUTH | SELECT).json()["nonce"]
                case.cookies[SESSION_COOKIE] = client.cookies[SESSION_COOKIE]
            key = public_jwk(RecipientKey.of(Platform().recipient.public_key()))
            if isinstance(case.body, dict):
                case.body["runtime-data"] = {"nonce": nonce, "tee-pubkey": key}
        case "/auth":
            if isinstance(case.body, dict):
                case.body |= AUTH
        case _:
            with server.client() as client:
                server.attest(client, alices)
                case.cookies[SESSION_COOKIE] = client._http.cookies[SESSION_COOKIE]
            if len(ANSWERS) % 4 == 1:
                names = KEY_PATH.split("/")
                case.path_parameters = dict(zip(("repository", "type", "tag"), names, strict=True))


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_any_request(case: Case[Any], server: Server, alices: Platform) -> None:
    assert case.meta is not None
    if case.meta.generation.mode.is_positive and len(ANSWERS) % 2:
        further(case, server, alices)
    response = case.call(base_url=server.url, verify=str(server.directory.ca), timeout=30)
    case.validate_response(response, checks=CHECKS)
    ANSWERS.append((case.operation.path.removeprefix(PREFIX)[:9], response.status_code))
    body = response.content
    assert SECRET[:16] not in body
    assert not re.search(rb"Traceback|\.py\b|pydantic|sqlite", body)


def test_what_was_reached(server: Server) -> None:
    """That the requests above were worth it."""
    assert set(ANSWERS) >= {
        ("/auth", 200),
        ("/auth", 400),
        ("/auth", 401),
        ("/attest", 400),
        ("/attest", 401),
        ("/resource", 200),
        ("/resource", 401),
        ("/resource", 404),
    }
    failed = Counter(
        one["name"]
        for line in server.directory.audit_log.read_text().splitlines()
        for one in json.loads(line).get("checks", ())
    )
    assert failed["format"]  # evidence was appraised
    assert "Traceback" not in "".join(server.log)
