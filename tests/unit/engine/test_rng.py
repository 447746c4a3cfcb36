# SPDX-License-Identifier: GPL-2.0-or-later
"""The random number generator: SP 800-90B's health tests, and where key bytes are left."""

from __future__ import annotations

import array
import copy
import ctypes
import errno
import gc
import itertools
import mmap
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.engine import rng as rng_module
from mktme.engine.errors import EngineError
from mktme.engine.rng import (
    ALPHA_BITS,
    APT_CUTOFF,
    APT_WINDOW,
    ENTROPY_BITS,
    RCT_CUTOFF,
    START_UP_SAMPLES,
    EntropyError,
    EntropySource,
    HealthTests,
    KernelEntropy,
    Rng,
    adaptive_proportion_cutoff,
    repetition_count_cutoff,
)

REPETITION = "repetition count test"
PROPORTION = "adaptive proportion test"
TOO_LITTLE = "too little"
KEY_BYTES = 32


def noise(count: int, seed: int = 0) -> bytes:
    """Samples of a good source, the same in each run."""
    return random.Random(seed).randbytes(count)


def walk(count: int, start: int = 0) -> bytes:
    """Samples that are never near a cutoff: a window has each value twice, never in a row."""
    return bytes((start + index) % 256 for index in range(count))


class Script:
    """A source that gives the samples it was made with, remembers which, and then fails."""

    def __init__(self, *parts: bytes) -> None:
        self._left = b"".join(parts)
        self.given = b""

    def read_into(self, buffer: memoryview) -> None:
        count = len(buffer)
        if count > len(self._left):
            raise OSError(errno.EIO, "script at its end")
        buffer[:] = self._left[:count]
        self.given += self._left[:count]
        self._left = self._left[count:]


class Endless:
    """A source that never ends."""

    def __init__(self, samples: Iterator[int]) -> None:
        self._samples = samples

    def read_into(self, buffer: memoryview) -> None:
        buffer[:] = bytes(itertools.islice(self._samples, len(buffer)))


class Short:
    """A source that from some sample on writes nothing, and does not say so."""

    def __init__(self, good: int) -> None:
        self._good = good

    def read_into(self, buffer: memoryview) -> None:
        count = min(self._good, len(buffer))
        buffer[:count] = noise(count)
        self._good -= count


class Failing:
    """A source that writes half of what it shall, and raises."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def read_into(self, buffer: memoryview) -> None:
        buffer[: len(buffer) // 2] = noise(len(buffer) // 2)
        raise self._error


class Switch:
    """A source that can be exchanged for another."""

    def __init__(self, source: EntropySource) -> None:
        self.source = source

    def read_into(self, buffer: memoryview) -> None:
        self.source.read_into(buffer)


def fill(rng: Rng, size_bytes: int = KEY_BYTES) -> bytes:
    buffer = bytearray(size_bytes)
    rng.fill(memoryview(buffer))
    return bytes(buffer)


def fails(rng: Rng, match: str | None, size_bytes: int = KEY_BYTES) -> EntropyError:
    """Show that a request fails, and that zeros replace what the buffer held."""
    buffer = bytearray(b"\xa5" * size_bytes)
    with pytest.raises(EntropyError, match=match) as caught:
        rng.fill(memoryview(buffer))
    assert not any(buffer)
    return caught.value


def drawn(size_bytes: int) -> int:
    """Samples that a request takes after the start-up tests."""
    return size_bytes + APT_WINDOW - size_bytes % APT_WINDOW


def first_failure(samples: bytes) -> str | None:
    """Which test fails first, found in another way than the engine's."""
    failures = []
    if run := re.search(rb"(.)\1{%d}" % (RCT_CUTOFF - 1), samples, re.DOTALL):
        failures.append((run.end(), 0, REPETITION))
    for start in range(0, len(samples), APT_WINDOW):
        window = samples[start : start + APT_WINDOW]
        if window.count(window[0]) >= APT_CUTOFF:
            at = [index for index, sample in enumerate(window) if sample == window[0]]
            failures.append((start + at[APT_CUTOFF - 1] + 1, 1, PROPORTION))
    return min(failures)[2] if failures else None


# --- the cutoffs ------------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy_bits", "cutoff"), [(1, 311), (2, 177), (4, 62), (8, 13)])
def test_apt_cutoffs_are_those_of_sp_800_90b_table_2(entropy_bits: int, cutoff: int) -> None:
    assert adaptive_proportion_cutoff(entropy_bits, alpha_bits=20) == cutoff


def test_rct_cutoff_is_that_of_sp_800_90b_s_example() -> None:
    assert repetition_count_cutoff(entropy_bits=2, alpha_bits=20) == 11


@pytest.mark.parametrize(
    ("entropy_bits", "alpha_bits"), [(ENTROPY_BITS, ALPHA_BITS), (8, 30), (4, 40), (1, 30)]
)
def test_apt_cutoff_is_the_binomial_one(entropy_bits: int, alpha_bits: int) -> None:
    # Trial by trial, with no binomial coefficient: ways[k] of k samples being the likely one.
    ways = [1]
    for _ in range(APT_WINDOW):
        misses = [count * (2**entropy_bits - 1) for count in ways]
        ways = [miss + hit for miss, hit in zip([*misses, 0], [0, *ways], strict=True)]
    total = sum(ways)
    assert total == 2 ** (entropy_bits * APT_WINDOW)
    cutoff = adaptive_proportion_cutoff(entropy_bits, alpha_bits)
    assert sum(ways[cutoff:]) << alpha_bits <= total < sum(ways[cutoff - 1 :]) << alpha_bits


@pytest.mark.parametrize(("entropy_bits", "alpha_bits"), [(8, 40), (8, 41), (3, 20), (1, 30)])
def test_rct_cutoff_is_the_smallest_that_keeps_alpha(entropy_bits: int, alpha_bits: int) -> None:
    cutoff = repetition_count_cutoff(entropy_bits, alpha_bits)
    assert (cutoff - 1) * entropy_bits >= alpha_bits > (cutoff - 2) * entropy_bits


def test_cutoffs_in_use() -> None:
    assert (RCT_CUTOFF, APT_CUTOFF) == (6, 19)
    # SP 800-90B 4.3, and what Rng rests on.
    assert START_UP_SAMPLES >= 1024
    assert START_UP_SAMPLES % APT_WINDOW == 0


# --- the health tests -------------------------------------------------------------------------


def check(tests: HealthTests, *parts: bytes) -> None:
    for part in parts:
        tests.check(memoryview(part))


@pytest.mark.parametrize("before", [0, 1, 100, APT_WINDOW - 3, APT_WINDOW])
@pytest.mark.parametrize("split", range(RCT_CUTOFF))
def test_run_is_caught_wherever_it_is_and_however_it_is_read(before: int, split: int) -> None:
    samples = walk(before) + walk(1, start=before) * RCT_CUTOFF
    first, second = samples[: before + split], samples[before + split :]
    check(HealthTests(), first, second[:-1])  # one fewer is no failure
    with pytest.raises(EntropyError, match=REPETITION):
        check(HealthTests(), first, second)


def test_broken_run_is_no_run() -> None:
    run = b"\x07" * (RCT_CUTOFF - 1)
    check(HealthTests(), run, b"\x08", run)


def test_nothing_before_the_first_sample_counts() -> None:
    check(HealthTests(), b"\0" * (RCT_CUTOFF - 1))


def frequent(count: int) -> bytes:
    """A window in which its first sample is ``count`` times, and never twice in a row."""
    window = bytearray(index % 255 + 1 for index in range(APT_WINDOW))
    window[: 2 * count : 2] = bytes(count)
    return bytes(window)


@pytest.mark.parametrize("split", [0, 1, 2 * APT_CUTOFF - 3, 2 * APT_CUTOFF - 2])
def test_frequent_sample_is_caught(split: int) -> None:
    for windows in (b"", walk(APT_WINDOW, start=7)):
        check(HealthTests(), windows, frequent(APT_CUTOFF - 1), frequent(APT_CUTOFF - 1))
        window = frequent(APT_CUTOFF)
        with pytest.raises(EntropyError, match=PROPORTION):
            check(HealthTests(), windows, window[:split], window[split:])


def test_frequent_sample_is_caught_at_the_end_of_its_window() -> None:
    window = bytearray(frequent(APT_CUTOFF - 1))
    check(HealthTests(), bytes(window))
    window[-1] = window[0]
    with pytest.raises(EntropyError, match=PROPORTION):
        check(HealthTests(), bytes(window))


def test_windows_are_counted_each_on_its_own() -> None:
    window = frequent(APT_CUTOFF - 1)
    check(HealthTests(), window * 50)
    # Read one sample later, a window's count starts with another sample.
    check(HealthTests(), b"\xff", frequent(APT_CUTOFF))


@pytest.mark.parametrize("samples", [b"\0" * RCT_CUTOFF, frequent(APT_CUTOFF)])
def test_failure_names_test_cutoff_and_section_and_no_sample(samples: bytes) -> None:
    shown = bytes(sample ^ 0xD7 for sample in samples)
    with pytest.raises(EngineError) as caught:
        check(HealthTests(), shown)
    assert str(caught.value) in {
        f"the noise source failed the {REPETITION}: 6 equal samples in a row (SP 800-90B 4.4.1)",
        f"the noise source failed the {PROPORTION}: 19 equal samples in a window of 512 "
        "(SP 800-90B 4.4.2)",
    }
    told = f"{caught.value!r} {caught.value.hint}".lower()
    assert "215" not in told
    assert "d7" not in told


# --- sources that break -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [0x00, 0x5A, 0xFF])
def test_stuck_source_never_yields(value: int) -> None:
    rng = Rng(Endless(itertools.repeat(value)))
    for _ in range(20):
        fails(rng, REPETITION)


def test_source_that_repeats_a_pattern_never_yields() -> None:
    rng = Rng(Endless(itertools.cycle(b"\x12\x34")))
    for _ in range(20):
        fails(rng, PROPORTION)


def test_biased_source_is_caught_by_proportion_alone() -> None:
    def biased() -> Iterator[int]:
        generator = random.Random(3)
        while True:
            yield generator.randrange(1, 256)
            yield 0 if generator.random() < 0.2 else generator.randrange(1, 256)
            yield generator.randrange(1, 256)

    # Only a window that begins with the frequent value can show it, one in fifteen here.
    rng = Rng(Endless(biased()))

    def until_it_fails() -> None:
        for _ in range(100):
            fill(rng)

    with pytest.raises(EntropyError, match=PROPORTION):
        until_it_fails()


@pytest.mark.parametrize(
    "good",
    [
        0,
        START_UP_SAMPLES - RCT_CUTOFF,
        START_UP_SAMPLES,
        START_UP_SAMPLES + 10,
        START_UP_SAMPLES + KEY_BYTES - 1,
        START_UP_SAMPLES + APT_WINDOW - RCT_CUTOFF,
        START_UP_SAMPLES + APT_WINDOW - RCT_CUTOFF + 1,
        START_UP_SAMPLES + 7 * APT_WINDOW + 3,
    ],
)
def test_source_that_sticks_yields_what_came_before_and_then_no_more(good: int) -> None:
    rng = Rng(Endless(itertools.chain(noise(good), itertools.repeat(0x33))))
    # A window in which fewer samples are stuck than a run takes is good.
    for window in range((good + RCT_CUTOFF - 1 - START_UP_SAMPLES) // APT_WINDOW):
        at = START_UP_SAMPLES + window * APT_WINDOW
        assert fill(rng) == noise(good)[at : at + KEY_BYTES]
    for _ in range(5):
        fails(rng, REPETITION)


def test_run_across_two_requests_is_caught() -> None:
    def script(tail: int, head: int) -> Rng:
        return Rng(
            Script(
                walk(START_UP_SAMPLES),
                walk(APT_WINDOW - tail, start=1) + b"\xee" * tail,
                b"\xee" * head + walk(APT_WINDOW - head, start=1),
            )
        )

    rng = script(RCT_CUTOFF - 2, 2)
    fill(rng)
    fails(rng, REPETITION)
    rng = script(RCT_CUTOFF - 2, 1)
    fill(rng)
    fill(rng)


@pytest.mark.parametrize("good", [0, START_UP_SAMPLES, START_UP_SAMPLES + KEY_BYTES // 2])
def test_source_that_gives_too_little_in_silence_is_caught(good: int) -> None:
    rng = Rng(Short(good))
    for _ in range(5):
        fails(rng, REPETITION)


def test_what_a_buffer_held_does_not_pass_for_samples() -> None:
    class Skipping:
        def read_into(self, buffer: memoryview) -> None:
            if len(buffer) != KEY_BYTES:
                buffer[:] = noise(len(buffer))

    buffer = bytearray(noise(KEY_BYTES, seed=1))
    with pytest.raises(EntropyError, match=REPETITION):
        Rng(Skipping()).fill(memoryview(buffer))
    assert not any(buffer)


def test_source_that_raises_is_an_entropy_error() -> None:
    rng = Rng(Failing(OSError(errno.EAGAIN, "not seeded")))
    for _ in range(5):
        error = fails(rng, f"{TOO_LITTLE}: not seeded")
        assert isinstance(error.__cause__, OSError)
    assert "OSError" in str(fails(Rng(Failing(OSError())), TOO_LITTLE))


def test_interrupted_request_leaves_zeros_and_starts_anew() -> None:
    switch = Switch(Script(walk(START_UP_SAMPLES + APT_WINDOW)))
    rng = Rng(switch)
    fill(rng)
    switch.source = Failing(KeyboardInterrupt())
    buffer = bytearray(b"\xa5" * KEY_BYTES)
    with pytest.raises(KeyboardInterrupt):
        rng.fill(memoryview(buffer))
    assert not any(buffer)
    switch.source = again = Script(walk(START_UP_SAMPLES + APT_WINDOW))
    fill(rng)
    assert len(again.given) == START_UP_SAMPLES + APT_WINDOW


@pytest.mark.parametrize(
    "broken",
    [Endless(itertools.repeat(1)), Failing(OSError()), Short(0)],
    ids=["stuck", "failing", "short"],
)
def test_source_that_recovers_is_used_after_new_start_up_tests(broken: EntropySource) -> None:
    switch = Switch(Script(noise(START_UP_SAMPLES + APT_WINDOW)))
    rng = Rng(switch)
    fill(rng)
    switch.source = broken
    fails(rng, None)
    # Not yet: the fault is among the start-up samples.
    switch.source = Script(noise(START_UP_SAMPLES - RCT_CUTOFF), bytes(RCT_CUTOFF), noise(4096))
    fails(rng, REPETITION)
    good = noise(START_UP_SAMPLES + 2 * APT_WINDOW, seed=1)
    switch.source = script = Script(good)
    assert fill(rng) == good[START_UP_SAMPLES:][:KEY_BYTES]
    assert fill(rng) == good[START_UP_SAMPLES + APT_WINDOW :][:KEY_BYTES]
    assert script.given == good


# --- good sources -----------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 1, 32, 64, 511, 512, 513, 5000])
def test_output_is_the_samples_after_those_of_start_up(size_bytes: int) -> None:
    source = Script(noise(20_000))
    rng = Rng(source)
    assert fill(rng, size_bytes) == noise(20_000)[START_UP_SAMPLES:][:size_bytes]
    assert len(source.given) == START_UP_SAMPLES + drawn(size_bytes)
    assert (
        fill(rng, size_bytes) == noise(20_000)[len(source.given) - drawn(size_bytes) :][:size_bytes]
    )


def test_ten_million_good_samples_pass() -> None:
    class Generator:
        _generator = np.random.default_rng(1)

        def read_into(self, buffer: memoryview) -> None:
            buffer[:] = self._generator.bytes(len(buffer))

    buffer = np.zeros(10_000_000, np.uint8)
    Rng(Generator()).fill(buffer.data)
    assert np.bincount(buffer, minlength=256).min() > 38_000


def test_kernel_makes_keys_that_differ() -> None:
    first, second = Rng(), Rng()
    keys = [fill(rng, size) for rng in (first, second) for size in (32, 64) for _ in range(50)]
    assert all(any(key) for key in keys)
    parts = [key[at : at + 16] for key in keys for at in range(0, len(key), 16)]
    distinct, total = len(set(parts)), len(parts)
    assert distinct == total == 2 * 50 * 6


SEGMENTS = st.one_of(
    st.builds(noise, st.integers(0, 4000), st.integers(0, 1 << 32)),
    st.builds(lambda count, value: bytes([value]) * count, st.integers(0, 12), st.integers(0, 255)),
    st.builds(lambda pattern, count: pattern * count, st.binary(max_size=40), st.integers(0, 40)),
    st.just(noise(4000)),
)


@given(st.lists(SEGMENTS, max_size=8), st.lists(st.sampled_from([0, 1, 32, 64, 511, 512, 700])))
def test_any_source_gives_tested_samples_or_zeros(parts: list[bytes], sizes: list[int]) -> None:
    source = Script(*parts)
    rng = Rng(source)
    start = 0
    for size_bytes in sizes:
        buffer = bytearray(b"\xa5" * size_bytes)
        told = None
        try:
            rng.fill(memoryview(buffer))
        except EntropyError as error:
            told = str(error)
        failure = first_failure(source.given[start:])
        if told is None:
            at = len(source.given) - drawn(size_bytes)
            assert at >= start + START_UP_SAMPLES
            assert failure is None
            assert buffer == source.given[at : at + size_bytes]
        else:
            assert not any(buffer)
            assert (failure or TOO_LITTLE) in told
            start = len(source.given)


# --- getrandom(2) -----------------------------------------------------------------------------


class FakeKernel:
    """A getrandom(2) whose answers are given: how many bytes to write, or an error's number."""

    def __init__(self, *answers: int) -> None:
        self._answers = list(answers)
        self.asked: list[int] = []

    def __call__(self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: int) -> int:
        self.asked.append(size.value)
        assert flags == 1
        answer = self._answers.pop(0)
        if answer < 0:
            ctypes.set_errno(-answer)
            return -1
        assert address.value is not None
        ctypes.memset(address.value, len(self.asked), answer)
        return answer


@pytest.fixture
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeKernel]:
    def make(*answers: int) -> FakeKernel:
        kernel = FakeKernel(*answers)
        monkeypatch.setattr(rng_module._libc, "getrandom", kernel)
        return kernel

    return make


def test_interrupted_reads_go_on(fake_kernel: Callable[..., FakeKernel]) -> None:
    kernel = fake_kernel(-errno.EINTR, 3, -errno.EINTR, 1, 4)
    buffer = bytearray(8)
    KernelEntropy().read_into(memoryview(buffer))
    assert kernel.asked == [8, 8, 5, 5, 4]
    assert buffer == bytes([2, 2, 2, 4, 5, 5, 5, 5])


@pytest.mark.parametrize(("answer", "number"), [(-11, errno.EAGAIN), (-1, errno.EPERM), (0, 5)])
def test_kernel_that_gives_too_little_is_an_error(
    fake_kernel: Callable[..., FakeKernel], answer: int, number: int
) -> None:
    fake_kernel(100, answer)
    error = fails(Rng(), f"{TOO_LITTLE}: {os.strerror(number)}")
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == number


@pytest.mark.parametrize("size_bytes", [0, 1, 255, 1 << 20])
def test_kernel_fills_all_of_a_buffer_and_no_more(size_bytes: int) -> None:
    buffer = bytearray(size_bytes + 32)
    KernelEntropy().read_into(memoryview(buffer)[16 : size_bytes + 16])
    assert not any(buffer[:16])
    assert not any(buffer[-16:])
    words = np.frombuffer(buffer[16:-16], np.uint8)[: size_bytes // 16 * 16].reshape(-1, 16)
    assert words.any(axis=1).all()


# --- buffers ----------------------------------------------------------------------------------


def test_buffer_of_any_contiguous_layout_is_filled() -> None:
    words = array.array("Q", bytes(64))
    Rng().fill(memoryview(words))
    assert all(words)


def test_unfit_buffer_is_refused_untouched() -> None:
    rng = Rng()
    with pytest.raises(TypeError):
        rng.fill(memoryview(bytes(32)))
    buffer = bytearray(b"\xa5" * 64)
    with pytest.raises(TypeError):
        rng.fill(memoryview(buffer)[::2])
    assert buffer == b"\xa5" * 64


@pytest.mark.parametrize(
    "source",
    [None, Endless(itertools.repeat(0)), Failing(OSError())],
    ids=["good", "stuck", "failing"],
)
def test_mapping_can_be_closed_after_a_request_however_it_ended(
    source: EntropySource | None,
) -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    error = None
    with memoryview(memory) as view:
        try:
            Rng(source).fill(view)
        except EntropyError as caught:
            error = caught  # its traceback lives on
    assert (error is None) == (source is None)
    memory.close()


def test_mapping_can_be_closed_after_the_kernel_failed(
    fake_kernel: Callable[..., FakeKernel],
) -> None:
    fake_kernel(-errno.EPERM)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    with memoryview(memory) as view, pytest.raises(OSError, match="not permitted") as caught:
        KernelEntropy().read_into(view)
    assert caught.value.__traceback__ is not None
    memory.close()


# --- what is left of a key --------------------------------------------------------------------


def reachable(root: object) -> list[object]:
    """All that an object of ours holds, directly or not."""
    found, todo = [], [root]
    while todo:
        one = todo.pop()
        found.append(one)
        if type(one).__module__ == rng_module.__name__:
            todo += [held for held in gc.get_referents(one) if not isinstance(held, type)]
    return found


@pytest.mark.parametrize("size_bytes", [32, 64, APT_WINDOW - 1, APT_WINDOW])
def test_nothing_of_a_key_is_remembered(size_bytes: int) -> None:
    # Key bytes, and only these, are 128 or above.
    key = bytes(0x80 | index % 128 for index in range(size_bytes))
    rest = bytes(index % 97 for index in range(drawn(size_bytes) - size_bytes))
    rng = Rng(Script(bytes(index % 97 for index in range(START_UP_SAMPLES)), key, rest))
    assert fill(rng, size_bytes) == key
    # Without the script, which has them all.
    held = [one for one in reachable(rng) if isinstance(one, int)]
    assert held
    assert all(one < 128 for one in held)


def test_health_tests_on_their_own_do_remember() -> None:
    """The control for the test above."""
    tests = HealthTests()
    check(tests, b"\x01\x81")
    assert 0x81 in reachable(tests)
    check(tests, b"\x82" * 3 + walk(APT_WINDOW - 5))
    assert 0x82 not in reachable(tests)


@pytest.mark.parametrize("good", [0, START_UP_SAMPLES, START_UP_SAMPLES + 100])
def test_no_variable_in_a_traceback_is_a_sample(good: int) -> None:
    script = Script(walk(good), bytes([0xA5]) * 4096)
    error = fails(Rng(script), REPETITION)
    trace, frames = error.__traceback__, 0
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_globals is vars(rng_module):
            frames += 1
            for value in frame.f_locals.values():
                assert value != 0xA5
                assert not isinstance(value, bytes | bytearray)
                if isinstance(value, memoryview):
                    with suppress(ValueError):  # it is released
                        assert not any(value)
        trace = trace.tb_next
    assert frames >= 3


@pytest.mark.parametrize(
    "act", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"]
)
def test_rng_cannot_be_pickled_or_copied(act: Callable[[Rng], object]) -> None:
    with pytest.raises(TypeError, match="pickled or copied"):
        act(Rng())


MAKE_A_KEY = """
import ctypes, mmap, sys
from mktme.engine.rng import Rng

memory = mmap.mmap(-1, mmap.PAGESIZE)
with memoryview(memory) as view, view[:64] as key:
    Rng().fill(key)
    copy = bytes(key) if sys.argv[1] == "copy" else None
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


def count_copies(extra: str) -> list[int]:
    """How often each 8 bytes of a key are in the memory of the process that made it."""
    with subprocess.Popen(
        [sys.executable, "-c", MAKE_A_KEY, extra],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        address = int(process.stdout.readline())
        proc = Path(f"/proc/{process.pid}")
        counts = [0] * 8
        with (proc / "mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            key = memory.read(64)
            parts = [key[at : at + 8] for at in range(0, 64, 8)]
            for line in (proc / "maps").read_text().splitlines():
                start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
                if line.split()[1].startswith("rw"):
                    memory.seek(start)
                    data = memory.read(end - start)
                    counts = [
                        count + data.count(part) for count, part in zip(counts, parts, strict=True)
                    ]
        assert process.stdin is not None
        process.stdin.close()
    return counts


def test_key_is_in_memory_once() -> None:
    assert count_copies("none") == [1] * 8


def test_second_copy_of_a_key_would_be_found() -> None:
    """The control for the test above."""
    assert min(count_copies("copy")) >= 2
