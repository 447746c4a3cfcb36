# SPDX-License-Identifier: GPL-2.0-or-later
"""A second host: a libvirtd, an sshd and a network address of its own.

It shares this machine's kernel, its /usr and this tree. What is this host's in /tmp, /run and
libvirt's directories is not there, and nothing but the network and ssh leads to it.
"""

from __future__ import annotations

import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .libvirtd import UNPACKED, Libvirtd, private_libvirtd

HERE: Final = Path(__file__).parent
REPOSITORY: Final = HERE.parents[1]
# Where tools/setup puts it: it is for these tests alone.
SSHD: Final = REPOSITORY / "build" / "sshd"


@dataclass(frozen=True)
class SecondHost:
    """A host that runs.

    Attributes:
        uri: its libvirt, over ssh.
        libvirtd: its libvirtd; the URI in there is this host's back door, for tests to look.
        directory: its sshd's files, and this host's ssh's.
        tmpdir: a directory that is another on each of the two.
        interface: this host's end of what connects the two.
    """

    uri: str
    libvirtd: Libvirtd
    directory: Path
    tmpdir: Path
    interface: str

    def install(self, name: str, script: str) -> str:
        """Put a program into its PATH; returns the name."""
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return name

    def files(self) -> list[str]:
        """What is in its `tmpdir`."""
        return os.listdir(f"/proc/{self.libvirtd.process.pid}/root{self.tmpdir}")

    def wait_ended(self, what: str) -> None:
        """Wait until no process on it has something in its command line."""
        for pid in self.processes(what):
            wait_ended(pid)

    def processes(self, what: str) -> list[int]:
        """Processes on it that have something in their command line."""
        namespace = os.readlink(f"/proc/{self.libvirtd.process.pid}/ns/mnt")
        return [pid for pid in in_namespace(namespace) if what in command_line(pid)]


def in_namespace(namespace: str) -> Iterator[int]:
    """Processes in a mount namespace."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended
            if os.readlink(process / "ns" / "mnt") == namespace:
                yield int(process.name)


def command_line(pid: int) -> str:
    """A process's, empty once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def wait_ended(pid: int) -> None:
    """Wait for the end of a process (pidfd_open(2))."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], 40)[0], f"left: {command_line(pid)}"
        finally:
            os.close(descriptor)


@contextmanager
def second_host(directory: Path) -> Iterator[SecondHost]:
    """Run a host whose files are in `directory`, which is there; at the end nothing is left."""
    ssh, tmpdir = directory / "ssh", directory / "t"
    # A unique local address: chosen at random, it is nobody else's (RFC 4193).
    network = f"fd{secrets.token_hex(1)}:{secrets.token_hex(2)}:{secrets.token_hex(2)}:1"
    address = f"{network}::2"
    for one in (ssh, tmpdir, ssh / "bin", ssh / "home"):
        one.mkdir()
    host_key, key = _key(ssh / "host_key"), _key(ssh / "id")
    (ssh / "authorized_keys").write_text(key)
    (ssh / "known_hosts").write_text(f"second {host_key}")
    path = f"{ssh}/bin:{UNPACKED.parents[1]}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    harness = REPOSITORY / "harness"
    settings = f"PATH={path} TMPDIR={tmpdir} XDG_CACHE_HOME={ssh}/home PYTHONPATH={harness}"
    (ssh / "sshd_config").write_text(
        f"ListenAddress {address}\nHostKey {ssh}/host_key\nPidFile {ssh}/sshd.pid\n"
        f"AuthorizedKeysFile {ssh}/authorized_keys\nPasswordAuthentication no\nStrictModes no\n"
        f"KbdInteractiveAuthentication no\nSetEnv {settings}\n"
    )
    # As a user has it in ~/.ssh/config.
    (ssh / "config").write_text(
        f"Host second\n  HostName {address}\n  HostKeyAlias second\n  User root\n"
        f"  IdentityFile {ssh}/id\n  IdentitiesOnly yes\n  UserKnownHostsFile {ssh}/known_hosts\n"
        "  StrictHostKeyChecking yes\n"
    )
    (ssh / "ssh").write_text(f'#!/bin/sh\nexec ssh -F {ssh}/config "$@"\n')
    (ssh / "ssh").chmod(0o755)
    interface = f"mktme-{secrets.token_hex(4)}"
    script = (str(HERE / "second_host.sh"), str(ssh), str(SSHD), str(tmpdir), network, interface)
    with private_libvirtd(directory / "libvirtd", ("--net", "sh", *script)) as libvirtd:
        uri = f"qemu+ssh://second/system?command={ssh}/ssh"
        second = SecondHost(uri, libvirtd, ssh, tmpdir, interface)
        second.install("mktme", f'exec {shlex.quote(sys.executable)} -m mktme.cli "$@"')
        namespace = os.readlink(f"/proc/{libvirtd.process.pid}/ns/mnt")
        try:
            yield second
            assert second.files() == []
        finally:
            # Its sessions as well: one that was cut off knows of no end.
            for pid in second.processes("sshd: "):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
    for pid in in_namespace(namespace):
        wait_ended(pid)
    # Else it is there until the last connection that was cut off is given up by the kernel.
    subprocess.run(["ip", "link", "delete", interface], stderr=subprocess.DEVNULL, check=False)
    for made in (ssh / "bin", ssh / "home", ssh, tmpdir):
        for file in made.iterdir():
            file.unlink()
        made.rmdir()  # and nothing that was not made here


def _key(path: Path) -> str:
    """Make a key pair; returns the public one."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True)
    return path.with_suffix(".pub").read_text()
