# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's processes: one that holds the sockets, and workers that answer over TLS 1.3.

Workers share what must be shared (used cookies, the store, the audit log) through files alone, so
that it does not matter which of them a connection comes to, nor whether one was started anew.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import logging
import multiprocessing
import os
import resource
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from mktme.broker.audit import AuditLog, Record
from mktme.broker.directory import BrokerDirectory, check_pair
from mktme.broker.errors import BrokerError, BrokerSetupError
from mktme.engine.errors import MktmeError

HEAD_TIMEOUT_S: Final = 10.0
"""From a connection, or the first byte of a request, to the end of the request's head."""
HEAD_MAX_BYTES: Final = 32 << 10
KEEP_ALIVE_S: Final = 30
CONNECTIONS_MAX: Final = 1000
"""Of one worker; more get 503."""
STOP_TIMEOUT_S: Final = 5
"""For answers that are under way when the broker is told to stop."""

# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to serve.

    Attributes:
        directory: the broker's.
        listen: address and port of the HTTPS listener; port 0: any that is free.
        metrics: of the listener for Prometheus, plain HTTP; None: there is none.
        workers: processes.
        auth_per_s: challenges that one client address may ask for in a second, of one worker; ten
            seconds' worth at once.
    """

    directory: BrokerDirectory
    listen: tuple[str, int]
    metrics: tuple[str, int] | None
    workers: int
    auth_per_s: float


def serve(settings: Settings, tell: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP starts the workers anew, one after the other.

    Args:
        settings: how.
        tell: is told where, when connections can be made.

    Raises:
        KeyMaterialError: a key is missing.
        BrokerError: the directory cannot be used, or the addresses not be listened on.
    """
    _harden()
    # What keeps a worker from starting is better known here.
    check_pair(*settings.directory.tls)
    broker = settings.directory.open_broker()
    generation = broker.check()
    broker.close()
    # Where the workers' prometheus_client keeps its values.
    with (
        tempfile.TemporaryDirectory(prefix="metrics-", dir=settings.directory.path) as values,
        AuditLog(settings.directory.audit_log) as audit,
        _listener(*settings.listen) as listener,
    ):
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = values
        stop_metrics = _serve_metrics(settings.metrics, values, tell)
        try:
            audit.write(Record(event="serve", outcome="done", generation=generation))
            tell(f"https://{_shown(listener)}")
            certificate, key = settings.directory.tls
            config = uvicorn.Config(
                functools.partial(_worker, settings),
                factory=True,
                http=BoundedProtocol,
                loop="uvloop",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                workers=settings.workers,
                limit_concurrency=CONNECTIONS_MAX,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=STOP_TIMEOUT_S,
                ssl_certfile=certificate,
                ssl_keyfile=key,
                ssl_context_factory=_tls,
            )
            workers = Multiprocess(config, [listener])
            workers.run()
            if any(one.exitcode == STARTUP_FAILURE for one in workers.processes):
                raise BrokerError("a worker does not start", hint="its error is above")
            audit.write(Record(event="stop", outcome="done"))
        finally:
            stop_metrics()


def _harden() -> None:
    """No core, and no other process of this user reads this one's memory."""
    _prctl(_PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _worker(settings: Settings) -> Any:
    """In a worker: the application."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != os.getppid():  # it was gone before
        sys.exit(STARTUP_FAILURE)
    _harden()  # it was lost when the worker was executed
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    from mktme.broker.app import make_app
    from mktme.broker.rates import ClientRates

    rates = ClientRates(settings.auth_per_s, 10 * settings.auth_per_s)
    try:
        broker = settings.directory.open_broker()
    except MktmeError as error:
        log.error("%s", error)
        sys.exit(STARTUP_FAILURE)
    return make_app(lambda: broker, rates)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with an end to waiting for a request's head, and to its size."""

    _waiting: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection: its first request is due."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes, which may be of a head."""
        super().data_received(data)
        if self._waiting is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_MAX_BYTES:
                self._give_up()

    def on_message_begin(self) -> None:
        """The first byte of a request: its head is due."""
        super().on_message_begin()
        if self._waiting is None:
            self._wait()

    def on_headers_complete(self) -> None:
        """The head is there; what follows it is limited by `mktme.broker.app`."""
        self._arrived()
        super().on_headers_complete()

    def _wait(self) -> None:
        self._head_bytes = 0
        self._waiting = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _arrived(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._arrived()
        self.transport.abort()


def _tls(_config: uvicorn.Config, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    context = default()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _listener(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        # From now on connections wait until a worker takes them.
        listener.listen(CONNECTIONS_MAX)
        listener.set_inheritable(True)
    except OSError as error:
        listener.close()
        raise BrokerSetupError(
            f"cannot listen on {address}:{port}: {error.strerror}", hint="choose another --listen"
        ) from error
    return listener


def _serve_metrics(
    where: tuple[str, int] | None, values: str, tell: Callable[[str], None]
) -> Callable[[], None]:
    if where is None:
        return lambda: None
    from prometheus_client import start_http_server

    from mktme.broker.metrics import of_all_workers

    address, port = where
    try:
        server, thread = start_http_server(port, address, of_all_workers(values))
    except OSError as error:
        raise BrokerSetupError(
            f"cannot listen on {address}:{port}: {error.strerror}", hint="choose another --metrics"
        ) from error
    tell(f"http://{_shown(server.socket)}/metrics")

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _shown(listener: socket.socket) -> str:
    address, port, *_ = listener.getsockname()
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
