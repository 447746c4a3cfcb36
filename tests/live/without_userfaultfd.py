# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a command for which userfaultfd(2) fails with EPERM (a container's filter does that)."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SYS_USERFAULTFD = 323


class Instruction(ctypes.Structure):
    """linux/filter.h, struct sock_filter."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    """linux/filter.h, struct sock_fprog."""

    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Instruction)))


instructions = (Instruction * 4)(
    Instruction(0x20, 0, 0, 0),  # load the system call's number
    Instruction(0x15, 0, 1, SYS_USERFAULTFD),
    Instruction(0x06, 0, 0, 0x0005_0000 | errno.EPERM),  # SECCOMP_RET_ERRNO
    Instruction(0x06, 0, 0, 0x7FFF_0000),  # SECCOMP_RET_ALLOW
)
libc = ctypes.CDLL(None, use_errno=True)
if (
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
    or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Program(4, instructions))) != 0
):
    sys.exit(f"no filter: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[1], sys.argv[1:])
