# SPDX-License-Identifier: GPL-2.0-or-later
"""The processor's random number generator, which makes the keys that nobody else sees.

A model of the DRNG (Intel Digital Random Number Generator Software Implementation Guide, revision
2.1, section 3): a noise source, tests of its health when it starts and for as long as it runs,
conditioning, and no output at all when a test fails. The tests are those of NIST SP 800-90B: the
repetition count test (section 4.4.1) and the adaptive proportion test (4.4.2), at start-up and
continuously (4.3).

The kernel's random numbers are the noise source, and samples that passed the tests are the output
as they are. The kernel conditions its noise already (BLAKE2s, then ChaCha20 with key erasure:
Linux drivers/char/random.c); to hash its output again would add no entropy, and would leave copies
of keys in the hash's memory. So samples are tested in the buffer in which they are delivered, and
what the tests can find is what breaks on the way to it: a source that is stuck, repeats, or gives
too little. No test can tell good random numbers from an attacker's.

The tests claim H = 8 bits of min-entropy per sample, a byte: what a CSPRNG gives, and what makes
the strictest cutoffs. With alpha = 2^-40, the smallest that SP 800-90B recommends, a good source
fails about once in 2^31 requests of up to 511 bytes, nearly always in the repetition count test.
(SP 800-90B's cutoff of the other test does not allow for a window's first sample always equalling
itself: a good window fails it with probability 2^-37.6.)
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
from typing import Final, NoReturn, Protocol

from mktme.engine.errors import EngineError

ENTROPY_BITS: Final = 8
"""H: the min-entropy claimed for each sample."""
ALPHA_BITS: Final = 40
"""-log2(alpha), alpha the probability of a false alarm that the cutoffs are made for."""
APT_WINDOW: Final = 512
"""Samples in a window of the adaptive proportion test (SP 800-90B 4.4.2, non-binary sources)."""
START_UP_SAMPLES: Final = 1024
"""Samples that have to pass before the first output (SP 800-90B 4.3); whole windows."""

_GRND_NONBLOCK: Final = 1  # include/uapi/linux/random.h


class EntropyError(EngineError):
    """The noise source failed its health tests or gave too little; no random bits were given."""


def repetition_count_cutoff(entropy_bits: int, alpha_bits: int) -> int:
    """How many equal samples in a row fail the repetition count test.

    Args:
        entropy_bits: H, min-entropy of a sample.
        alpha_bits: -log2(alpha).

    Returns:
        ``C = 1 + ceil(-log2(alpha) / H)`` (SP 800-90B 4.4.1).
    """
    return 1 - (-alpha_bits // entropy_bits)


def adaptive_proportion_cutoff(entropy_bits: int, alpha_bits: int) -> int:
    """How many samples equal to its first, itself included, fail a window.

    Args:
        entropy_bits: H, min-entropy of a sample.
        alpha_bits: -log2(alpha).

    Returns:
        ``C = 1 + CRITBINOM(W, 2^-H, 1 - alpha)`` (SP 800-90B 4.4.2), exactly: the smallest C for
        which W samples hold C or more of one of probability 2^-H with probability <= alpha.
    """
    # In units of 2^(-H*W), all of these are integers.
    one = 1 << entropy_bits * APT_WINDOW
    others = (1 << entropy_bits) - 1
    cutoff, fewer = 0, 0
    while one - fewer > one >> alpha_bits:
        fewer += math.comb(APT_WINDOW, cutoff) * others ** (APT_WINDOW - cutoff)
        cutoff += 1
    return cutoff


RCT_CUTOFF: Final = repetition_count_cutoff(ENTROPY_BITS, ALPHA_BITS)
"""Equal samples in a row that fail the repetition count test."""
APT_CUTOFF: Final = adaptive_proportion_cutoff(ENTROPY_BITS, ALPHA_BITS)
"""Samples equal to their window's first, itself included, that fail the other test."""

_RCT_FAILED: Final = (
    f"the noise source failed the repetition count test: {RCT_CUTOFF} equal samples in a row "
    "(SP 800-90B 4.4.1)"
)
_APT_FAILED: Final = (
    f"the noise source failed the adaptive proportion test: {APT_CUTOFF} equal samples in a "
    f"window of {APT_WINDOW} (SP 800-90B 4.4.2)"
)
_FAILED_HINT: Final = (
    "a good source fails once in 2^31 keys: try again, and if it fails again, make no keys here"
)


class EntropySource(Protocol):
    """Where raw noise comes from."""

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer with raw noise samples, one byte each.

        Args:
            buffer: writable bytes, all zeros, good for the time of the call only.

        Raises:
            OSError: it cannot fill all of the buffer.
        """


class KernelEntropy:
    """The kernel's random numbers, by getrandom(2).

    The kernel writes straight to the caller's buffer. `os.getrandom` and `os.urandom` would make an
    immutable object, whose memory goes back to the allocator with the key still in it.
    """

    __slots__ = ()

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer; see `EntropySource.read_into`.

        Raises:
            OSError: getrandom(2) failed; EAGAIN when the kernel has too little entropy yet, early
                in its boot. Like the DRNG, this does not wait for more.
        """
        size = len(buffer)
        # The address, not the array: a traceback that keeps the array would keep the buffer from
        # being released or unmapped.
        address = ctypes.addressof((ctypes.c_char * size).from_buffer(buffer))
        done = 0
        while done < size:
            got = _libc.getrandom(
                ctypes.c_void_p(address + done), ctypes.c_size_t(size - done), _GRND_NONBLOCK
            )
            if got > 0:
                done += got  # fewer than asked for when a signal came
                continue
            # 0 is what a seccomp filter can answer in the kernel's place.
            number = ctypes.get_errno() if got < 0 else errno.EIO
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.getrandom.restype = ctypes.c_ssize_t


class HealthTests:
    """The two tests, continuous over the samples of all calls.

    Between calls it holds the last sample, and inside a window the window's first. Both tests start
    anew with a new object, and must after a failure.
    """

    __slots__ = ("_first", "_last", "_left", "_matches", "_run")

    def __init__(self) -> None:
        self._last: int | None = None
        self._run = 0  # samples in a row that equal the last, itself included
        self._first: int | None = None
        self._matches = 0  # samples of this window that equal its first, itself included
        self._left = 0  # samples that this window still lacks

    def check(self, samples: memoryview) -> None:
        """Test the next samples.

        Args:
            samples: unsigned bytes, in the order in which the source gave them.

        Raises:
            EntropyError: a test failed; the message says which, and its cutoff.
        """
        # Raised here, where no local variable is a sample: some tracebacks show variables.
        if failure := self._scan(samples):
            raise EntropyError(failure, hint=_FAILED_HINT)

    def _scan(self, samples: memoryview) -> str | None:
        # A plain loop, because numpy would be hardly faster for a key and would leave arrays made
        # from its bytes. The integers leave nothing: CPython has one object for each byte value.
        last, run = self._last, self._run
        first, matches, left = self._first, self._matches, self._left
        for sample in samples:
            if sample == last:
                run += 1
                if run >= RCT_CUTOFF:
                    return _RCT_FAILED
            else:
                last, run = sample, 1
            if left:
                left -= 1
                if sample == first:
                    matches += 1
                    if matches >= APT_CUTOFF:
                        return _APT_FAILED
            else:
                first, matches, left = sample, 1, APT_WINDOW - 1
        self._last, self._run = last, run
        self._first, self._matches, self._left = first if left else None, matches, left
        return None


class Rng:
    """Makes keys from noise that passed the health tests.

    Single-threaded.

    Args:
        source: the noise source; None for the kernel's random numbers.
    """

    __slots__ = ("_source", "_tests")

    def __init__(self, source: EntropySource | None = None) -> None:
        self._source: EntropySource = KernelEntropy() if source is None else source
        self._tests: HealthTests | None = None  # None: the start-up tests are due

    def fill(self, buffer: memoryview) -> None:
        """Fill a buffer with random bits for a key.

        The first call, and the first after a failure, draws and tests `START_UP_SAMPLES` that
        nobody gets. So a source that recovers is used again, and a broken one never.

        Args:
            buffer: writable, C-contiguous.

        Raises:
            EntropyError: a health test failed or the source gave too little; the buffer is zeros.
            TypeError: the buffer is not as above.
        """
        with buffer.cast("B") as samples:
            # What was there must not pass for the samples of a source that writes nothing.
            _zero(samples)
            try:
                if self._tests is None:
                    self._tests = HealthTests()
                    self._discard(self._tests, START_UP_SAMPLES)
                self._draw(self._tests, samples)
                # To the end of a window, and at least one: so what the tests remember until the
                # next request is no byte of this key, and all windows the key is in have passed.
                self._discard(self._tests, APT_WINDOW - len(samples) % APT_WINDOW)
            except BaseException:
                self._tests = None
                _zero(samples)
                raise

    def _draw(self, tests: HealthTests, samples: memoryview) -> None:
        try:
            self._source.read_into(samples)
        except OSError as error:
            raise EntropyError(
                f"the noise source gave too little: {error.strerror or type(error).__name__}",
                hint="try again; just after boot the kernel may still be collecting entropy",
            ) from error
        tests.check(samples)

    def _discard(self, tests: HealthTests, count: int) -> None:
        """Draw and test samples that nobody gets."""
        samples = memoryview(bytearray(count))
        try:
            self._draw(tests, samples)
        finally:
            _zero(samples)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Rng cannot be pickled or copied: each passes its own start-up tests")


def _zero(buffer: memoryview) -> None:
    buffer[:] = bytes(len(buffer))
