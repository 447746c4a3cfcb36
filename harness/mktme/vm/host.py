# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtualisation host: a libvirt connection, embedded by default."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import threading
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

import libvirt

from mktme.engine.errors import MktmeError
from mktme.vm.images import cache_dir
from mktme.vm.reaper import LIBVIRT_ROOT, process_dir

EMULATOR: Final = Path("/usr/bin/qemu-system-x86_64")
QEMU11: Final = "qemu11"
"""What `make qemu11` installs, as `emulator_path` knows it."""
_VERSION_TIMEOUT_S: Final = 20
# sun_path has 107 characters, of which /lib/qemu/domain-1234-NAME/monitor.sock takes 53: libvirt
# cuts NAME to 20.
_ROOT_MAX_CHARACTERS: Final = 107 - 53
QEMU_MIN: Final = (10, 0, 0)

# stdio_handler: no virtlogd here. The others: this driver runs as whoever runs the harness, and
# neither owners, labels, cgroups nor namespaces are the harness's to change on a user's machine.
_QEMU_CONF: Final = """\
stdio_handler = "file"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
"""


class EnvironmentUnfitError(MktmeError):
    """This machine lacks something; `mktme doctor` looks at all of it."""


class UsageError(MktmeError):
    """An option's value makes no sense."""


class Host:
    """A connection to libvirt, and the QEMU that it is to start; a context manager.

    Args:
        uri: another libvirt on this machine in place of the embedded driver.
        emulator: another QEMU than this machine's own, such as `emulator_path` finds.

    Raises:
        UsageError: `uri` is none, or names another machine.
        EnvironmentUnfitError: libvirt does not answer, or the QEMU is none or too old.
    """

    def __init__(self, uri: str | None = None, *, emulator: Path | None = None) -> None:
        self.emulator = emulator or EMULATOR
        self.embedded = uri is None
        self.uri = uri or "qemu:///embed"
        try:
            parts = urlsplit(self.uri)
        except ValueError as error:
            raise UsageError(
                f"{self.uri}: {error}", hint="give a URI such as qemu:///system"
            ) from error
        if parts.netloc or "ssh" in parts.scheme:
            raise UsageError(
                f"{self.uri}: the engine runs beside QEMU, and this one is on another machine",
                hint="run mktme on that machine, with a URI such as qemu:///system; mktme migrate"
                " moves a guest there",
            )

    def __enter__(self) -> Self:
        # Not libvirt's getVersion, which is the version of the QEMU that it would choose.
        self.qemu_version = emulator_version(self.emulator)
        try:
            with _opening:
                run_event_loop()
                self.connection = _embedded() if self.embedded else libvirt.open(self.uri)
            self.libvirt_version = unpacked_version(self.connection.getLibVersion())
        except libvirt.libvirtError as error:
            raise EnvironmentUnfitError(
                f"libvirt at {self.uri}: {error}", hint="mktme doctor"
            ) from error
        return self

    def __exit__(self, *_error: object) -> None:
        if not self.embedded:
            self.connection.close()

    @property
    def plugin_api(self) -> int:
        """The QEMU plugin API version that this host's QEMU takes (11.1 takes 7 alone)."""
        return plugin_api(self.qemu_version)

    def require_migration(self) -> None:
        """Check that libvirt can have its QEMU migrate, which is how it saves a guest, too.

        Raises:
            EnvironmentUnfitError: it cannot. libvirt 11.3 gives QEMU's `migrate` a parameter that
                QEMU 11 took away: "Parameter 'detach' is unexpected".
        """
        if self.qemu_version >= (11,) and self.libvirt_version < (11, 4):
            raise EnvironmentUnfitError(
                f"libvirt {dotted(self.libvirt_version)} cannot migrate or save a guest of"
                f" QEMU {dotted(self.qemu_version)}",
                hint="use this machine's own QEMU: leave out --emulator",
            )

    def qemu_log(self, name: str) -> str:
        """What a domain's QEMU said so far; empty where we may not look."""
        directory = (
            _embedded_root() / "log" / "qemu" if self.embedded else Path("/var/log/libvirt/qemu")
        )
        try:
            return (directory / f"{name}.log").read_text(errors="replace")
        except OSError:
            return ""


def emulator_path(chosen: str) -> Path:
    """The QEMU that a user chose: a path, or `QEMU11`.

    Raises:
        UsageError: there is no program at this path.
        EnvironmentUnfitError: QEMU 11 is not installed.
    """
    if chosen == QEMU11:
        path = cache_dir().parent / QEMU11 / EMULATOR.name
        if not path.exists():
            raise EnvironmentUnfitError(f"there is no QEMU 11 at {path}", hint="make qemu11")
        return path
    path = Path(chosen).absolute()
    if not (path.is_file() and os.access(path, os.X_OK)):
        what = "is not executable" if path.is_file() else "is no file"
        raise UsageError(
            f"emulator {path} {what}", hint=f"give the path of {EMULATOR.name}, or {QEMU11}"
        )
    return path


def emulator_version(emulator: Path) -> tuple[int, ...]:
    """Ask a QEMU for its version.

    Raises:
        EnvironmentUnfitError: it is not there, is no QEMU, or is too old.
    """
    hint = "make setup" if emulator == EMULATOR else f"make qemu11, and {QEMU11} as the emulator"
    try:
        answer = subprocess.run(
            [emulator, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentUnfitError(f"{emulator}: {error}", hint=hint) from error
    found = re.match(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)", answer.stdout)
    if found is None:
        raise EnvironmentUnfitError(f"{emulator} does not say that it is a QEMU", hint=hint)
    version = tuple(int(number) for number in found.groups())
    if version < QEMU_MIN:
        raise EnvironmentUnfitError(
            f"QEMU {dotted(version)} is too old, {dotted(QEMU_MIN[:2])} is needed", hint=hint
        )
    return version


def plugin_api(qemu_version: tuple[int, ...]) -> int:
    """The QEMU plugin API version to build for: QEMU 10 accepts 2 to 4, QEMU 11.1 only 7."""
    return 7 if qemu_version >= (11,) else 4


def plugin_path(api: int) -> Path:
    """The plugin built for `api`.

    Raises:
        EnvironmentUnfitError: it is not built.
    """
    name = f"mktme-api{api}.so"
    path = Path(__file__).parents[3] / "build" / "qemu-plugin" / name
    if not path.is_file():
        raise EnvironmentUnfitError(f"the QEMU plugin {path} is not built", hint="make setup")
    return path


def unpacked_version(number: int) -> tuple[int, int, int]:
    """How libvirt packs versions: 1,000,000 major + 1,000 minor + release."""
    return number // 1_000_000, number // 1000 % 1000, number % 1000


def dotted(version: tuple[int, ...]) -> str:
    """A version tuple as people write it."""
    return ".".join(str(part) for part in version)


# What is cached is made once, by whichever thread comes first: libvirt bears no second driver.
_opening: Final = threading.Lock()


@functools.cache
def _embedded() -> libvirt.virConnect:
    """The embedded driver, open for the life of the process.

    Each opening registers the driver once more, closed or not, and libvirt has room for 21
    (src/libvirt.c, virRegisterConnectDriver: "Too many drivers").
    """
    return libvirt.open(f"qemu:///embed?root={_embedded_root()}")


@functools.cache
def _embedded_root() -> Path:
    """The embedded driver's root, which it has one of per process."""
    root = process_dir() / LIBVIRT_ROOT
    if len(str(root)) > _ROOT_MAX_CHARACTERS:
        raise EnvironmentUnfitError(
            f"{root} is too long a path for the UNIX sockets below it", hint="export TMPDIR=/tmp"
        )
    configuration = root / "etc" / "qemu.conf"
    configuration.parent.mkdir(parents=True)
    user = 'user = "root"\ngroup = "root"\n' if os.geteuid() == 0 else ""
    configuration.write_text(_QEMU_CONF + user)
    # libvirt asks a new QEMU binary for its capabilities, which takes seconds, and keeps the
    # answers, with what they depend on, here. They may outlive the process.
    kept = cache_dir().parent / "qemu-capabilities"
    kept.mkdir(parents=True, exist_ok=True)
    capabilities = root / "cache" / "qemu" / "capabilities"
    capabilities.parent.mkdir(parents=True)
    capabilities.symlink_to(kept)
    return root


@functools.cache
def run_event_loop() -> None:
    """Start libvirt's event loop, once per process: the embedded driver needs it."""
    # libvirt prints errors to stderr by itself unless it is given a handler; we raise them.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()
