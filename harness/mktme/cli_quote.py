# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme quote`: have a guest's vTPM say what it booted, over ssh."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from mktme.cli_output import out
from mktme.engine.new_file import NewFile
from mktme.vm.console import CommandResult, GuestCommandError, VmLostError
from mktme.vm.guest_tpm import take_quote


class _OpenSsh:
    """A root shell by this machine's ssh: its configuration, agent and known hosts count.

    Nothing is trusted that comes through it: a quote proves itself.
    """

    def __init__(self, destination: str, options: list[str]) -> None:
        self._ssh = ["ssh", "-o", "BatchMode=yes", *options, "--", destination]

    def run(self, command: str, timeout_s: float, *, check: bool = True) -> CommandResult:
        """As `mktme.vm.shell.Shell`."""
        remote = f"sudo -n sh -c {shlex.quote(command)}"
        try:
            done = subprocess.run(
                [*self._ssh, remote],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                text=True,
                errors="replace",
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VmLostError(f"ssh: {error}") from error
        if check and done.returncode:
            said = done.stdout.strip()[-300:]
            raise GuestCommandError(f"ssh: exit status {done.returncode}: {said}")
        return CommandResult(done.stdout, done.returncode)


def quote(
    destination: Annotated[str, typer.Argument(metavar="[USER@]HOST", help="The guest, for ssh.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")],
    port: Annotated[int | None, typer.Option("--port", "-p", help="Of its sshd.")] = None,
    identity: Annotated[
        Path | None, typer.Option("--identity", "-i", metavar="FILE", help="A key to log in with.")
    ] = None,
) -> None:
    """Challenge a guest's vTPM, and keep its answer for `mktme verify --quote`."""
    options = [] if port is None else ["-p", str(port)]
    options += [] if identity is None else ["-i", str(identity)]
    with NewFile(output) as file:
        answer, nonce = take_quote(_OpenSsh(destination, options))
        data = answer.encode()
        file.write(0, data)
        file.publish()
    out.print(f"{output}: {len(data):,} bytes", markup=False, highlight=False, soft_wrap=True)
    out.print(f"nonce {nonce.hex()}", markup=False, highlight=False, soft_wrap=True)
