# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme ca`, `evidence`, `reference` and `verify`: evidence of VMs, and its appraisal."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID

import typer
from rich.markup import escape

from mktme.attest.claims import (
    NONCE_MAX_BYTES,
    NONCE_MIN_BYTES,
    REPORT_DATA_BYTES,
    Evidence,
    VmClaims,
    decode_claims,
)
from mktme.attest.errors import AttestationError
from mktme.attest.identity import CertificateAuthority, load_trust, verify_chain
from mktme.attest.measure import code_digest
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.attest.result import Appraisal, Verdict, ear
from mktme.attest.token import Token
from mktme.attest.tpm_quote import QUOTE_MAX_BYTES, MeasuredBoot, TpmQuote, verify_quote
from mktme.attest.verify import verify
from mktme.cli_output import EngineOption, JsonFlag, err, make_table, out, print_json
from mktme.engine.new_file import NewFile
from mktme.service.wire import Role
from mktme.vm.host import UsageError
from mktme.vm.running import connected

ca_app = typer.Typer(
    help="The platform CA, which certifies engines (mktme run --ca).", no_args_is_help=True
)

REFUSED: Final = 1
_TOKEN_MAX_BYTES: Final = 1 << 20
_NONCE_BYTES: Final = 32
_WORDS: Final = {
    Verdict.AFFIRMING: "[green]pass[/]",
    Verdict.WARNING: "[yellow]warn[/]",
    Verdict.CONTRAINDICATED: "[red]FAIL[/]",
}

EvidenceArgument = Annotated[Path, typer.Argument(metavar="EVIDENCE", help="A file of mktme's.")]
TrustOption = Annotated[
    list[Path],
    typer.Option("--trust", metavar="FILE", help="A CA to trust, PEM; may be given again."),
]
VmOption = Annotated[
    str | None, typer.Option(metavar="NAME|UUID", help="Which VM; none: the only one.")
]
QuoteOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What the VM's vTPM says of its boot (mktme quote)."),
]
QuoteNonceOption = Annotated[
    str | None, typer.Option(metavar="HEX", help="What mktme quote printed.")
]
ReportDataOption = Annotated[
    str | None, typer.Option(metavar="HEX", help="What else is to be signed, 64 bytes.")
]


@ca_app.command("create")
def create_ca(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")],
    name: Annotated[str, typer.Option(help="What certificates call it.")] = "mktme manufacturer",
) -> None:
    """Make a platform CA: its key, for engines alone to read, and the certificate to pin."""
    CertificateAuthority.make(name).save(directory)
    out.print(f"{directory}: CA made; pin {directory}/ca.pem", markup=False, soft_wrap=True)


def evidence(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")],
    nonce: Annotated[
        str | None, typer.Option(metavar="HEX", help="Of who asks, 8 to 64 bytes; none: drawn.")
    ] = None,
    vm: VmOption = None,
    report_data: ReportDataOption = None,
    chain: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the platform's root certificate there, too."),
    ] = None,
    engine: EngineOption = None,
) -> None:
    """Get signed evidence of VMs that run (mktme run --keep)."""
    asked = _nonce(nonce) if nonce is not None else secrets.token_bytes(_NONCE_BYTES)
    data = None if report_data is None else _report_data(report_data)
    with connected(engine, Role.OBSERVER) as client:
        which = None
        if vm is not None:
            which = _find(vm, {one.vm: one.name for one in client.status().vms})
        token = client.evidence(asked, which, data)
        root = client.identity().root
    if chain is not None:
        _write(chain, root.encode())
    _write(output, token)
    out.print(f"{output}: {len(token):,} bytes", markup=False, highlight=False, soft_wrap=True)
    for one in _signed(token).vms:
        out.print(f"  {one.name} {one.uuid}", markup=False, highlight=False)
    out.print(f"nonce {asked.hex()}", markup=False, highlight=False, soft_wrap=True)


def reference(
    evidence: Annotated[
        list[Path] | None,
        typer.Argument(metavar="EVIDENCE", help="Of VMs that are as they should be."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A new reference.json.")
    ] = None,
    trust: TrustOption = [],  # noqa: B006  typer's own way
    vm: VmOption = None,
    any_of: Annotated[
        list[str],
        typer.Option("--any", metavar="COMPONENT", help="One that may be anything, as a seed."),
    ] = [],  # noqa: B006
    quote: QuoteOption = None,
    quote_nonce: QuoteNonceOption = None,
    code: Annotated[
        bool, typer.Option("--code", help="Print this installation's code digest alone.")
    ] = False,
) -> None:
    """Make reference values of trusted evidence; of several, each digest is good."""
    if code:
        typer.echo(code_digest().hex())
        return
    if not evidence or output is None or not trust:
        raise UsageError(
            "reference values take evidence, a CA to trust, and a place",
            hint="mktme reference EVIDENCE --trust ca.pem -o reference.json",
        )
    answer, secret = _quote(quote, quote_nonce)
    pinned = load_trust(trust)
    values = Reference(frozenset(), {})
    for path in evidence:
        try:
            token = Token.parse(_read(path))
            said = decode_claims(token.verify(token.key()))
            verify_chain(token.chain, pinned, said.time)
            claims = _chosen(said, vm)
            one = Reference.of(said, claims)
            if answer is not None:
                boot = verify_quote(TpmQuote.decode(answer), vtpm=claims.vtpm, nonce=secret)
                one = one.with_boot(boot)
        except AttestationError as error:
            err.print(f"refused: {path}: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(REFUSED) from error
        values = values.also(one)
    _write(output, values.accepting_any(any_of).encode())
    out.print(
        f"{output}: {len(values.launch)} components of a launch",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def verify_evidence(
    evidence: EvidenceArgument,
    trust: TrustOption,
    policy: Annotated[Path, typer.Option(metavar="FILE", help="What is demanded: policy.toml.")],
    reference: Annotated[Path, typer.Option(metavar="FILE", help="Known digests.")],
    nonce: Annotated[str, typer.Option(metavar="HEX", help="What was asked with.")],
    vm: Annotated[
        UUID | None, typer.Option(metavar="UUID", help="Which VM; none: the only one.")
    ] = None,
    report_data: ReportDataOption = None,
    quote: QuoteOption = None,
    quote_nonce: QuoteNonceOption = None,
    json: JsonFlag = False,
) -> None:
    """Appraise evidence. Exit status: 0 affirmed, 1 refused, 2 usage."""
    answer, secret = _quote(quote, quote_nonce)
    appraisal = verify(
        _read(evidence),
        trust=load_trust(trust),
        policy=Policy.load(policy),
        reference=Reference.load(reference),
        nonce=_nonce(nonce),
        vm=vm,
        report_data=None if report_data is None else _report_data(report_data),
        quote=answer,
        quote_nonce=secret,
    )
    if json:
        print_json(ear(appraisal))
    else:
        if appraisal.boot is not None:
            _print_boot(appraisal.boot)
        _print(appraisal)
    if appraisal.failed:
        raise typer.Exit(REFUSED)


def _quote(path: Path | None, nonce: str | None) -> tuple[bytes | None, bytes]:
    """A quote, and what its TPM was challenged with."""
    if (path is None) != (nonce is None):
        raise UsageError(
            "a quote and its nonce go together", hint="mktme quote writes one and prints the other"
        )
    if path is None or nonce is None:
        return None, b""
    return _read(path, QUOTE_MAX_BYTES + 1), _hex(nonce)


def _print(appraisal: Appraisal) -> None:
    table = make_table("Checks", "", "check", "found")
    for check in appraisal.checks:
        table.add_row(_WORDS[check.verdict], check.name, escape(check.reason))
    out.print(table)
    count, failed = len(appraisal.checks), len(appraisal.failed)
    if failed:
        out.print(f"[red]REFUSED[/] by {escape(appraisal.policy)}: {failed} of {count} checks")
    else:
        out.print(f"[green]affirmed[/] by {escape(appraisal.policy)}: {count} checks")


def _print_boot(boot: MeasuredBoot) -> None:
    """What a guest booted: what is in quotation marks is only what GRUB calls it.

    Whole digests are in the JSON.
    """
    table = make_table("Measured boot", "PCR", "what", "text, or its SHA-256")
    for digest in boot.boot_loaders:
        table.add_row("4", "boot loader", f"{digest.hex()[:16]}...")
    for event in boot.files:
        table.add_row("9", f'"{escape(event.label)}"', f"{event.sha256.hex()[:16]}...")
    for text in boot.commands:
        table.add_row("8", "command", escape(text))
    out.print(table)


def _signed(token: bytes) -> Evidence:
    """What the engine that was just asked signed."""
    parsed = Token.parse(token)
    return decode_claims(parsed.verify(parsed.key()))


def _find(text: str, names: dict[UUID, str]) -> UUID:
    """The VM of a name or a UUID."""
    found = [one for one, name in names.items() if text in (name, str(one))]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} VMs are called {text}" if found else f"there is no VM {text}"
    listed = ", ".join(f"{name} {one}" for one, name in names.items())
    raise UsageError(what, hint=f"there are: {listed}" if names else "there is none at all")


def _chosen(said: Evidence, vm: str | None) -> VmClaims:
    if vm is None and len(said.vms) != 1:
        raise UsageError(f"evidence of {len(said.vms)} VMs", hint="choose one with --vm")
    which = said.vms[0].uuid if vm is None else _find(vm, {one.uuid: one.name for one in said.vms})
    return next(one for one in said.vms if one.uuid == which)


def _nonce(text: str) -> bytes:
    data = _hex(text)
    if not NONCE_MIN_BYTES <= len(data) <= NONCE_MAX_BYTES:
        raise UsageError(f"a nonce has {NONCE_MIN_BYTES} to {NONCE_MAX_BYTES} bytes")
    return data


def _report_data(text: str) -> bytes:
    data = _hex(text)
    if len(data) != REPORT_DATA_BYTES:
        raise UsageError(f"report data has {REPORT_DATA_BYTES} bytes")
    return data


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise UsageError("not hexadecimal", hint="two digits a byte, such as 00ff") from error


def _read(path: Path, most: int = _TOKEN_MAX_BYTES) -> bytes:
    """A file that may be anything; of one that is too long, enough to be refused as such."""
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    with NewFile(path) as file:
        file.write(0, data)
        file.publish()
