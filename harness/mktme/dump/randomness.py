# SPDX-License-Identifier: GPL-2.0-or-later
"""What random bytes look like: the figures that ciphertext is held against.

Nothing here is simulated or fitted: each is the closed form of a distribution of n independent
bytes, each of 256 values with the same probability.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

SYMBOLS: Final = 256
DEGREES_OF_FREEDOM: Final = SYMBOLS - 1


@dataclass(frozen=True, slots=True)
class EntropyOfRandom:
    """Entropy of the byte histogram of n random bytes, in bits per byte: mean and deviation."""

    mean: float
    deviation: float


@functools.lru_cache(maxsize=256)
def entropy_of_random(size_bytes: int) -> EntropyOfRandom:
    """What entropy n random bytes have: less than 8, as some values come more often by chance.

    The entropy of a histogram is 8 - sum(g(c)) / n over its 256 counts c, where with m = n / 256
    g(c) = c log2(c / m) - (c - m) / ln 2. (The second term adds up to nothing, and keeps g small.)
    Each count is binomial, any two are trinomial, so mean and variance are finite sums; they are
    computed over the counts that have any weight. The bias's leading term is the familiar
    (256 - 1) / (2 n ln 2) (G. A. Miller, "Note on the bias of information estimates", 1955): a page
    has 8 - 0.0449, and with all terms 7.9546, with a deviation of 0.0040.

    Args:
        size_bytes: n, 1 or more. From 1 MiB on, Miller's term, and the deviation of the chi-square
            that 2 n ln 2 (8 - entropy) is then, serve as well: to 10^-8 bits.
    """
    n = size_bytes
    if n >= 1 << 20:
        scale = 2 * n * math.log(2)
        return EntropyOfRandom(
            math.log2(SYMBOLS) - DEGREES_OF_FREEDOM / scale,
            math.sqrt(2 * DEGREES_OF_FREEDOM) / scale,
        )
    p = 1 / SYMBOLS
    spread = math.sqrt(n * p)
    low = max(0, int(n * p - 12 * spread) - 12)
    high = min(n, int(n * p + 12 * spread) + 24)
    counts = np.arange(low, high + 1)
    log_factorial = np.array([math.lgamma(c + 1) for c in range(n + 1)])
    mean_count = n * p
    g = counts * np.log2(np.maximum(counts, 1) / mean_count) - (counts - mean_count) / math.log(2)
    one = np.exp(
        log_factorial[n]
        - log_factorial[counts]
        - log_factorial[n - counts]
        + counts * math.log(p)
        + (n - counts) * math.log1p(-p)
    )
    a, b = counts[:, None], counts[None, :]
    rest = n - a - b
    possible = rest >= 0
    rest = np.maximum(rest, 0)
    two = np.exp(
        log_factorial[n]
        - log_factorial[a]
        - log_factorial[b]
        - log_factorial[rest]
        + (a + b) * math.log(p)
        + rest * math.log1p(-2 * p)
    )
    two[~possible] = 0
    mean = float(one @ g)
    variance = SYMBOLS * float(one @ g**2) + SYMBOLS * (SYMBOLS - 1) * float(g @ two @ g)
    variance -= (SYMBOLS * mean) ** 2
    return EntropyOfRandom(
        math.log2(SYMBOLS) - SYMBOLS * mean / n, math.sqrt(max(0.0, variance)) / n
    )


def entropy(histogram: npt.NDArray[np.uint64] | Sequence[int]) -> float:
    """Bits per byte of a byte histogram, shape (256,); 0 for an empty one."""
    counts = [int(count) for count in histogram if count]
    total = sum(counts)
    if total == 0:
        return 0.0
    return max(0.0, -math.fsum(count / total * math.log2(count / total) for count in counts))


def chi_square(histogram: npt.NDArray[np.uint64] | Sequence[int]) -> float:
    """Pearson's chi-square of a byte histogram, shape (256,), against equal counts.

    Raises:
        ValueError: the histogram is empty.
    """
    counts = [int(count) for count in histogram]
    total = sum(counts)
    if total == 0:
        raise ValueError("a histogram of nothing has no chi-square")
    # Integers until the division: with 2^36 bytes a double would have lost what counts.
    return (SYMBOLS * sum(count * count for count in counts) - total * total) / total


def chi_square_p(value: float, degrees: int = DEGREES_OF_FREEDOM) -> float:
    """Probability that chi-square is `value` or more for random bytes.

    For an odd number of degrees of freedom it is a finite sum: Abramowitz and Stegun,
    "Handbook of Mathematical Functions", 26.4.4.

    Args:
        value: 0 or more.
        degrees: of freedom, odd.

    Raises:
        ValueError: either is something else.
    """
    if value < 0 or degrees < 1 or degrees % 2 == 0:
        raise ValueError(f"chi-square {value} with {degrees} degrees of freedom")
    if value == 0:
        return 1.0
    # The sum's terms are value^(r - 1/2) / (1 * 3 * ... * (2 r - 1)), as logarithms: the first are
    # far below what a double can hold where the last are not.
    log_term = 0.5 * math.log(2 * value / math.pi) - value / 2
    terms = [math.erfc(math.sqrt(value / 2))]
    for r in range(1, (degrees - 1) // 2 + 1):
        terms.append(math.exp(log_term))
        log_term += math.log(value / (2 * r + 1))
    return min(1.0, math.fsum(terms))
