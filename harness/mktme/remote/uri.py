# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's URI of another host, and the ssh command that reaches the same host in the same way.

Sources: https://libvirt.org/uri.html (remote URIs and their parameters); what libvirt gives ssh,
src/rpc/virnetsocket.c, virNetSocketNewConnectSSH; ssh(1), ssh_config(5).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from mktme.vm.host import UsageError

_SCHEME: Final = "qemu+ssh"
_HINT: Final = "such as qemu+ssh://root@host/system"
# As libvirt's keepalive has it: an answer within 5 x 5 s.
_ALIVE_S: Final = 5
_ALIVE_COUNT: Final = 5
_CONNECT_S: Final = 20
_OPTIONS: Final = (
    # The connection is this command's: to end it is to end what runs there.
    *("ControlMaster=no", "ControlPath=none"),
    "ExitOnForwardFailure=yes",
    *(f"ServerAliveInterval={_ALIVE_S}", f"ServerAliveCountMax={_ALIVE_COUNT}"),
    f"ConnectTimeout={_CONNECT_S}",
)


@dataclass(frozen=True, slots=True)
class RemoteUri:
    """A libvirt on another host, over ssh.

    Attributes:
        uri: as libvirt here is given it.
        there: what libvirt's client on that host calls it.
        host: the host's name, or one of ssh's configuration.
        user: None for what ssh would choose, as of `port` and `keyfile`.
        command: the ssh client.
        verify: whether a host key that is not known is asked about, or refused.
        prompts: whether ssh may ask the user for anything.
    """

    uri: str
    there: str
    host: str
    user: str | None = None
    port: int | None = None
    keyfile: str | None = None
    command: str = "ssh"
    verify: bool = True
    prompts: bool = True

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Take a URI apart; parameters mean what they do to libvirt.

        Raises:
            UsageError: it is none of QEMU over ssh.
        """
        try:
            parts = urlsplit(uri)
            port = parts.port
            parameters = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        except ValueError as error:
            raise UsageError(f"{uri}: {error}", hint=_HINT) from error
        host = _host_in(parts.netloc)
        if parts.scheme != _SCHEME or host[:1] in ("", "-") or parts.path not in _PATHS:
            raise UsageError(f"{uri} is no libvirt of QEMU's on another host", hint=_HINT)
        # What is between the hosts is not for the one there to know.
        kept = {name: value for name, value in parameters.items() if name in _FOR_THE_OTHER}
        scheme = "qemu+unix" if kept else "qemu"
        query = f"?{urlencode(kept, safe='/')}" if kept else ""
        return cls(
            uri=uri,
            there=f"{scheme}://{parts.path}{query}",
            host=host,
            user=None if parts.username is None else unquote(parts.username),
            port=port,
            keyfile=parameters.get("keyfile"),
            command=parameters.get("command", "ssh"),
            verify=parameters.get("no_verify", "0") == "0",
            prompts=parameters.get("no_tty", "0") == "0",
        )

    def ssh(self, arguments: list[str], exchange: Path) -> list[str]:
        """The command that runs another on that host.

        Args:
            arguments: the other.
            exchange: a socket to be made here, from which connections go on to that of the same
                path there.
        """
        options = list(_OPTIONS)
        if not self.verify:
            options.append("StrictHostKeyChecking=no")
        if not self.prompts:
            options.append("BatchMode=yes")
        command = [self.command, "-T", "-a", "-x"]
        for option in options:
            command += ["-o", option]
        command += ["-L", f"{exchange}:{exchange}"]
        for flag, value in (("-p", self.port), ("-l", self.user), ("-i", self.keyfile)):
            if value is not None:
                command += [flag, str(value)]
        return [*command, "--", self.host, shlex.join(arguments)]


def _host_in(netloc: str) -> str:
    """The host's name as it is written: ssh's configuration tells case apart."""
    place = netloc.rpartition("@")[2]
    if place.startswith("["):
        return place[1:].partition("]")[0]
    return place.partition(":")[0]


_PATHS: Final = ("/system", "/session")
_FOR_THE_OTHER: Final = ("socket", "mode")
