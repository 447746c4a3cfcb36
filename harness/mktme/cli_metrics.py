# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme metrics`: a running platform for Prometheus."""

from __future__ import annotations

import functools
import re
from typing import Annotated, Final

import typer

from mktme.cli_output import EngineOption, out
from mktme.service.wire import Role
from mktme.vm.host import UsageError
from mktme.vm.running import connected
from mktme.vm.ssh import LOOPBACK

_LISTEN: Final = f"{LOOPBACK}:9464"


def metrics(
    listen: Annotated[
        str | None, typer.Option(metavar="[ADDRESS:]PORT", help="Serve them, until Ctrl-C.")
    ] = None,
    engine: EngineOption = None,
) -> None:
    """Print a running platform's metrics for Prometheus, or serve them."""
    # Not before they are wanted: `mktme --help` is quick.
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server

    from mktme.service.metrics import PlatformCollector

    with connected(engine, Role.OBSERVER):
        pass  # a usage error now, rather than a platform that is never up
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PlatformCollector(functools.partial(connected, engine, Role.OBSERVER)))
    if listen is None:
        typer.echo(generate_latest(registry), nl=False)
        return
    address, port = _address(listen)
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {address}:{port}: {error.strerror}", hint="choose another --listen"
        ) from error
    out.print(
        f"metrics at http://{address}:{server.server_port}/metrics; Ctrl-C ends", markup=False
    )
    try:
        thread.join()
    finally:
        server.shutdown()
        server.server_close()


def _address(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:(?P<address>[^:]+|\[[0-9a-fA-F:]+\]):)?(?P<port>\d{1,5})", text)
    if found is None or int(found["port"]) > 65535:
        raise UsageError(f"{text!r} is nowhere to listen", hint=f"such as --listen {_LISTEN}")
    return (found["address"] or LOOPBACK).strip("[]"), int(found["port"])
