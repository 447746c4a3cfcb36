# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory for secrets: what it is made of, and that a secret is gone when it should be."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.engine import secret
from mktme.engine.secret import KeyMemory, SecretBuffer, allocate, key_memory

NO_SUCH_CALL = 1 << 20  # fails, as memfd_secret(2) does on an older kernel or under a filter
# Processes of their own are started with this: to drop privileges in, and to fork.
AS_ORDINARY_USER = """
import logging, os, resource
from mktme.engine import secret
from mktme.engine.secret import KeyMemory, allocate, key_memory
logging.basicConfig()
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
"""


@pytest.fixture
def new_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets of other tests stay where they are; those of this one are mapped anew."""
    monkeypatch.setattr(secret, "_arena", secret._Arena())


@pytest.fixture
def secret_memory(new_arena: None) -> None:
    """The kernel must have memfd_secret(2), whatever CI runs on may not."""
    if key_memory() is not KeyMemory.SECRET:
        pytest.skip("no memfd_secret(2): the kernel, its command line or RLIMIT_MEMLOCK refuses")


@pytest.fixture
def no_secret_memory(new_arena: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "_MEMFD_SECRET", NO_SUCH_CALL)


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def address(buffer: SecretBuffer) -> int:
    found: int = np.frombuffer(buffer.view, np.uint8).ctypes.data
    return found


def mapping_flags(at: int) -> list[str]:
    """Flags of the mapping at an address (proc(5), /proc/PID/smaps, VmFlags)."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first, *others = line.split()
            if first == "VmFlags:" and inside:
                return others
            if not first.endswith(":"):
                start, end = (int(number, 16) for number in first.split("-"))
                inside = start <= at < end
    raise AssertionError("not mapped")


def other_process_reads(at: int) -> bool:
    """Whether a process that may look into this one gets what is there."""
    script = f"import os; os.pread(os.open('/proc/{os.getpid()}/mem', os.O_RDONLY), 1, {at})"
    done = run(script)
    if "Errno 13" in done.stderr:
        if os.environ.get("CI"):
            raise AssertionError("this test needs CAP_SYS_PTRACE")
        pytest.skip("only root may look into another process here")
    assert done.returncode == 0 or "Errno 5" in done.stderr
    return done.returncode == 0


# --- buffers ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=50))
def test_buffers_are_zero_writable_and_apart(sizes: list[int]) -> None:
    buffers = [allocate(size) for size in sizes]
    for number, (buffer, size) in enumerate(zip(buffers, sizes, strict=True)):
        assert len(buffer) == len(buffer.view) == size
        assert buffer.view.format == "B"
        assert buffer.view.contiguous
        assert not any(buffer.view)
        buffer.view[:] = bytes([number + 1]) * size
    for number, buffer in enumerate(buffers):
        assert set(buffer.view) == {number + 1}


def test_buffer_larger_than_a_chunk() -> None:
    with allocate(1 << 20) as buffer:
        buffer.view[-1] = 1
        assert sum(buffer.view) == 1


@pytest.mark.parametrize("size", [0, -1])
def test_size_must_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        allocate(size)


def test_secret_is_not_shown() -> None:
    with allocate(4) as buffer:
        buffer.view[:] = b"very"
        assert repr(buffer) == str(buffer) == "<SecretBuffer 4 bytes>"


def test_secret_cannot_be_pickled_or_copied() -> None:
    with allocate(4) as buffer:
        for copier in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="holds a secret"):
                copier(buffer)


# --- wiping -----------------------------------------------------------------------------------


def test_wiped_buffer_cannot_be_used() -> None:
    buffer = allocate(32)
    view = buffer.view
    buffer.wipe()
    with pytest.raises(ValueError, match="was wiped"):
        _ = buffer.view
    with pytest.raises(ValueError, match="released"):
        view[0]
    buffer.wipe()
    assert len(buffer) == 32


def test_context_manager_wipes() -> None:
    with allocate(32) as buffer:
        pass
    with pytest.raises(ValueError, match="was wiped"):
        _ = buffer.view


def test_wiped_memory_is_zero_and_used_again(new_arena: None) -> None:
    buffer = allocate(40)
    at = address(buffer)
    buffer.view[:] = b"s" * 40
    buffer.wipe()
    again = allocate(33)  # of the same rounded size
    assert address(again) == at
    assert len(again) == 33
    assert not any(again.view)


def test_slice_of_a_wiped_buffer_never_shows_the_next_secret(new_arena: None) -> None:
    buffer = allocate(32)
    at = address(buffer)
    buffer.view[:] = b"s" * 32
    kept = buffer.view[8:16]
    array = np.frombuffer(buffer.view, np.uint8)
    assert set(kept) == {ord("s")}
    buffer.wipe()
    assert not any(kept)
    assert not array.any()
    for holder in ("slice and array", "slice", "nobody"):
        following = allocate(32)
        assert (address(following) == at) is (holder == "nobody")
        if holder == "slice and array":
            del array
        else:
            kept.release()


def test_forgotten_buffer_is_wiped_once_nothing_shows_it(new_arena: None) -> None:
    buffer = allocate(32)
    at = address(buffer)
    buffer.view[:] = b"s" * 32
    view = buffer.view
    del buffer
    gc.collect()
    assert set(view) == {ord("s")}
    del view
    again = allocate(32)
    assert address(again) == at
    assert not any(again.view)


def test_buffer_in_a_cycle_is_wiped(new_arena: None) -> None:
    holder: list[object] = [buffer := allocate(32)]
    at = address(buffer)
    buffer.view[:] = b"s" * 32
    holder.append(holder)
    del buffer, holder
    gc.collect()
    again = allocate(32)
    assert address(again) == at
    assert not any(again.view)


def test_exit_with_live_buffers_is_quiet() -> None:
    done = run(
        "from mktme.engine.secret import allocate\n"
        "kept = [allocate(96) for _ in range(100)]\n"
        "view = allocate(5).view\n"
        "kept.append(kept)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- what it is made of -----------------------------------------------------------------------


def test_secret_memory_is_hidden_from_other_processes(secret_memory: None) -> None:
    buffer = allocate(32)
    assert {"lo", "dd", "dc"} <= set(mapping_flags(address(buffer)))
    assert not other_process_reads(address(buffer))


def test_locked_memory_is_next(no_secret_memory: None) -> None:
    """The control for the test above, too: root reads this one."""
    assert key_memory() is KeyMemory.LOCKED
    buffer = allocate(32)
    assert {"lo", "dd", "dc"} <= set(mapping_flags(address(buffer)))
    assert other_process_reads(address(buffer))


def test_no_descriptor_stays_open(secret_memory: None) -> None:
    """Root could take it (pidfd_getfd(2)) and map what is hidden."""
    before = os.listdir("/proc/self/fd")
    buffers = [allocate(1 << 16) for _ in range(3)]
    assert os.listdir("/proc/self/fd") == before
    assert len(buffers) == 3


def test_worst_memory_counts(secret_memory: None) -> None:
    buffers = [allocate(1 << 16)]
    assert key_memory() is KeyMemory.SECRET
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secret, "_MEMFD_SECRET", NO_SUCH_CALL)
        buffers.append(allocate(1 << 16))
    assert key_memory() is KeyMemory.LOCKED
    buffers.append(allocate(1 << 16))
    assert key_memory() is KeyMemory.LOCKED


def test_locked_memory_is_not_worth_a_warning(
    no_secret_memory: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert key_memory() is KeyMemory.LOCKED
    assert caplog.text == ""


def test_a_key_for_every_keyid_fits_the_default_limit() -> None:
    done = run(
        AS_ORDINARY_USER
        + """
soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
limit = 8 << 20
if hard != resource.RLIM_INFINITY and hard < limit:
    raise SystemExit("RLIMIT_MEMLOCK is lower already")
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
keys = [allocate(128) for _ in range(2**15)]
print(key_memory().value)
# The control: the limit holds.
more = [allocate(1 << 16) for _ in range(100)]
print(key_memory().value)
"""
    )
    if "lower already" in done.stderr:
        pytest.skip("RLIMIT_MEMLOCK is lower than the default, 8 MiB")
    kinds = done.stdout.split()
    assert kinds[0] in (KeyMemory.SECRET.value, KeyMemory.LOCKED.value)
    assert kinds[1] == KeyMemory.PAGEABLE.value
    assert done.stderr.count("WARNING") == 1


def test_memory_that_cannot_be_locked_is_told_once() -> None:
    done = run(
        AS_ORDINARY_USER
        + """
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
buffers = [allocate(1 << 16) for _ in range(3)]
for buffer in buffers:
    buffer.view[:] = b"s" * len(buffer)
print(key_memory().value)
"""
    )
    assert done.stdout == "pageable\n"
    assert done.stderr.count("keys may be swapped out: RLIMIT_MEMLOCK is 0 bytes") == 1


# --- forked children --------------------------------------------------------------------------

FORK = """
import os, resource
from mktme.engine.secret import allocate, key_memory
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
buffer = allocate(32)
buffer.view[:] = b"s" * 32
def in_child(action):
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def test_forked_child_has_no_secret_of_its_parent() -> None:
    done = run(FORK + "print(in_child(lambda: buffer.view[0]), in_child(lambda: buffer.view))")
    assert done.stdout.split() == [str(-signal.SIGSEGV), "0"]


def test_forked_child_wipes_no_secret_of_its_parent() -> None:
    done = run(
        FORK
        + """
def drop():
    global buffer
    buffer = None
print(in_child(buffer.wipe), in_child(drop), set(buffer.view) == {ord("s")})
"""
    )
    assert done.stdout.split() == ["0", "0", "True"]


def test_forked_child_may_have_secrets() -> None:
    done = run(
        FORK
        + """
allocate(32).wipe()
def use():
    with allocate(32) as own:
        assert not any(own.view)
        own.view[:] = b"t" * 32
        assert set(own.view) == {ord("t")}
print(in_child(use), set(buffer.view) == {ord("s")})
"""
    )
    assert done.stdout.split() == ["0", "True"]
    assert done.stderr == ""
