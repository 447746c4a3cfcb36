# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's client: challenge, evidence, attestation, resource.

::

    with BrokerClient("https://broker:8443", ca=Path("ca.crt")) as broker:
        broker.attest(vm, lambda nonce: engine.evidence(nonce, vm), policy="alice/strict")
        engine.release_key(vm, broker.resource("alice/key/vm1"))

The client may be anybody: what it carries is signed by the platform, or encrypted to it. The
broker's certificate is always verified, against the given CA alone.
"""

from __future__ import annotations

import ssl
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self, TypeVar
from uuid import UUID

import httpx
import msgspec

from mktme.attest.claims import RecipientKey, decode_claims
from mktme.attest.errors import AttestationError
from mktme.attest.token import Token
from mktme.broker.errors import BrokerGoneError, BrokerSetupError, DeniedError

PREFIX: Final = "/kbs/v0"
PROTOCOL: Final = "0.4.0"
ANSWER_MAX_BYTES: Final = 1 << 20
"""A secret of 64 KiB as JWE, or a token, is much less."""

_T = TypeVar("_T")


class _Challenge(msgspec.Struct):
    nonce: str


class _Result(msgspec.Struct):
    token: str


class _Problem(msgspec.Struct):
    type: str
    detail: str
    checks: tuple[str, ...] = ()


class BrokerClient:
    """A connection to a broker, and the session on it; a context manager.

    Args:
        url: https://HOST[:PORT].
        ca: a PEM file with the CA that the broker's certificate must be of.
        timeout_s: for each answer.

    Raises:
        BrokerSetupError: the URL or the file is none.
    """

    def __init__(self, url: str, ca: Path, timeout_s: float = 30.0) -> None:
        if not url.startswith("https://"):
            raise BrokerSetupError(f"{url!r} is no broker", hint="such as https://localhost:8443")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which verifies, names too
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_verify_locations(ca)
        except OSError as error:  # ssl.SSLError is one
            raise BrokerSetupError(f"{ca}: no PEM file of a CA's certificate") from error
        self._url = url
        try:
            # trust_env: no proxy and no other CA out of the environment.
            self._http = httpx.Client(
                base_url=url, verify=context, timeout=timeout_s, trust_env=False
            )
        except httpx.InvalidURL as error:
            raise BrokerSetupError(f"{url!r} is no URL: {error}") from error

    def attest(
        self, vm: UUID, evidence: Callable[[bytes], bytes], *, policy: str | None = None
    ) -> str:
        """Attest a VM, and keep the session for its resources.

        Args:
            vm: which.
            evidence: gives the token for a nonce.
            policy: TENANT/POLICY to be appraised by; None: default/default.

        Returns:
            The attestation result: an EAR, signed by the broker as a JWT.

        Raises:
            DeniedError: the evidence does not pass.
            AttestationError: what `evidence` gave is none.
            BrokerGoneError: the broker cannot be reached.
        """
        self._http.cookies.clear()
        asked = {
            "version": PROTOCOL,
            "tee": "mktme",
            "extra-params": "" if policy is None else {"attestation-policy-selector": policy},
        }
        challenge = self._decode(self._ask("POST", "/auth", asked), _Challenge)
        try:
            nonce = b64decode(challenge.nonce, validate=True)
        except ValueError as error:
            raise self._nonsense() from error
        token = evidence(nonce)
        key = recipient_key(token, vm)
        attestation = {
            "runtime-data": {
                "nonce": challenge.nonce,
                "tee-pubkey": {
                    "kty": "EC",
                    "crv": "P-256",
                    "alg": "ECDH-ES+A256KW",
                    "x": _text(key.x),
                    "y": _text(key.y),
                },
            },
            "tee-evidence": {
                "primary_evidence": {"evidence": _text(token), "vm": str(vm)},
                "additional_evidence": "{}",
            },
        }
        return self._decode(self._ask("POST", "/attest", attestation), _Result).token

    def resource(self, path: str) -> bytes:
        """Fetch a resource, after `attest`.

        Args:
            path: REPOSITORY/TYPE/TAG.

        Returns:
            A JWE (JSON), encrypted to the VM's recipient key.

        Raises:
            DeniedError: it is not released.
            BrokerGoneError: the broker cannot be reached.
        """
        return self._ask("GET", f"/resource/{path}")

    def close(self) -> None:
        """Close the connection and forget the session; again does nothing."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _ask(self, method: str, path: str, body: object = None) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            with self._http.stream(
                method, PREFIX + path, content=content, headers=headers
            ) as response:
                answer = bytearray()
                for part in response.iter_bytes():
                    answer += part
                    if len(answer) > ANSWER_MAX_BYTES:
                        raise self._nonsense()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BrokerGoneError(
                f"broker {self._url}: {error}", hint="is it running, and is this its CA?"
            ) from error
        if response.status_code == httpx.codes.OK:
            return bytes(answer)
        problem = self._decode(bytes(answer), _Problem)
        raise DeniedError(
            f"the broker refuses: {problem.detail}"
            + (f" ({', '.join(problem.checks)})" if problem.checks else ""),
            status=response.status_code,
            kind=problem.type.rpartition("/")[2],
            checks=problem.checks,
            hint="its audit log has the reasons",
        )

    def _decode(self, answer: bytes, shape: type[_T]) -> _T:
        try:
            return msgspec.json.decode(answer, type=shape)
        except (msgspec.MsgspecError, ValueError) as error:
            raise self._nonsense() from error

    def _nonsense(self) -> BrokerGoneError:
        return BrokerGoneError(
            f"broker {self._url}: its answer is none", hint="is it a broker of mktme's?"
        )


def recipient_key(token: bytes, vm: UUID) -> RecipientKey:
    """The recipient key of a VM in a token, whoever signed that.

    Raises:
        AttestationError: it has none.
    """
    parsed = Token.parse(token)
    claims = decode_claims(parsed.verify(parsed.key())).vm(vm)
    if claims is None:
        raise AttestationError(f"the evidence says nothing of {vm}")
    return claims.recipient_key


def _text(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")
