# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's TPM: a swtpm that the engine makes, asks for its endorsement key, and gives to one QEMU.

::

    AddVtpm ─► swtpm_setup: a new TPM, EK at its handle, PCRs of SHA-256 alone
            ─► swtpm: TPM2_ReadPublic of that handle, which evidence is to have
    QEMU connects (libvirt: <backend type='external'>) ─► swtpm, on this one connection
    its plugin links ─► refused unless it is in the process that connected

So evidence can say whose TPM an EK is in: the engine has it from the TPM itself, before any guest,
and nobody but the VM's QEMU ever talked to it. There is no EK certificate: it would go on to be
valid when the VM is gone, and evidence is fresh and says more (docs/adr/0020).

The TPM's state is in files, encrypted under a key that the engine draws; it and all processes of a
TPM end with the VM or with the engine, whichever is first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from uuid import UUID

from mktme.attest.marshal import Reader, TpmFormatError
from mktme.attest.tpm_keys import TpmKey
from mktme.engine.errors import MktmeError
from mktme.engine.xts import wipe
from mktme.service.peer import credentials

log = logging.getLogger(__name__)

_SETUP_TIMEOUT_S: Final = 25.0  # less than a client waits; half a second is usual
_ANSWER_TIMEOUT_S: Final = 5.0
_ANSWER_MAX_BYTES: Final = 4096
_EK_HANDLE: Final = 0x81010001
# TPM 2.0 Library, Part 3, 12.4: TPM_ST_NO_SESSIONS, size, TPM_CC_ReadPublic, handle.
_READ_PUBLIC: Final = struct.pack(">HIII", 0x8001, 14, 0x173, _EK_HANDLE)
_KEY_BYTES: Final = 32
# Nothing outlives the engine, however it ends.
_TIED: Final = ("setpriv", "--pdeathsig", "KILL")


class VtpmError(MktmeError):
    """A VM's TPM could not be made."""


class Vtpm:
    """One TPM.

    Attributes:
        endorsement_key: SHA-256 of its EK (DER, SubjectPublicKeyInfo), 32 bytes.
        socket: where QEMU is to connect; once.
        client_pid: the process that did, None before.
    """

    @classmethod
    async def create(cls, run_dir: Path, vm: UUID, peer_uids: frozenset[int]) -> Vtpm:
        """Make a TPM.

        Args:
            run_dir: private directory for its socket and its state.
            vm: whose it is.
            peer_uids: user ids that QEMU may run as.

        Raises:
            VtpmError: there is no swtpm, or it fails.
        """
        one = cls(run_dir, vm, peer_uids)
        try:
            one.endorsement_key = (await asyncio.to_thread(one._make)).sha256
            one._listen()
        except BaseException:
            await one.close()
            raise
        return one

    def __init__(self, run_dir: Path, vm: UUID, peer_uids: frozenset[int]) -> None:
        self.endorsement_key = b""
        self.socket = run_dir / f"{vm.hex[:8]}.tpm"
        self.client_pid: int | None = None
        self._vm = vm
        self._peer_uids = peer_uids
        self._state = Path(tempfile.mkdtemp(prefix=f"{vm.hex[:8]}-tpm-", dir=run_dir))
        self._key = bytearray(secrets.token_bytes(_KEY_BYTES))
        self._process: asyncio.subprocess.Process | None = None
        self._server: asyncio.Task[None] | None = None

    def kill(self) -> None:
        """End it now; its state is left, which nobody can read."""
        if self._server is not None:
            self._server.cancel()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        wipe(self._key)
        self.socket.unlink(missing_ok=True)

    @property
    def pid(self) -> int | None:
        """The process that is the TPM, None before QEMU has connected."""
        return None if self._process is None else self._process.pid

    async def close(self) -> None:
        """End it, and what is left of it; its EK is nobody's then."""
        self.kill()
        if self._server is not None:
            await asyncio.wait([self._server])
        if self._process is not None:
            await self._process.wait()
        await asyncio.to_thread(shutil.rmtree, self._state, ignore_errors=True)

    # --- making -------------------------------------------------------------------------------

    def _make(self) -> TpmKey:
        with self._key_fd(hexadecimal=True) as key:
            setup = ["swtpm_setup", "--tpm2", "--tpmstate", str(self._state), "--createek"]
            setup += ["--pcr-banks", "sha256", "--cipher", "aes-256-cbc", "--keyfile-fd", str(key)]
            _run(setup, key)
        ours, its = socket.socketpair()
        with ours, its, self._key_fd() as key:
            ours.settimeout(_ANSWER_TIMEOUT_S)
            flags = ("--fd", str(its.fileno()), "--flags", "not-need-init,startup-clear")
            command = self._swtpm(key, *flags)
            with subprocess.Popen(
                command, pass_fds=(its.fileno(), key), stdin=subprocess.DEVNULL
            ) as process:
                its.close()
                try:
                    ours.sendall(_READ_PUBLIC)
                    return _endorsement_key(ours.recv(_ANSWER_MAX_BYTES))
                except OSError as error:
                    raise VtpmError(f"swtpm does not answer: {error}") from error
                finally:
                    process.kill()

    def _swtpm(self, key: int, *options: str) -> list[str]:
        command = [*_TIED, "swtpm", "socket", "--tpm2", "--terminate", "--log", "file=-"]
        command += ["--tpmstate", f"dir={self._state}"]
        return [*command, "--key", f"fd={key},mode=aes-256-cbc,format=binary", *options]

    @contextlib.contextmanager
    def _key_fd(self, *, hexadecimal: bool = False) -> Iterator[int]:
        """A descriptor from which a child reads the key of the state."""
        reading, writing = os.pipe()
        try:
            text = bytearray(self._key.hex(), "ascii") if hexadecimal else bytearray(self._key)
            os.write(writing, text)  # a pipe has room for it
            wipe(text)
            os.close(writing)
            yield reading
        finally:
            os.close(reading)

    # --- serving ------------------------------------------------------------------------------

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            listener.bind(str(self.socket))
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise VtpmError(f"{self.socket}: {error.strerror}") from error
        finally:
            os.umask(mask)
        listener.setblocking(False)
        self._server = asyncio.get_running_loop().create_task(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        """Accept QEMU, as the only one ever, and have a swtpm serve it."""
        with listener:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        self.socket.unlink(missing_ok=True)
        with connection:
            pid, uid, _gid = credentials(connection)
            if uid not in self._peer_uids:
                log.warning("the TPM of VM %s: user %d may not connect", self._vm, uid)
                return
            connection.setblocking(True)
            self.client_pid = pid
            with self._key_fd() as key:
                control = ("--ctrl", f"type=unixio,clientfd={connection.fileno()}")
                self._process = await asyncio.create_subprocess_exec(
                    *self._swtpm(key, *control),
                    pass_fds=(connection.fileno(), key),
                    stdin=subprocess.DEVNULL,
                )
        status = await self._process.wait()
        log.info("the TPM of VM %s ended, status %d", self._vm, status)


def _run(command: list[str], key: int) -> None:
    try:
        done = subprocess.run(
            [*_TIED, *command],
            pass_fds=(key,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SETUP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VtpmError(f"{command[0]} does not run: {error}", hint="make setup") from error
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip().splitlines() or ["no message"]
        raise VtpmError(
            f"{command[0]} failed: {said[-1]}",
            hint="install swtpm and swtpm-tools (`make setup` does)",
        )


def _endorsement_key(answer: bytes) -> TpmKey:
    """The key in an answer to TPM2_ReadPublic."""
    reader = Reader(answer, "big", "the TPM's answer")
    try:
        reader.take(2 + 4)  # tag, size
        if code := reader.number(4):
            raise reader.wrong(f"is error {code:#x}")
        public = reader.sized(_ANSWER_MAX_BYTES)
        return TpmKey.parse(len(public).to_bytes(2, "big") + public)
    except TpmFormatError as error:
        raise VtpmError(str(error)) from error
