# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether this machine can do what the harness needs, and the command that mends what cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mktme.datapath.uffd import (
    open_write_tracking,
    require_fault_handling,
    require_write_tracking,
)
from mktme.engine.errors import MktmeError
from mktme.vm import images
from mktme.vm.host import (
    EMULATOR,
    QEMU11,
    EnvironmentUnfitError,
    Host,
    dotted,
    emulator_path,
    emulator_version,
    plugin_api,
    plugin_path,
)
from mktme.vm.platform import available_memory_bytes, require_disk

MEMORY_NEEDED_BYTES: Final = 3 << 30
DISK_NEEDED_BYTES: Final = 3 << 30
_PROBE_TIMEOUT_S: Final = 20
_SETUP: Final = "make setup"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        found: what is there, or what is wrong.
        remedy: the command that mends it, None if all is well or there is none.
    """

    name: str
    fit: bool
    found: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """The document of `mktme doctor`."""

    schema: Literal["mktme.doctor"]
    version: Literal[1]
    findings: tuple[Finding, ...]


def examine() -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("libvirt and QEMU", _libvirt),
        ("QEMU plugin", _plugin),
        ("QEMU 11 (optional)", _qemu11),
        ("userfaultfd", _userfaultfd),
        ("PAGEMAP_SCAN", _pagemap_scan),
        ("inline data path", _inline),
        ("vTPM", _vtpm),
        ("guest image", _image),
        ("memory", _memory),
        ("disk", _disk),
        ("openssl (bench)", _openssl),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(Finding(name, True, check()))
        except MktmeError as error:
            findings.append(Finding(name, False, str(error), error.hint))
    return findings


def _libvirt() -> str:
    try:
        with Host() as host:
            return (
                f"libvirt {dotted(host.libvirt_version)}, QEMU {dotted(host.qemu_version)},"
                f" plugin API {host.plugin_api}"
            )
    except EnvironmentUnfitError as error:
        raise EnvironmentUnfitError(str(error), hint=_SETUP) from error


def _plugin() -> str:
    return f"{_accepted_plugin(EMULATOR).name} is accepted"


def _qemu11() -> str:
    """Its absence is no fault; what is there has to work."""
    try:
        emulator = emulator_path(QEMU11)
    except EnvironmentUnfitError as error:
        return f"not installed: {error.hint}"
    version = emulator_version(emulator)
    return f"QEMU {dotted(version)}, {_accepted_plugin(emulator).name} is accepted"


def _accepted_plugin(emulator: Path) -> Path:
    """Have a QEMU load the plugin that was built for it."""
    path = plugin_path(plugin_api(emulator_version(emulator)))
    command = [str(emulator), "-machine", "none", "-display", "none", "-plugin", str(path)]
    try:
        probe = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentUnfitError(f"{emulator}: {error}", hint=_SETUP) from error
    # Loaded without arguments it says what is missing; a QEMU that does not take it says so.
    if "mktme: " in probe.stderr:
        return path
    refusal = probe.stderr.strip().splitlines()[-1] if probe.stderr else "no answer"
    raise EnvironmentUnfitError(f"{path.name}: {refusal}", hint=_SETUP)


def _userfaultfd() -> str:
    os.close(open_write_tracking())
    return "asynchronous write tracking of shared memory"


def _pagemap_scan() -> str:
    require_write_tracking()
    return f"kernel {os.uname().release} finds written pages"


def _inline() -> str:
    require_fault_handling()
    return "userfaultfd stops system calls, too"


def _vtpm() -> str:
    """The engine has it keep a TPM's state encrypted."""
    command = ["swtpm_setup", "--tpm2", "--print-capabilities"]
    try:
        probe = subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=True)
        found = json.loads(probe.stdout)
        if {"tpm-2.0", "cmdarg-keyfile-fd"} <= set(found["features"]):
            return f"swtpm {found['version']}"
    except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
        raise EnvironmentUnfitError(f"swtpm does not run: {error}", hint=_SETUP) from error
    raise EnvironmentUnfitError("swtpm is too old", hint=_SETUP)


def _image() -> str:
    manifest = images.verify(images.ensure("tiny"))
    return f"tiny: {manifest.kernel.name} {manifest.kernel.version}, as Debian ships it"


def _memory() -> str:
    available = available_memory_bytes()
    if available < MEMORY_NEEDED_BYTES:
        raise EnvironmentUnfitError(
            f"{available >> 20} MiB available, the demo needs {MEMORY_NEEDED_BYTES >> 20} MiB",
            hint="end other programs, or mktme demo --memory 256M",
        )
    return f"{available >> 20} MiB available"


def _disk() -> str:
    directory = Path(tempfile.gettempdir())
    free = require_disk(directory, DISK_NEEDED_BYTES)
    return f"{free >> 20} MiB free in {directory}"


def _openssl() -> str:
    path = shutil.which("openssl")
    if path is None:
        raise EnvironmentUnfitError("the openssl command is not installed", hint=_SETUP)
    return path
