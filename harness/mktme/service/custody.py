# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine keeps its memory to itself (prctl(2), mlockall(2), setrlimit(2), core(5)).

A process that is not dumpable leaves no core, to a file or to a handler alike (core_pattern pipes
to a handler whatever RLIMIT_CORE says), and no process without CAP_SYS_PTRACE can attach to it or
open its ``/proc/PID/mem``, environ, fd and the like; not even one of the same user.

Root can do all of that still. What it cannot do is read memfd_secret(2) memory in these ways,
which is where keys are when the kernel has it (`mktme.engine.secret`).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mktme.engine.errors import EngineError
from mktme.engine.secret import KeyMemory, key_memory

# include/uapi/linux/prctl.h
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
# include/uapi/asm-generic/mman.h
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
# More than the kernel's own mappings in a process, which cannot be locked (vvar, vdso).
_PROBE_BYTES: Final = 16 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Custody:
    """How this process's memory is kept, as the kernel told it at the end of `harden`.

    Attributes:
        dumpable: whether other processes of the same user may read it, and a crash dump it.
        core_limit_bytes: the hard limit of a core file's size, -1 when there is none.
        memory_locked: what cannot be swapped out: all memory (what is mapped later, too), that
            of the keys, or none.
        key_memory: what keys are in.
    """

    dumpable: bool
    core_limit_bytes: int
    memory_locked: Literal["all", "keys", "none"]
    key_memory: KeyMemory


def harden() -> Custody:
    """Keep this process's memory out of others' reach; for the engine, before it has a secret.

    It cannot be undone. Memory that the process may not lock is only worth a warning.

    Raises:
        EngineError: the kernel refuses, and other processes or a core could show keys.
    """
    _prctl(_PR_SET_DUMPABLE, 0)
    # A program that the engine might execute would be dumpable, and could gain capabilities.
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lock_memory()
    custody = _read_back()
    if custody.dumpable or custody.core_limit_bytes != 0:
        raise EngineError(
            "the kernel leaves this process dumpable: others could read its keys",
            hint="is a sandbox or a tracer between the engine and the kernel?",
        )
    if custody.memory_locked != "all":
        what = "all but the keys" if custody.memory_locked == "keys" else "the keys too"
        log.warning(
            "the engine's memory may be swapped out, %s; CAP_IPC_LOCK or 'ulimit -l unlimited' "
            "lets it lock all",
            what,
        )
    return custody


def is_exposed() -> bool:
    """Whether another process may read this one's memory now, or does (a tracer)."""
    return _prctl(_PR_GET_DUMPABLE) != 0 or is_traced(os.getpid())


def is_traced(pid: int) -> bool:
    """Whether a debugger is attached to a process (proc(5), TracerPid).

    Raises:
        OSError: there is no such process.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    tracer = next(line for line in status.splitlines() if line.startswith("TracerPid:"))
    return tracer.split()[1] != "0"


def _lock_memory() -> None:
    """Lock all memory, mapped later too, if no limit binds this process.

    With MCL_FUTURE and a limit, mmap(2) would fail once the limit is reached. MCL_ONFAULT: only
    what is in use is locked, nothing is brought in for it.
    """
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    unlimited = hard == resource.RLIM_INFINITY
    # Where the limit is 0, only a process that it does not bind (CAP_IPC_LOCK) may lock at all.
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard if unlimited else 0, hard))
    _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    # Whether that worked is read back. If not, key memory gets all that the limit allows.
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def _read_back() -> Custody:
    kind = key_memory()
    # If this mapping is locked as well, what comes later will be.
    with mmap.mmap(-1, _PROBE_BYTES):
        fields = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
    mapped, locked = (int(fields[name].split()[0]) * 1024 for name in ("VmSize", "VmLck"))
    memory_locked: Literal["all", "keys", "none"] = "none"
    if mapped - locked < _PROBE_BYTES:
        memory_locked = "all"
    elif locked > 0 and kind is not KeyMemory.PAGEABLE:
        memory_locked = "keys"
    return Custody(
        dumpable=_prctl(_PR_GET_DUMPABLE) != 0,
        core_limit_bytes=resource.getrlimit(resource.RLIMIT_CORE)[1],
        memory_locked=memory_locked,
        key_memory=kind,
    )


_libc: Final = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int = 0) -> int:
    # The kernel wants unused arguments to be 0, of unsigned long's width.
    zero = ctypes.c_ulong(0)
    result: int = _libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero)
    if result < 0:
        raise EngineError(f"prctl option {option}: {os.strerror(ctypes.get_errno())}")
    return result
