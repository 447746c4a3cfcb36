# SPDX-License-Identifier: GPL-2.0-or-later
"""What random bytes look like, against published values, other formulas and random bytes."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from mktme.dump.randomness import chi_square, chi_square_p, entropy, entropy_of_random


def test_entropy_of_one_and_two_bytes_by_hand() -> None:
    """One byte has none; two have one bit each, unless they are equal, which is one case in 256."""
    assert entropy_of_random(1).mean == pytest.approx(0, abs=1e-12)
    assert entropy_of_random(1).deviation == pytest.approx(0, abs=1e-5)
    two = entropy_of_random(2)
    assert two.mean == pytest.approx(255 / 256)
    assert two.deviation == pytest.approx(math.sqrt(255 / 256 * 1 / 256))


@pytest.mark.parametrize("size", [64, 1024, 4096])
def test_entropy_of_random_bytes(size: int) -> None:
    """Within five deviations of the mean of 4000 samples."""
    samples = 4000
    data = np.random.default_rng(1).integers(0, 256, (samples, size), dtype=np.uint8)
    found = np.array([entropy(np.bincount(row, minlength=256).tolist()) for row in data])
    expected = entropy_of_random(size)
    assert found.mean() == pytest.approx(
        expected.mean, abs=5 * expected.deviation / math.sqrt(samples)
    )
    assert found.std() == pytest.approx(expected.deviation, rel=0.06)


def test_entropy_of_a_random_page() -> None:
    page = entropy_of_random(4096)
    assert page.mean == pytest.approx(7.9546, abs=5e-5)
    # Miller's term alone; the next one is (1 - 256^2) / (12 n^2 ln 2).
    n = 4096
    miller = 8 - 255 / (2 * n * math.log(2))
    assert page.mean == pytest.approx(miller - (256**2 - 1) / (12 * n**2 * math.log(2)), abs=5e-5)


def test_exact_sum_meets_its_limit() -> None:
    below, above = entropy_of_random((1 << 20) - 1), entropy_of_random(1 << 20)
    assert below.mean == pytest.approx(above.mean, abs=1e-7)
    assert below.deviation == pytest.approx(above.deviation, rel=1e-3)


def test_entropy_of_histograms() -> None:
    assert entropy([0] * 256) == 0
    assert entropy([4096] + [0] * 255) == 0
    assert entropy([1] * 256) == 8
    assert entropy([1, 1] + [0] * 254) == 1
    text = b"mississippi"
    counts = Counter(text)
    by_hand = -sum(n / 11 * math.log2(n / 11) for n in counts.values())
    assert entropy([counts[value] for value in range(256)]) == pytest.approx(by_hand)


def test_chi_square_by_hand() -> None:
    assert chi_square([7] * 256) == 0
    assert chi_square([256] + [0] * 255) == pytest.approx(255**2 + 255)
    counts = [random.Random(3).randrange(100) for _ in range(256)]
    each = sum(counts) / 256
    assert chi_square(counts) == pytest.approx(sum((c - each) ** 2 / each for c in counts))
    with pytest.raises(ValueError, match="nothing"):
        chi_square([0] * 256)


@pytest.mark.parametrize(
    ("degrees", "value", "p"),
    [
        # Abramowitz and Stegun, table 26.8.
        (1, 3.84146, 0.05),
        (3, 7.81473, 0.05),
        (5, 15.0863, 0.01),
        (15, 37.6973, 0.001),
        (29, 42.5569, 0.05),
        # NIST/SEMATECH e-handbook, 1.3.6.7.4 (99 degrees).
        (99, 123.225, 0.05),
        (99, 134.642, 0.01),
    ],
)
def test_p_values_of_tables(degrees: int, value: float, p: float) -> None:
    assert chi_square_p(value, degrees) == pytest.approx(p, rel=2e-4)


@pytest.mark.parametrize("value", [1.0, 150.0, 255.0, 300.0, 400.0, 700.0])
def test_p_value_is_the_integral_of_the_density(value: float) -> None:
    """Simpson's rule over the tail of the density with 255 degrees of freedom."""
    half = 255 / 2
    x = np.linspace(value, value + 1500, 30001)
    density = np.exp((half - 1) * np.log(x) - x / 2 - half * math.log(2) - math.lgamma(half))
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = float(density @ weights) * (x[1] - x[0]) / 3
    assert chi_square_p(value) == pytest.approx(integral, rel=1e-6)


def test_p_value_of_extremes() -> None:
    assert chi_square_p(0) == 1
    assert chi_square_p(1e-9) == pytest.approx(1)
    assert chi_square_p(1e7) == 0
    for value, degrees in ((-1.0, 255), (1.0, 254), (1.0, 0)):
        with pytest.raises(ValueError, match="degrees of freedom"):
            chi_square_p(value, degrees)


def test_p_values_of_random_bytes_are_spread_evenly() -> None:
    rng = np.random.default_rng(2)
    found = sorted(
        chi_square_p(chi_square(np.bincount(rng.integers(0, 256, 8192), minlength=256).tolist()))
        for _ in range(400)
    )
    # Kolmogorov-Smirnov, p = 0.001.
    assert max(abs((at + 0.5) / 400 - p) for at, p in enumerate(found)) < 1.95 / math.sqrt(400)
