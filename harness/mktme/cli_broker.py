# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme broker`: keys and secrets for VMs that prove what they are.

The rest of mktme needs libvirt; a broker does not, and neither does ``python -m mktme.broker``,
which has these commands alone.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer
from rich.markup import escape

from mktme.broker.errors import BrokerSetupError
from mktme.cli_output import JsonFlag, err, make_table, out, print_json
from mktme.engine.keys import read_private_file
from mktme.engine.xts import Algorithm, wipe

if TYPE_CHECKING:  # not before they are wanted: `mktme --help` is quick
    from mktme.broker.directory import BrokerDirectory
    from mktme.broker.store import Terms

broker_app = typer.Typer(
    help="A key broker: secrets for VMs whose evidence passes a policy.", no_args_is_help=True
)

_LISTEN: Final = "127.0.0.1:8443"
_METRICS: Final = "127.0.0.1:9465"

DirectoryArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The broker's directory.")]
NameArgument = Annotated[str, typer.Argument(metavar="TENANT/NAME", help="Whose, and its name.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="What it is to be.")]


@broker_app.command()
def init(
    directory: DirectoryArgument,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Another place for the keys.", show_default="DIR/keys"),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Host name or address for the TLS certificate. May be given again.",
            show_default="this machine's loopback",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own certificate and chain, PEM, in place of it."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key, PEM without a passphrase.")
    ] = None,
) -> None:
    """Make a broker's directory, with new keys."""
    from mktme.broker.directory import LOCAL_NAMES, create

    if (tls_cert is None) != (tls_key is None):
        raise BrokerSetupError("--tls-cert and --tls-key belong together", hint="give both")
    if tls_cert is not None and name:
        raise BrokerSetupError("--name is for a new certificate", hint="leave --tls-cert out")
    pair = None if tls_cert is None or tls_key is None else (tls_cert, tls_key)
    broker = create(directory, keys=keys, names=tuple(name or LOCAL_NAMES), certificate=pair)
    _say(f"{directory}: a broker without tenants; next: mktme broker trust, set-policy")
    if pair is None:
        _say(f"clients pin {broker.ca}")


@broker_app.command()
def trust(directory: DirectoryArgument, name: NameArgument, file: FileArgument) -> None:
    """Let a tenant trust platforms' CAs: FILE has their certificates, PEM."""
    from mktme.attest.identity import load_trust
    from mktme.broker.store import Kind

    load_trust([file])  # says what is wrong with it
    _put(directory, Kind.TRUST, name, file)


@broker_app.command("set-policy")
def set_policy(
    directory: DirectoryArgument,
    name: NameArgument,
    file: FileArgument,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Its reference values, too: reference.json."),
    ] = None,
) -> None:
    """Give a tenant a policy: FILE is a policy.toml."""
    from mktme.broker.store import Kind

    _put(directory, Kind.POLICY, name, file)
    if reference is not None:
        _put(directory, Kind.REFERENCE, name, reference)


@broker_app.command("set-reference")
def set_reference(directory: DirectoryArgument, name: NameArgument, file: FileArgument) -> None:
    """Give the policy of that name reference values: FILE is a reference.json."""
    from mktme.broker.store import Kind

    _put(directory, Kind.REFERENCE, name, file)


@broker_app.command("set-resource")
def set_resource(
    directory: DirectoryArgument,
    path: Annotated[str, typer.Argument(metavar="REPOSITORY/TYPE/TAG")],
    tenant: Annotated[str, typer.Option(help="Whose it is.")],
    policy: Annotated[str, typer.Option(help="Which of the tenant's policies has to pass.")],
    vm: Annotated[
        str | None, typer.Option(metavar="NAME|UUID", help="The only VM that may have it.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What it is; for your eyes only (chmod 600)."),
    ] = None,
    random_key: Annotated[
        Algorithm | None,
        typer.Option(help="Or draw a new key for this cipher, which nobody is shown."),
    ] = None,
) -> None:
    """Give a tenant a key or secret, and say what it takes to get it."""
    from mktme.broker.store import SECRET_MAX_BYTES, Kind, Terms

    if (file is None) == (random_key is None):
        raise BrokerSetupError("what is it?", hint="either --file FILE or --random-key CIPHER")
    terms = Terms(policy, vm)
    if random_key is not None:
        # Data key, then tweak key, as SET_KEY_DIRECT takes them.
        secret = secrets.token_bytes(random_key.key_bytes)
        _tell(directory, Kind.RESOURCE.value, tenant, path, secret, terms)
        return
    assert file is not None
    buffer = bytearray(SECRET_MAX_BYTES + 1)
    try:
        length = read_private_file(file, buffer)
        _tell(directory, Kind.RESOURCE.value, tenant, path, bytes(buffer[:length]), terms)
    finally:
        wipe(buffer)


@broker_app.command()
def remove(
    directory: DirectoryArgument,
    kind: Annotated[
        Literal["policy", "reference", "trust", "resource"], typer.Argument(metavar="KIND")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name; of a resource, its path.")],
    tenant: Annotated[str, typer.Option(help="Whose it is.")],
) -> None:
    """Take a policy, reference values, trust or a resource away from a tenant."""
    from mktme.broker.store import Kind

    generation = _open(directory).remove(Kind(kind), tenant, name)
    _say(f"{kind} {name} of {tenant} removed; generation {generation}")


@broker_app.command("list")
def list_(directory: DirectoryArgument, json: JsonFlag = False) -> None:
    """Show what there is, and on what terms; never a secret."""
    from mktme.broker.report import describe

    with _open(directory).open_store() as store:
        listing = describe(store.contents())
    if json:
        print_json(listing)
        return
    columns = ("tenant", "kind", "name", "version", "policy", "VM", "bytes")
    table = make_table(escape(str(directory)), *columns, right=("version", "bytes"))
    for row in listing.rows:
        cells = (row.tenant, row.kind, row.name, row.version, row.policy, row.vm)
        table.add_row(
            *(escape("-" if one is None else str(one)) for one in cells), f"{row.size_bytes:,}"
        )
    out.print(table)
    out.print(f"generation {listing.generation}", highlight=False)


@broker_app.command()
def serve(
    directory: DirectoryArgument,
    listen: Annotated[
        str, typer.Option(metavar="ADDRESS:PORT", help="Of the HTTPS listener.")
    ] = _LISTEN,
    metrics: Annotated[
        str, typer.Option(metavar="ADDRESS:PORT|none", help="Of the listener for Prometheus.")
    ] = _METRICS,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Processes.", show_default="one for each CPU"),
    ] = None,
    auth_rate: Annotated[
        float,
        typer.Option(
            metavar="N", min=0.1, help="Challenges a second for one address, of each worker."
        ),
    ] = 50,
) -> None:
    """Serve it over HTTPS, until Ctrl-C."""
    from mktme.broker.serving import Settings, serve

    settings = Settings(
        _open(directory),
        _address("--listen", listen),
        None if metrics == "none" else _address("--metrics", metrics),
        workers or len(os.sched_getaffinity(0)),
        auth_rate,
    )
    serve(settings, lambda line: _say(f"serving {line}"))


def _open(directory: Path) -> BrokerDirectory:
    from mktme.broker.directory import BrokerDirectory

    broker = BrokerDirectory(directory)
    if not broker.database.is_file():
        raise BrokerSetupError(
            f"{directory}: no broker's directory", hint=f"mktme broker init {directory}"
        )
    return broker


def _put(directory: Path, kind: object, name: str, file: Path) -> None:
    from mktme.broker.store import DOCUMENT_MAX_BYTES, Kind

    assert isinstance(kind, Kind)
    tenant, slash, rest = name.partition("/")
    if not slash:
        raise BrokerSetupError(f"{name!r} names no tenant", hint="TENANT/NAME, such as alice/prod")
    try:
        with file.open("rb") as opened:
            data = opened.read(DOCUMENT_MAX_BYTES + 1)
    except OSError as error:
        raise BrokerSetupError(f"{file}: {error.strerror}") from error
    _tell(directory, kind.value, tenant, rest, data, None)


def _tell(
    directory: Path, kind: str, tenant: str, name: str, data: bytes, terms: Terms | None
) -> None:
    from mktme.broker.store import Kind

    generation = _open(directory).put(Kind(kind), tenant, name, data, terms)
    _say(f"{kind} {name} of {tenant} set; generation {generation}")


def _address(option: str, text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?P<address>[^:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})", text)
    if found is None or int(found["port"]) > 65535:
        raise BrokerSetupError(f"{text!r} is nowhere to listen", hint=f"such as {option} {_LISTEN}")
    return found["address"].strip("[]"), int(found["port"])


def _say(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)
