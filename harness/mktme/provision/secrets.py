# SPDX-License-Identifier: GPL-2.0-or-later
"""Application secrets: how they get into a guest, and how they are compared without being kept.

A secret goes from its file here over ssh into a file there, and is in no argument, log, record or
answer. What is remembered is a mark: an HMAC of its SHA-256 under a key that the provisioner draws
when it starts and gives to nobody. So a mark tells who does not have that key nothing, and the
secret that a guest has can be compared by the SHA-256 that the guest computes.

In the guest it is written beside where it is to be, as a file that only root can read, its digest
is compared, and only then it gets its name: whoever opens that sees all of it or nothing. A guest's
disk is a file of the host's. What is not to be in that goes to a file system in memory, as /run.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
import shlex
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from mktme.provision.errors import ProvisionError
from mktme.provision.state import SecretFact, read
from mktme.provision.tenants import Secret
from mktme.provision.tenants_file import check_secret_file
from mktme.vm.console import CommandResult, VmError

TIMEOUT_S: Final = 30.0
_KEY_BYTES: Final = 32
_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_STAT: Final = re.compile(r"(\S+):(\S+) ([0-7]{1,4})", re.ASCII)


class Guest(Protocol):
    """A root shell that commands can be given input in: `mktme.vm.ssh.Ssh`."""

    def run(
        self, command: str, timeout_s: float, *, check: bool = True, stdin: bytes = b""
    ) -> CommandResult:
        """Run shell commands.

        Raises:
            VmLostError: the guest did not finish them in time, or is gone.
            GuestCommandError: they exited with another status than 0, and `check` is set.
        """
        ...


class Marks:
    """Marks of secrets, comparable for as long as this object lives."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES)

    def of_digest(self, digest: bytes) -> str:
        """The mark of a secret with this SHA-256, 32 bytes."""
        return hmac.digest(self._key, digest, "sha256").hex()

    def of_file(self, file: Path) -> str:
        """The mark of a file's contents.

        Raises:
            UsageError: it cannot be read, or others can read it.
        """
        return self.of_digest(hashlib.sha256(_read(file)).digest())


def hand_over(guest: Guest, secret: Secret) -> None:
    """Write a secret into a guest.

    Raises:
        UsageError: its file cannot be read, or others can read it.
        VmError: the guest does not take it, or has something else then; nothing of it is left.
    """
    path = PurePosixPath(secret.path)
    target, parent = shlex.quote(str(path)), shlex.quote(str(path.parent))
    staged = f"{path}.{secrets.token_hex(8)}"
    temporary = shlex.quote(staged)
    data = _read(secret.file)
    try:
        # Not `mktemp`: another's umask or template does not matter then. -C: nothing is there.
        written = guest.run(
            f"mkdir -p -- {parent} && umask 077 && set -C && cat >{temporary} &&"
            f" sha256sum <{temporary}",
            TIMEOUT_S,
            stdin=data,
        )
        if written.output.split()[:1] != [hashlib.sha256(data).hexdigest()]:
            raise ProvisionError(f"{path}: what the guest has is not what was sent")
        guest.run(
            f"chown -- {shlex.quote(secret.owner)} {temporary}"
            f" && chmod {secret.mode:04o} {temporary} && mv -fT -- {temporary} {target}",
            TIMEOUT_S,
        )
    except BaseException:
        with contextlib.suppress(VmError):  # it is gone; the first error says why
            withdraw(guest, staged)
        raise


def withdraw(guest: Guest, path: str) -> None:
    """Remove a secret from a guest.

    Raises:
        VmError: the guest does not.
    """
    guest.run(f"rm -f -- {shlex.quote(path)}", TIMEOUT_S)


def look(guest: Guest, wanted: Collection[Secret], marks: Marks) -> tuple[SecretFact, ...]:
    """Which of some secrets a guest has now, by their paths.

    Raises:
        VmLostError: the guest does not answer.
    """
    ordered = sorted(wanted, key=lambda one: one.path)
    if not ordered:
        return ()
    paths = " ".join(shlex.quote(one.path) for one in ordered)
    # A line each for what is there and what it holds; of what is no file, "-".
    said = guest.run(
        f'for f in {paths}; do if [ -f "$f" ] && [ ! -L "$f" ]; then'
        ' stat -c "%U:%G %a" -- "$f"; sha256sum <"$f"; else echo -; echo -; fi; done',
        TIMEOUT_S,
    ).output.splitlines()
    facts = []
    for one, state, digest in zip(ordered, said[::2], said[1::2], strict=False):
        found, contents = _STAT.fullmatch(state), _DIGEST.match(digest)
        if found is None or contents is None:
            continue
        owner = f"{found[1]}:{found[2]}" if ":" in one.owner else found[1]
        there = Secret(one.file, one.path, owner, int(found[3], 8))
        facts.append(SecretFact(str(there), marks.of_digest(bytes.fromhex(contents[0]))))
    return tuple(facts)


def _read(file: Path) -> bytes:
    check_secret_file(file)
    return read(file)
