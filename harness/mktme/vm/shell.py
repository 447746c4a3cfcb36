# SPDX-License-Identifier: GPL-2.0-or-later
"""A root shell in a guest, whichever way it is reached."""

from __future__ import annotations

from typing import Protocol

from mktme.vm.console import CommandResult


class Shell(Protocol):
    """Runs commands in a guest: its serial console (`Console`) or `mktme.vm.ssh.Ssh`."""

    def run(self, command: str, timeout_s: float, *, check: bool = True) -> CommandResult:
        """Run shell commands.

        Raises:
            VmLostError: the guest did not finish them in time, or is gone.
            GuestCommandError: they exited with another status than 0, and `check` is set.
        """
        ...
