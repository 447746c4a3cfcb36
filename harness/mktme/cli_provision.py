# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme provision`: VMs of several tenants as a file describes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from mktme.cli_narration import narrate
from mktme.cli_options import ExitCode
from mktme.cli_output import JsonFlag, make_table, out, print_json
from mktme.provision import report
from mktme.provision.apply import Outcome, Result
from mktme.provision.client import Client, plan_for
from mktme.provision.errors import LeftOffError
from mktme.provision.plan import PLATFORM, Action, Plan, Step
from mktme.provision.state import Condition, State
from mktme.provision.tenants_file import read_tenants

provision_app = typer.Typer(
    help="VMs of several tenants as a file describes them: attested, then given their secrets.",
    no_args_is_help=True,
)

FileOption = Annotated[
    Path,
    typer.Option("--file", "-f", metavar="FILE", help="What is wanted: a tenants.toml."),
]

_SIGNS: Final = {
    Action.CREATE: "[green]+[/]",
    Action.REPLACE: "[yellow]±[/]",
    Action.UPDATE: "[yellow]~[/]",
    Action.DELETE: "[red]-[/]",
    Action.NOTHING: " ",
}
_OUTCOMES: Final = {
    Outcome.DONE: "[green]done[/]",
    Outcome.REFUSED: "[red]REFUSED[/]",
    Outcome.FAILED: "[red]FAILED[/]",
    Outcome.SKIPPED: "[yellow]skipped[/]",
}
_CONDITIONS: Final = {
    Condition.RUNNING: "[green]running[/]",
    Condition.HELD: "[red]held[/]",
    Condition.LOST: "[red]lost[/]",
}


@provision_app.command("plan")
def show_plan(
    file: FileOption = Path("tenants.toml"),
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code", help=f"Exit with {ExitCode.CHANGES} if there is anything to do."
        ),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show what `apply` would do, and how what runs differs from what is wanted."""
    planned = plan_for(read_tenants(file))
    if json:
        print_json(report.plan_report(planned))
    else:
        _print_plan(planned.plan, planned.state)
    if exit_code and not planned.plan.is_empty:
        raise typer.Exit(ExitCode.CHANGES)


@provision_app.command("apply")
def do_apply(file: FileOption = Path("tenants.toml"), json: JsonFlag = False) -> None:
    """Make what runs what is wanted. A VM gets its secrets when it has proved itself."""
    deployment = read_tenants(file)
    with _left_off(), Client.obtain(deployment.name) as client, narrate() as narrator:
        applied = client.apply(deployment, narrator)
    if json:
        print_json(report.apply_report(deployment.name, applied.results, applied.state))
    else:
        _print_applied(deployment.name, applied.results, applied.state)
    _conclude(applied.results)


@provision_app.command("destroy")
def do_destroy(file: FileOption = Path("tenants.toml"), json: JsonFlag = False) -> None:
    """Take all of it down: VMs, platform, and the process that holds them."""
    name = read_tenants(file).name
    client = Client.find(name)
    results: tuple[Result, ...] = ()
    if client is not None:
        with _left_off(), client, narrate() as narrator:
            results = client.destroy(narrator).results
    if json:
        print_json(report.destroy_report(name, results))
    else:
        count = sum(one.step.subject != PLATFORM for one in results)
        what = f"{count} VM{'' if count == 1 else 's'} taken down" if results else "nothing runs"
        out.print(f"{name}: {what}", highlight=False)
        _print_failures(results)
    _conclude(results)


@contextlib.contextmanager
def _left_off() -> Iterator[None]:
    """Say what Ctrl-C within the `with` leaves: VMs are not this command's."""
    try:
        yield
    except KeyboardInterrupt:
        raise LeftOffError(
            "interrupted; the step in hand is finished, and no other is begun",
            hint="mktme provision plan shows what is left, destroy takes all down",
        ) from None


def _conclude(results: tuple[Result, ...]) -> None:
    if any(one.outcome is Outcome.REFUSED for one in results):
        raise typer.Exit(ExitCode.PROOF_FAILED)
    if not report.is_well(results):
        raise typer.Exit(ExitCode.RUN_FAILED)


def _print_plan(plan: Plan, state: State) -> None:
    for step in plan.steps:
        reason = f"  ({step.reason})" if step.reason else ""
        if step.action is Action.NOTHING and step.subject == PLATFORM:
            continue
        line = Text.from_markup(_SIGNS[step.action])
        out.print(line.append(f" {step.action.value:<9} {step.subject}{reason}"))
        vm = state.vm(step.subject)
        if step.changes or (vm is not None and vm.failed):
            out.print(_change_table(step, () if vm is None else vm.failed))
    counts = (
        f"{plan.count(action)} to {action.value}"
        for action in (Action.CREATE, Action.REPLACE, Action.UPDATE, Action.DELETE)
        if plan.count(action)
    )
    out.print(f"{plan.name}: {', '.join(counts) or _nothing(state)}", highlight=False)


def _nothing(state: State) -> str:
    count = len(state.vms)
    return f"{count} VM{'' if count == 1 else 's'} as wanted, nothing to do"


def _change_table(step: Step, failed: tuple[str, ...]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for one in step.changes:
        value = one.new if step.action is Action.CREATE else f"{one.old} -> {one.new}"
        table.add_row("     ", one.field, Text(value, overflow="fold"))
    if failed:
        table.add_row("     ", "refused by", Text(", ".join(failed), overflow="fold"))
    return table


def _print_applied(name: str, results: tuple[Result, ...], state: State) -> None:
    if results:
        table = make_table("Done", "", "step", "of", "time", right=("time",))
        for one in results:
            table.add_row(
                _OUTCOMES[one.outcome],
                one.step.action.value,
                one.step.subject,
                f"{one.duration_s:.1f} s",
            )
        out.print(table)
    if state.vms:
        out.print(_vm_table(state))
    _print_failures(results)
    if not results:
        out.print(f"{name}: {_nothing(state)}", highlight=False)
    elif not report.is_well(results):
        out.print(
            f"{name}: what is done is done; mktme provision plan shows what is left, and"
            " apply goes on",
            highlight=False,
        )


def _vm_table(state: State) -> Table:
    table = make_table(
        "VMs", "", "VM", "KeyID", "key", "memory", "data path", "policy", right=("KeyID", "memory")
    )
    for vm in state.vms:
        facts = vm.facts
        table.add_row(
            _CONDITIONS[vm.condition],
            vm.name,
            str(vm.keyid),
            Text(f"{facts.key}\n{facts.algorithm}"),
            facts.memory,
            facts.datapath,
            Text(facts.policy.rpartition(" ")[0]),
        )
    return table


def _print_failures(results: tuple[Result, ...]) -> None:
    for one in results:
        if one.outcome not in (Outcome.REFUSED, Outcome.FAILED):
            continue
        refused = "refused: it gets no secret" if one.failed else one.reason
        out.print(Text.assemble((one.step.subject, "red"), f": {refused}"))
        for check in one.failed:
            out.print(Text(f"  {check.name}: {check.reason}"))
        if one.hint is not None:
            out.print(Text(f"  hint: {one.hint}"))
