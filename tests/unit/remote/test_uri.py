# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's URIs of other hosts, and the ssh command for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mktme.remote.uri import RemoteUri
from mktme.vm.host import UsageError

SOCKET = Path("/tmp/mktme-move-1/memory")


def test_everything_that_libvirt_gives_ssh() -> None:
    uri = (
        "qemu+ssh://root%40lab@host.example:2222/system"
        "?keyfile=/home/me/id&command=/opt/ssh&no_verify=1&no_tty=1"
    )
    remote = RemoteUri.parse(uri)
    assert (remote.uri, remote.there) == (uri, "qemu:///system")
    command = remote.ssh(["/opt/my mktme", "receive"], SOCKET)
    assert command[0] == "/opt/ssh"
    assert command[-3:] == ["--", "host.example", "'/opt/my mktme' receive"]
    for pair in (
        ["-p", "2222"],
        ["-l", "root@lab"],
        ["-i", "/home/me/id"],
        ["-L", f"{SOCKET}:{SOCKET}"],
        ["-o", "StrictHostKeyChecking=no"],
        ["-o", "BatchMode=yes"],
        ["-o", "ControlPath=none"],
        ["-o", "ExitOnForwardFailure=yes"],
    ):
        at = command.index(pair[1]) - 1
        assert command[at : at + 2] == pair


def test_what_ssh_knows_itself_is_left_to_it() -> None:
    command = RemoteUri.parse("qemu+ssh://host/session").ssh(["mktme", "receive"], SOCKET)
    assert command[0] == "ssh"
    assert not {"-p", "-l", "-i", "BatchMode=yes", "StrictHostKeyChecking=no"} & set(command)


@pytest.mark.parametrize(
    ("uri", "there"),
    [
        ("qemu+ssh://host/session", "qemu:///session"),
        ("qemu+ssh://[fd00::2]/system?keyfile=/id", "qemu:///system"),
        (
            "qemu+ssh://host/system?socket=/run/other/libvirt-sock&proxy=native",
            "qemu+unix:///system?socket=/run/other/libvirt-sock",
        ),
    ],
)
def test_the_uri_there(uri: str, there: str) -> None:
    assert RemoteUri.parse(uri).there == there


@pytest.mark.parametrize(
    ("place", "host"),
    [("[fd00::2]", "fd00::2"), ("me@[fd00::2]:22", "fd00::2"), ("me@My-Lab:22", "My-Lab")],
)
def test_host_as_ssh_is_to_have_it(place: str, host: str) -> None:
    assert RemoteUri.parse(f"qemu+ssh://{place}/system").host == host


@pytest.mark.parametrize(
    "uri",
    [
        "qemu:///system",
        "qemu+ssh:///system",
        "qemu+libssh2://host/system",
        "qemu+tls://host/system",
        "xen+ssh://host/system",
        "qemu+ssh://host/",
        "qemu+ssh://host/embed?root=/",
        "qemu+ssh://host:99999/system",
        "qemu+ssh://[host/system",
        "qemu+ssh://host/system?keyfile",
        "qemu+ssh://-oProxyCommand=sh/system",
        "",
    ],
)
def test_others_are_refused(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        RemoteUri.parse(uri)
    assert "qemu+ssh://root@host/system" in str(caught.value.hint)
