# SPDX-License-Identifier: GPL-2.0-or-later
"""A TPM of this machine's swtpm and its tools, in place of a guest; and logs that lead to its PCRs.

Neither it nor tpm2-tools know of our code: where they agree with it, that says something.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mktme.attest.event_log import EventKind
from mktme.vm.console import CommandResult

TOOLS = ("swtpm", "swtpm_setup", "tpm2_quote", "setpriv")


@dataclass
class SoftTpm:
    """A running TPM, as a shell whose tpm2-tools use it."""

    directory: Path
    environment: dict[str, str]

    def run(self, command: str, timeout_s: float, *, check: bool = True) -> CommandResult:
        # In a guest the kernel swaps objects in and out of the TPM, which has room for three.
        done = subprocess.run(
            ["sh", "-c", f"tpm2_flushcontext -t; tpm2_flushcontext -l; {command}"],
            env=self.environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return CommandResult(done.stdout, done.returncode)

    def extend(self, events: Sequence[LogEvent]) -> None:
        for event in events:
            if event.kind is not EventKind.NO_ACTION:
                self.run(f"tpm2_pcrextend {event.pcr}:sha256={event.digest.hex()}", 20)


@contextlib.contextmanager
def soft_tpm(directory: Path) -> Iterator[SoftTpm]:
    """A TPM that is made anew; `directory` must have a short path, for it has sockets."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        if os.environ.get("CI"):
            raise FileNotFoundError(f"{missing}: make setup")
        pytest.skip(f"{missing} are not installed: make setup")
    state, socket = directory / "state", directory / "tpm"
    state.mkdir()
    setup = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--createek"]
    subprocess.run([*setup, "--pcr-banks", "sha256"], check=True, stdout=subprocess.DEVNULL)
    command = ["setpriv", "--pdeathsig", "KILL", "swtpm", "socket", "--tpm2"]
    command += ["--tpmstate", f"dir={state}", "--flags", "not-need-init,startup-clear"]
    command += ["--log", f"file={directory / 'swtpm.log'}"]
    command += [
        "--server",
        f"type=unixio,path={socket}",
        "--ctrl",
        f"type=unixio,path={socket}.ctrl",
    ]
    ready = directory / "ready"
    os.mkfifo(ready)
    with subprocess.Popen([*command, "--pid", f"file={ready}"]) as process:
        try:
            assert int(ready.read_text()) == process.pid  # it writes it when it listens
            environment = os.environ | {"TPM2TOOLS_TCTI": f"swtpm:path={socket}"}
            yield SoftTpm(directory, environment)
        finally:
            process.terminate()


@dataclass(frozen=True)
class LogEvent:
    """An event of a log that is made up."""

    pcr: int
    kind: EventKind
    digest: bytes
    data: bytes

    @classmethod
    def of(cls, pcr: int, kind: EventKind, data: bytes, measured: bytes | None = None) -> LogEvent:
        return cls(pcr, kind, hashlib.sha256(data if measured is None else measured).digest(), data)


_NAME = "SecureBoot".encode("utf-16-le")
_VARIABLE = bytes(16) + struct.pack("<QQ", len(_NAME) // 2, 1) + _NAME + b"\0"

BOOT = (
    LogEvent(0, EventKind.NO_ACTION, bytes(32), b"StartupLocality\0\0"),
    LogEvent.of(0, EventKind.S_CRTM_VERSION, b"\0\0"),
    LogEvent.of(0, EventKind.EFI_PLATFORM_FIRMWARE_BLOB2, b"\4blob" + bytes(16), b"the firmware"),
    LogEvent.of(7, EventKind.EFI_VARIABLE_DRIVER_CONFIG, _VARIABLE),
    *(LogEvent.of(pcr, EventKind.SEPARATOR, bytes(4)) for pcr in range(8)),
    LogEvent.of(4, EventKind.EFI_BOOT_SERVICES_APPLICATION, bytes(32), b"GRUB's own"),
    LogEvent.of(8, EventKind.IPL, b"grub_cmd: linux /vmlinuz quiet\0", b"linux /vmlinuz quiet"),
    LogEvent.of(9, EventKind.IPL, b"/vmlinuz\0", b"the kernel"),
    LogEvent.of(8, EventKind.IPL, b"kernel_cmdline: /vmlinuz quiet\0", b"/vmlinuz quiet"),
    LogEvent.of(5, EventKind.EFI_ACTION, b"Exit Boot Services Invocation"),
)
"""A boot in brief."""


def encode_log(
    events: Sequence[LogEvent], banks: Sequence[tuple[int, int]] = ((0xB, 32),)
) -> bytes:
    """A log in the crypto agile format, with as many banks; all but that of SHA-256 have zeros."""
    spec = struct.pack("<16sIBBBBI", b"Spec ID Event03\0", 0, 0, 2, 0, 2, len(banks))
    spec += b"".join(struct.pack("<HH", *bank) for bank in banks) + b"\0"
    log = struct.pack("<II20xI", 0, 3, len(spec)) + spec
    for event in events:
        log += struct.pack("<III", event.pcr, event.kind.value, len(banks))
        for algorithm, size_bytes in banks:
            digest = event.digest if algorithm == 0xB else bytes(size_bytes)
            log += struct.pack("<H", algorithm) + digest
        log += struct.pack("<I", len(event.data)) + event.data
    return log
