# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker over HTTP: shapes, limits, problems. What it decides is `mktme.broker.broker`'s.

Shapes are those of Trustee's protocol 0.4. ``tee`` is "mktme"; ``primary_evidence`` has the token
(CWT, base64url) and the VM's UUID. ``extra-params`` of the request may have
``attestation-policy-selector``: "TENANT/POLICY".
"""

from __future__ import annotations

import asyncio
import binascii
import functools
import logging
import time
from base64 import b64decode, b64encode, urlsafe_b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from fastapi import Cookie, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from mktme.attest.claims import RecipientKey
from mktme.broker import metrics
from mktme.broker.broker import (
    CONTENT_ALGORITHM,
    DEFAULT_SELECTOR,
    KEY_ALGORITHM,
    Attestation,
    Broker,
)
from mktme.broker.errors import BrokerError, DeniedError
from mktme.broker.rates import ClientRates
from mktme.broker.sessions import COOKIE_MAX_BYTES, LIFETIME_S

PREFIX: Final = "/kbs/v0"
SESSION_COOKIE: Final = "kbs-session-id"
TEE: Final = "mktme"
PROTOCOL: Final = "0.4.0"
PROBLEMS: Final = "https://github.com/confidential-containers/kbs/errors/"
PROBLEM_TYPE: Final = "application/problem+json"

BODY_MAX_BYTES: Final = 256 << 10
"""Evidence of one VM with 1024 exceptions and two certificates has some 40 KiB."""
EVIDENCE_MAX_CHARACTERS: Final = 192 << 10
BODY_TIMEOUT_S: Final = 10.0
"""From a request's head to the last byte of its body."""

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

log = logging.getLogger(__name__)


class _Shape(BaseModel):
    """What is not known is let pass, as RFC 7517 and Trustee do; no value is converted."""

    model_config = ConfigDict(strict=True, extra="ignore")


class ExtraParams(_Shape):
    """What a request may have further."""

    selector: Annotated[
        str | None,
        Field(
            alias="attestation-policy-selector",
            pattern=r"^[a-z0-9][a-z0-9._-]{0,62}/[a-z0-9][a-z0-9._-]{0,62}$",
            description="TENANT/POLICY; none: default/default.",
        ),
    ] = None


class AuthRequest(_Shape):
    """Trustee's Request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "version": PROTOCOL,
                    "tee": TEE,
                    "extra-params": {"attestation-policy-selector": "alice/strict"},
                }
            ]
        }
    )

    version: Annotated[str, Field(max_length=32, description="Of the protocol: 0.4.x.")]
    tee: Annotated[str, Field(max_length=32, description=f"{TEE}; the broker knows no other.")]
    extra_params: Annotated[ExtraParams | Literal[""], Field(alias="extra-params")] = ""


class Challenge(_Shape):
    """Trustee's Challenge."""

    nonce: Annotated[str, Field(description="32 bytes, base64: eat_nonce of the evidence.")]
    extra_params: Annotated[Literal[""], Field(alias="extra-params")] = ""


_Coordinate = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]


class TeePubKey(_Shape):
    """The VM's recipient key, as it is in the evidence (RFC 7518, section 6.2.1)."""

    kty: Literal["EC"]
    crv: Literal["P-256"]
    alg: Literal["ECDH-ES+A256KW"]
    x: _Coordinate
    y: _Coordinate


class RuntimeData(_Shape):
    """Trustee's RuntimeData."""

    nonce: Annotated[str, Field(max_length=128, description="The challenge's.")]
    tee_pubkey: Annotated[TeePubKey, Field(alias="tee-pubkey")]


class PrimaryEvidence(_Shape):
    """What a platform says of one VM."""

    evidence: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9_-]+$",
            max_length=EVIDENCE_MAX_CHARACTERS,
            description="An EAT (RFC 9711) as CWT, base64url.",
        ),
    ]
    vm: Annotated[
        str,
        Field(
            pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
            description="UUID of the VM.",
        ),
    ]


class TeeEvidence(_Shape):
    """Trustee's CompositeEvidence; there is no additional one."""

    primary_evidence: PrimaryEvidence
    additional_evidence: Literal["", "{}"] = ""


class AttestRequest(_Shape):
    """Trustee's Attestation."""

    runtime_data: Annotated[RuntimeData, Field(alias="runtime-data")]
    tee_evidence: Annotated[TeeEvidence, Field(alias="tee-evidence")]


class AttestationToken(_Shape):
    """The result."""

    token: Annotated[str, Field(description="An EAR, signed as JWT with ES256.")]


class Jwe(_Shape):
    """A resource, encrypted to the VM's recipient key (RFC 7516, section 7.2.2)."""

    protected: Annotated[
        str, Field(description=f"{KEY_ALGORITHM}, {CONTENT_ALGORITHM}, and the ephemeral key.")
    ]
    encrypted_key: str
    iv: str
    ciphertext: str
    tag: str


class Problem(_Shape):
    """Why not (RFC 7807)."""

    type: Annotated[str, Field(description=f"{PROBLEMS}KIND")]
    status: int
    detail: str
    checks: Annotated[list[str], Field(description="Those that failed.")]


_Session = Annotated[
    str | None, Cookie(alias=SESSION_COOKIE, max_length=COOKIE_MAX_BYTES, description="From auth.")
]
_Part = Annotated[str, Path(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,62}$")]


def make_app(open_broker: Callable[[], Broker], rates: ClientRates) -> _App:
    """The broker as an ASGI application.

    Args:
        open_broker: called when it starts; what it gives is closed when it stops.
        rates: for challenges.
    """
    return Guard(_routes(open_broker, rates))


def openapi() -> dict[str, Any]:
    """The OpenAPI document of the application (docs/broker/openapi.json)."""

    def none() -> Broker:
        raise AssertionError("a document needs no broker")

    document = _routes(none, ClientRates(1, 1)).openapi()
    # FastAPI's own problem, which `_malformed` replaces.
    for path in document["paths"].values():
        for operation in path.values():
            del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        del document["components"]["schemas"][name]
    return document


def _routes(open_broker: Callable[[], Broker], rates: ClientRates) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.broker = open_broker()
        try:
            yield
        finally:
            app.state.broker.close()

    app = FastAPI(
        title="mktme key broker",
        version=PROTOCOL,
        description="Releases keys and secrets to VMs whose evidence passes their tenant's policy.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            BrokerError: _broker_problem,
            RequestValidationError: _malformed,
            HTTPException: _http_problem,
            Exception: _fault,
        },
    )

    @app.post(
        f"{PREFIX}/auth",
        operation_id="auth",
        response_model=Challenge,
        responses=_problems(400, 401, 408, 413, 429, 503),
    )
    async def auth(asked: AuthRequest, request: Request, response: Response) -> Challenge:
        """Ask for a challenge. The session is in the cookie kbs-session-id."""
        wait_s = rates.take(_client(request))
        if wait_s:
            raise DeniedError(
                "too many requests",
                status=429,
                kind="TooManyRequests",
            )
        if asked.version.rpartition(".")[0] != PROTOCOL.rpartition(".")[0] or asked.tee != TEE:
            raise DeniedError(
                f"protocol {PROTOCOL} and tee {TEE} only", status=401, kind="UnsupportedRequest"
            )
        selector = asked.extra_params.selector if asked.extra_params else None
        broker: Broker = request.app.state.broker
        cookie, nonce = broker.challenge(selector or DEFAULT_SELECTOR)
        _set_cookie(response, cookie)
        return Challenge.model_construct(nonce=b64encode(nonce).decode())

    @app.post(
        f"{PREFIX}/attest",
        operation_id="attest",
        response_model=AttestationToken,
        responses=_problems(400, 401, 408, 413, 503),
    )
    async def attest(
        sent: AttestRequest, request: Request, response: Response, session: _Session = None
    ) -> AttestationToken:
        """Answer the challenge with evidence. Each session has one try."""
        broker: Broker = request.app.state.broker
        cookie, token = broker.attest(session, _attestation(sent), _client(request))
        _set_cookie(response, cookie)
        return AttestationToken.model_construct(token=token)

    @app.get(
        f"{PREFIX}/resource/{{repository}}/{{type}}/{{tag}}",
        operation_id="resource",
        response_model=Jwe,
        responses=_problems(400, 401, 403, 404, 408, 413, 503),
    )
    async def resource(
        repository: _Part, type: _Part, tag: _Part, request: Request, session: _Session = None
    ) -> Response:
        """Fetch a resource in an attested session, as a JWE."""
        broker: Broker = request.app.state.broker
        sealed = broker.release(session, f"{repository}/{type}/{tag}", _client(request))
        return Response(msgspec.json.encode(sealed), media_type="application/json")

    return app


def _attestation(sent: AttestRequest) -> Attestation:
    key, evidence = sent.runtime_data.tee_pubkey, sent.tee_evidence.primary_evidence
    try:
        return Attestation(
            b64decode(sent.runtime_data.nonce, validate=True),
            RecipientKey(_unpadded(key.x), _unpadded(key.y)),
            _unpadded(evidence.evidence),
            UUID(evidence.vm),
        )
    except ValueError as error:
        raise DeniedError("malformed request", status=400, kind="MalformedRequest") from error


def _unpadded(text: str) -> bytes:
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError("no base64url") from error


def _client(request: Request) -> str:
    return request.client.host if request.client else "-"


def _set_cookie(response: Response, cookie: str) -> None:
    response.set_cookie(
        SESSION_COOKIE,
        cookie,
        max_age=LIFETIME_S,
        path=PREFIX,
        secure=True,
        httponly=True,
        samesite="strict",
    )


# --- problems ---------------------------------------------------------------------------------


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "model": Problem,
            "content": {PROBLEM_TYPE: schema},
        }
        for status in statuses
    }


def _problem(status: int, kind: str, detail: str, checks: tuple[str, ...] = ()) -> Response:
    body = {"type": PROBLEMS + kind, "status": status, "detail": detail, "checks": checks}
    return Response(msgspec.json.encode(body), status, media_type=PROBLEM_TYPE)


async def _broker_problem(_request: Request, error: Exception) -> Response:
    if isinstance(error, DeniedError):
        response = _problem(error.status, error.kind, str(error), error.checks)
        if error.status in (429, 503):
            response.headers["retry-after"] = "1"
        return response
    # What the broker itself lacks: its databases, its audit log.
    log.error("%s", error)
    return _problem(503, "Unavailable", "the broker cannot answer now")


async def _malformed(_request: Request, _error: Exception) -> Response:
    return _problem(400, "MalformedRequest", "malformed request")


async def _http_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kinds = {404: "NotFound", 405: "MethodNotAllowed"}
    if error.status_code not in kinds:
        return await _malformed(_request, error)
    detail = HTTPStatus(error.status_code).phrase.lower()
    response = _problem(error.status_code, kinds[error.status_code], detail)
    response.headers.update(error.headers or {})
    return response


async def _fault(_request: Request, _error: Exception) -> Response:
    return _problem(500, "InternalError", "the broker failed")


# --- limits -----------------------------------------------------------------------------------


class Guard:
    """Reads a request's body, within limits, before anything else sees it; counts and times.

    Args:
        app: what answers.
    """

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = _endpoint(scope["path"])
        started = time.perf_counter()
        status = 0
        refused = None

        async def answer(message: _Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
            await send(message)

        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _read(scope, receive)
        except TimeoutError:
            refused = _problem(408, "Timeout", "the request did not come in time")
        except _TooLargeError:
            refused = _problem(413, "TooLarge", "the request is too large")
        except _GoneError:
            return
        else:
            started = time.perf_counter()
            try:
                await self._app(scope, functools.partial(_replay, [body], receive), answer)
            except Exception as error:  # answered already, by _fault
                log.error("%s at %s", type(error).__name__, _where(error))
        if refused is not None:
            # What of the request is still to come is not read.
            refused.headers["connection"] = "close"
            await refused(scope, receive, answer)
        metrics.REQUESTS.labels(endpoint, str(status)).inc()
        metrics.REQUEST_SECONDS.labels(endpoint).observe(time.perf_counter() - started)


class _TooLargeError(Exception):
    """A body is larger than any that makes sense."""


class _GoneError(Exception):
    """The client closed its connection."""


async def _read(scope: _Message, receive: _Receive) -> bytes:
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > BODY_MAX_BYTES:
            raise _TooLargeError
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        body += message.get("body", b"")
        if len(body) > BODY_MAX_BYTES:
            raise _TooLargeError
        more = message.get("more_body", False)
    return bytes(body)


async def _replay(bodies: list[bytes], receive: _Receive) -> _Message:
    if bodies:
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}
    return await receive()


def _endpoint(path: str) -> str:
    """For labels, of which there must not be as many as clients can think of."""
    name = path.removeprefix(f"{PREFIX}/").partition("/")[0]
    return name if path.startswith(PREFIX) and name in ("auth", "attest", "resource") else "other"


def _where(error: BaseException) -> str:
    """Where it was raised; its text could have what a client sent, or worse."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
