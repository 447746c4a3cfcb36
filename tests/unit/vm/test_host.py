# SPDX-License-Identifier: GPL-2.0-or-later
"""Which libvirt is taken, and which QEMU; against a fake connection."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest

from mktme.vm import host as host_module
from mktme.vm.host import (
    QEMU11,
    EnvironmentUnfitError,
    Host,
    UsageError,
    dotted,
    emulator_path,
    emulator_version,
    plugin_api,
    plugin_path,
)


@dataclass
class FakeConnection:
    """What libvirt.open returns."""

    libvirt: int = 11_003_000
    closed: bool = False

    def getLibVersion(self) -> int:  # noqa: N802 - libvirt's name
        return self.libvirt

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs that libvirt was asked for."""
    monkeypatch.setattr(host_module, "run_event_loop", lambda: None)
    # As in a process that has not opened the embedded driver yet.
    fresh = functools.cache(host_module._embedded.__wrapped__)
    monkeypatch.setattr(host_module, "_embedded", fresh)
    return []


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> FakeConnection:
    connection = FakeConnection()

    def open_(uri: str) -> FakeConnection:
        opened.append(uri)
        return connection

    monkeypatch.setattr(libvirt, "open", open_)
    return connection


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def qemu(path: Path, version: str) -> Path:
    """A program that says it is a QEMU of some version, as Debian's does."""
    line = f"QEMU emulator version {version} (Debian 1:{version}+ds-2)"
    return program(path, f'test "$*" = --version && echo "{line}"\necho "Copyright (c) ..."')


@pytest.fixture(autouse=True)
def own_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's own QEMU is a 10.0.2, and it has no other."""
    path = qemu(tmp_path / "qemu-system-x86_64", "10.0.2")
    monkeypatch.setattr(host_module, "EMULATOR", path)
    monkeypatch.setattr(host_module, "cache_dir", lambda: tmp_path / "cache" / "images")
    return path


@pytest.mark.parametrize(
    "uri",
    [
        "qemu+ssh://host/system",
        "qemu+ssh:///system",
        "qemu+libssh2://user@host:22/system",
        "qemu+tls://host/system",
        "qemu+tcp://localhost/system",
        "qemu://host/system",
    ],
)
def test_other_machines_are_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="on another machine") as caught:
        Host(uri)
    assert uri in str(caught.value)
    assert "qemu:///system" in str(caught.value.hint)


def test_what_is_no_uri_is_refused() -> None:
    with pytest.raises(UsageError, match="Invalid IPv6 URL"):
        Host("qemu://[")


@pytest.mark.parametrize(
    "uri", ["qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/run/libvirt-sock"]
)
def test_other_libvirts_of_this_machine_are_taken(
    connection: FakeConnection, opened: list[str], uri: str, own_qemu: Path
) -> None:
    with Host(uri) as host:
        assert host.emulator == own_qemu
        assert opened == [uri]
        assert not host.embedded
        assert host.qemu_version == (10, 0, 2)
        assert host.libvirt_version == (11, 3, 0)
        assert host.plugin_api == 4
        assert not connection.closed
    assert connection.closed


def test_embedded_libvirt_has_a_root_of_its_own(
    connection: FakeConnection,
    opened: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_module, "_embedded_root", lambda: tmp_path)
    with Host() as host:
        assert opened == [f"qemu:///embed?root={tmp_path}"]
        assert host.embedded
        assert host.uri == "qemu:///embed"
    with Host():
        assert len(opened) == 1
    assert not connection.closed


@pytest.mark.usefixtures("connection")
def test_version_is_that_of_the_emulator(tmp_path: Path) -> None:
    other = qemu(tmp_path / "other", "11.1.2")
    with Host("qemu:///system", emulator=other) as host:
        assert host.emulator == other
        assert host.qemu_version == (11, 1, 2)
        assert host.plugin_api == 7


@pytest.mark.parametrize(
    ("version", "libvirt_version", "can"),
    [
        ("10.2.0", 11_003_000, True),
        ("11.1.2", 11_003_000, False),
        ("11.0.0", 10_000_000, False),
        ("11.1.2", 12_000_000, True),
    ],
)
def test_migration_of_qemu11_is_refused(
    connection: FakeConnection, own_qemu: Path, version: str, libvirt_version: int, can: bool
) -> None:
    qemu(own_qemu, version)
    connection.libvirt = libvirt_version
    with Host("qemu:///system") as host:
        if can:
            host.require_migration()
            return
        with pytest.raises(EnvironmentUnfitError, match="cannot migrate or save a guest") as caught:
            host.require_migration()
    assert "--emulator" in str(caught.value.hint)


@pytest.mark.parametrize("version", ["9.2.3", "7.2.0", "0.0.0"])
def test_older_qemu_is_refused(opened: list[str], own_qemu: Path, version: str) -> None:
    qemu(own_qemu, version)
    with (
        pytest.raises(
            EnvironmentUnfitError, match=rf"QEMU {version} is too old, 10\.0 is"
        ) as caught,
        Host("qemu:///system"),
    ):
        raise AssertionError("it was taken")
    assert caught.value.hint == "make setup"
    assert opened == []


def test_missing_qemu_is_set_up(own_qemu: Path) -> None:
    own_qemu.unlink()
    with pytest.raises(EnvironmentUnfitError, match="No such file or directory") as caught:
        emulator_version(own_qemu)
    assert caught.value.hint == "make setup"


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo 'GNU bash, version 11.1.2'", "does not say that it is a QEMU"),
        ("echo 'qemu-img version 10.0.2'", "does not say that it is a QEMU"),
        ("printf 'QEMU emulator version \\377'", "does not say that it is a QEMU"),
        ("exit 1", "does not say that it is a QEMU"),
        ("exec cat /dev/zero >/dev/null", "timed out"),
    ],
)
def test_emulator_that_is_no_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, complaint: str
) -> None:
    monkeypatch.setattr(host_module, "_VERSION_TIMEOUT_S", 0.5)
    with pytest.raises(EnvironmentUnfitError, match=complaint) as caught:
        emulator_version(program(tmp_path / "other", script))
    assert caught.value.hint == "make qemu11, and qemu11 as the emulator"


def test_emulator_without_a_format_of_programs(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"\x7fELF")
    other.chmod(0o755)
    with pytest.raises(EnvironmentUnfitError, match="Exec format error"):
        emulator_version(other)


def test_emulator_by_path(own_qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert emulator_path(str(own_qemu)) == own_qemu
    monkeypatch.chdir(own_qemu.parent)
    assert emulator_path(own_qemu.name) == own_qemu  # libvirt takes absolute paths alone


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("missing", "is no file"), ("", "is no file"), ("plain.txt", "is not executable")],
)
def test_emulator_that_cannot_be(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "plain.txt").touch()
    with pytest.raises(UsageError, match=complaint) as caught:
        emulator_path(str(tmp_path / name))
    assert "qemu11" in str(caught.value.hint)


def test_qemu11_is_where_setup_puts_it(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "qemu11" / "qemu-system-x86_64"
    with pytest.raises(EnvironmentUnfitError, match=f"no QEMU 11 at {path}") as caught:
        emulator_path(QEMU11)
    assert caught.value.hint == "make qemu11"
    path.parent.mkdir(parents=True)
    qemu(path, "11.1.2")
    assert emulator_path(QEMU11) == path


def test_libvirt_that_does_not_answer(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_uri: str) -> None:
        raise libvirt.libvirtError("no connection")

    monkeypatch.setattr(libvirt, "open", refuse)
    with (
        pytest.raises(EnvironmentUnfitError, match="libvirt at qemu:///system: no connection"),
        Host("qemu:///system"),
    ):
        raise AssertionError("it was taken")


@pytest.mark.parametrize(
    ("version", "api"), [((10, 0, 0), 4), ((10, 2, 1), 4), ((11, 0, 0), 7), ((11, 1, 2), 7)]
)
def test_plugin_api_of_a_qemu(version: tuple[int, ...], api: int) -> None:
    assert plugin_api(version) == api


def test_plugin_that_is_not_built() -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"mktme-api99\.so is not built") as caught:
        plugin_path(99)
    assert caught.value.hint == "make setup"


def test_versions_as_people_write_them() -> None:
    assert dotted((10, 0, 2)) == "10.0.2"
    assert dotted((10,)) == "10"


def test_log_of_a_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_embedded_root", lambda: tmp_path)
    host = Host()
    assert host.qemu_log("alice") == ""
    (tmp_path / "log" / "qemu").mkdir(parents=True)
    (tmp_path / "log" / "qemu" / "alice.log").write_bytes(b"mktme: gone \xff\n")
    assert host.qemu_log("alice") == "mktme: gone \ufffd\n"


def embedded_root(monkeypatch: pytest.MonkeyPatch, parent: Path, cache: Path) -> Path:
    """As for a process whose private directory is `parent`."""
    monkeypatch.setattr(host_module, "process_dir", lambda: parent)
    monkeypatch.setattr(host_module, "cache_dir", lambda: cache / "images")
    root: Path = host_module._embedded_root.__wrapped__()
    return root


@pytest.fixture
def short_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="m") as directory:
        yield Path(directory)


def test_root_leaves_room_for_its_sockets(
    short_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt's monitor sockets are 53 characters below it, and end at 107."""
    for length in (54, 55):
        parent = short_dir / ("x" * (length - len(f"{short_dir}//libvirt")))
        parent.mkdir()
        if length == 54:
            assert len(str(embedded_root(monkeypatch, parent, tmp_path))) == 54
        else:
            with pytest.raises(EnvironmentUnfitError, match="too long a path") as caught:
                embedded_root(monkeypatch, parent, tmp_path)
            assert caught.value.hint == "export TMPDIR=/tmp"


def test_root_is_configured_to_leave_the_machine_alone(
    short_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = embedded_root(monkeypatch, short_dir, tmp_path)
    settings = (root / "etc" / "qemu.conf").read_text().splitlines()
    for setting in ('stdio_handler = "file"', 'security_driver = "none"', "namespaces = []"):
        assert setting in settings
    assert ('user = "root"' in settings) == (os.geteuid() == 0)
    # What libvirt learnt of a QEMU outlives the root.
    assert (root / "cache/qemu/capabilities").resolve() == tmp_path / "qemu-capabilities"
