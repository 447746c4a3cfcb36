# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine keeps its memory from other processes, cores and swap: the kernel's view of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mktme.engine.secret import KeyMemory
from mktme.service.client import EngineProcess, EngineRefusedError

MIB = 1 << 20
NOBODY = 65534
CAP_IPC_LOCK = 1 << 14


def unfit(reason: str) -> None:
    """Skip for what only this machine lacks; CI has no excuse."""
    if os.environ.get("CI"):
        raise AssertionError(reason)
    pytest.skip(reason)


def kernel_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def memory_bytes(pid: int) -> tuple[int, int, int]:
    """Locked, mapped and in use."""
    status = kernel_status(pid)
    locked, mapped, used = (int(status[name].split()[0]) for name in ("VmLck", "VmSize", "VmRSS"))
    return locked << 10, mapped << 10, used << 10


def core_limits(pid: int) -> list[str]:
    """Soft and hard."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (limits,) = (line.split()[4:6] for line in lines if line.startswith("Max core file size"))
    return limits


# --- the engine -------------------------------------------------------------------------------


def test_engine_has_no_core_and_gains_no_privileges(engine: EngineProcess) -> None:
    assert core_limits(engine.process.pid) == ["0", "0"]
    assert kernel_status(engine.process.pid)["NoNewPrivs"] == "1"


def test_engine_locks_memory(engine: EngineProcess) -> None:
    locked, mapped, used = memory_bytes(engine.process.pid)
    assert locked > 0
    if int(kernel_status(engine.process.pid)["CapEff"], 16) & CAP_IPC_LOCK:
        assert mapped - locked < MIB
        assert used < mapped // 2  # what is not in use is not brought in
    # The control: this process, which may hold keys of other tests.
    locked, mapped, used = memory_bytes(os.getpid())
    assert mapped - locked > MIB


def test_engine_tells_what_the_kernel_does(engine: EngineProcess) -> None:
    custody = engine.client.status().custody
    assert not custody.dumpable
    assert custody.core_limit_bytes == 0
    capable = int(kernel_status(engine.process.pid)["CapEff"], 16) & CAP_IPC_LOCK
    assert custody.memory_locked == ("all" if capable else "keys")
    assert custody.key_memory in (KeyMemory.SECRET, KeyMemory.LOCKED)


# An ordinary user's harness. It tries to look into its own engine, and into a child that is no
# engine: {"engine": {way: errno or 0}, "child": {...}}.
HARNESS = """
import ctypes, json, os, subprocess, sys, tempfile
from pathlib import Path
from mktme.service.client import EngineProcess

libc = ctypes.CDLL(None, use_errno=True)

def opens(path):
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return error.errno
    return 0

def lists(path):
    try:
        os.listdir(path)
    except OSError as error:
        return error.errno
    return 0

def attaches(pid):
    zero = ctypes.c_void_p(0)
    return ctypes.get_errno() if libc.ptrace(0x4206, pid, zero, zero) else 0  # PTRACE_SEIZE

def ways(pid):
    return {
        "mem": opens(f"/proc/{pid}/mem"),
        "maps": opens(f"/proc/{pid}/maps"),
        "environ": opens(f"/proc/{pid}/environ"),
        "descriptors": lists(f"/proc/{pid}/fd"),
        "ptrace": attaches(pid),
    }

with (
    tempfile.TemporaryDirectory() as directory,
    EngineProcess(Path(directory), Path(directory) / "dram.img", 8 << 20) as engine,
    subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child,
):
    custody = engine.client.status().custody
    answer = {"engine": ways(engine.process.pid), "child": ways(child.pid)}
    child.communicate(b"\\n")
    print(json.dumps({**answer, "dumpable": custody.dumpable, "uid": os.getuid()}))
"""


def run_as_ordinary_user(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process, as nobody when this one is root's."""
    user: dict[str, Any] = {}
    if os.getuid() == 0:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}

    def run(script: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script]
        environment = {**os.environ, "HOME": "/nonexistent"}
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd="/",
            env=environment,
            **user,
        )

    try:
        readable = run("import mktme").returncode == 0
    except PermissionError:
        readable = False
    if not readable:
        unfit("an ordinary user cannot read this checkout and its virtual environment")
    return run(script)


def test_same_user_cannot_look_into_the_engine() -> None:
    done = run_as_ordinary_user(HARNESS)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["uid"] != 0
    # The control: without custody, one process of a user is an open book to another.
    if any(seen["child"].values()):
        unfit(f"no ordinary user may look into its own processes here: {seen['child']}")
    assert all(seen["engine"].values()), seen
    assert seen["dumpable"] is False


@pytest.mark.parametrize(
    "obstacle",
    [
        "custody._PR_SET_DUMPABLE = custody._PR_GET_DUMPABLE",  # succeeds, and does nothing
        "custody._PR_SET_DUMPABLE = 1 << 20",  # fails
        "custody.resource.setrlimit = lambda *_: None",
    ],
)
def test_engine_that_others_could_read_does_not_start(tmp_path: Path, obstacle: str) -> None:
    if "setrlimit" in obstacle and core_limits(os.getpid())[1] == "0":
        pytest.skip("no process has a core here")
    engine = EngineProcess(tmp_path, tmp_path / "dram.img", 8 * MIB)
    start = "import sys; from mktme.service import custody, __main__ as engine; {}; {}"
    engine._command[1:3] = ["-c", start.format(obstacle, "sys.exit(engine.main())")]
    with pytest.raises(EngineRefusedError) as caught, engine:
        pass
    assert caught.value.error == "EngineError"
    assert "prctl" in str(caught.value) or "could read its keys" in str(caught.value)
    assert not (tmp_path / "dram.img").exists()


# --- harden -----------------------------------------------------------------------------------

HARDEN = """
import dataclasses, json, logging, mmap, os, resource, sys
from mktme.engine import secret
from mktme.service.custody import harden
logging.basicConfig(format="%(levelname)s %(message)s")

def harden_and_print():
    custody = harden()
    print(json.dumps({**dataclasses.asdict(custody), "key_memory": custody.key_memory.value}))

def memory(*names):
    lines = (line.split(":", 1) for line in open("/proc/self/status"))
    fields = {name: value for name, value in lines}
    return [int(fields[name].split()[0]) * 1024 for name in names]
"""


def test_limited_user_locks_keys_and_may_map_more_than_the_limit() -> None:
    done = run_as_ordinary_user(
        HARDEN
        + """
hard = min(resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] % (1 << 63), 1 << 20)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, hard))
harden_and_print()
assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (hard, hard)
mmap.mmap(-1, 64 << 20)[:: 1 << 20] = bytes(64)
assert memory("VmLck")[0] <= hard
"""
    )
    assert done.returncode == 0, done.stderr
    custody = json.loads(done.stdout)
    assert custody["key_memory"] in ("memfd_secret", "mlock")
    assert custody["memory_locked"] == "keys"
    assert custody["dumpable"] is False
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("WARNING the engine's memory may be swapped out, all but the keys")
    assert "ulimit -l unlimited" in warning


def test_user_that_may_lock_nothing_is_warned() -> None:
    done = run_as_ordinary_user(
        HARDEN + "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\nharden_and_print()"
    )
    assert done.returncode == 0, done.stderr
    custody = json.loads(done.stdout)
    assert (custody["memory_locked"], custody["key_memory"]) == ("none", "pageable")
    assert "may be swapped out, the keys too" in done.stderr
    assert done.stderr.count("WARNING") == 2


def test_all_memory_is_locked_and_none_is_brought_in_for_it() -> None:
    if not int(kernel_status(os.getpid())["CapEff"], 16) & CAP_IPC_LOCK:
        pytest.skip("only a process with CAP_IPC_LOCK may lock without a limit")
    script = """
before = memory("VmHWM")[0]
harden_and_print()
locked = memory("VmLck")[0]
hole = os.memfd_create("hole")
os.ftruncate(hole, 64 << 20)
mapped = mmap.mmap(hole, 64 << 20), mmap.mmap(-1, 64 << 20)
peak, more = memory("VmHWM", "VmLck")
assert more - locked == 128 << 20, more - locked
assert os.fstat(hole).st_blocks == 0
assert peak - before < 1 << 20, peak - before
"""
    done = subprocess.run(
        [sys.executable, "-c", HARDEN + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory_locked"] == "all"
    assert done.stderr == ""
