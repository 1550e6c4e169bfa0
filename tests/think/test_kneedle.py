"""Kneedle finds the knees that calculus finds, and none where there are none."""

import numpy as np
import pytest

from qwen3_next.think.kneedle import kneedle

POINTS = 401


def exponential(rate):
    """exp(-a x) on [0, 1] and the place where its chord is parallel to it."""
    x = np.linspace(0.0, 1.0, POINTS)
    return np.exp(-rate * x), np.log(rate / (1.0 - np.exp(-rate))) / rate


def hyperbola(end):
    """1 / x on [1, b]: the chord is parallel at sqrt(b)."""
    return 1.0 / np.linspace(1.0, end, POINTS), (np.sqrt(end) - 1.0) / (end - 1.0)


CURVES = [exponential(3), exponential(10), hyperbola(5), hyperbola(100)]


@pytest.mark.parametrize(("curve", "knee"), CURVES)
def test_the_knee_is_where_calculus_finds_it(curve, knee):
    found = kneedle(curve)
    assert abs(found / (POINTS - 1) - knee) <= 1.0 / (POINTS - 1)
    assert kneedle(3.0 * curve + 2.0) == found


@pytest.mark.parametrize(
    ("curve", "front", "back"),
    [
        ([6, 4, 2, 2, 2, 2, 2, 2], 2, None),
        ([2, 2, 2, 2, 2, 2, 4, 6], None, 2),
        ([9, 5, 1, 1, 1, 1, 1, 6], 2, 1),
        ([9, 4, 3, 2.5, 2, 2, 2, 2, 5, 8], 2, 2),
    ],
)
def test_both_ends_of_a_curve_have_their_own_knee(curve, front, back):
    assert kneedle(curve) == front
    assert kneedle(curve[::-1]) == back


@pytest.mark.parametrize(
    "curve", [[1.0], [2.0, 1.0], [1.0] * 9, np.linspace(1, 0, 9), 1 - np.linspace(0, 1, 30) ** 2]
)
def test_flat_straight_and_concave_curves_have_no_knee(curve):
    assert kneedle(curve) is None


@pytest.mark.parametrize("points", range(4, 20))
def test_a_curve_that_ends_on_the_threshold_has_no_knee(points):
    assert kneedle([*np.linspace(3, 1, points - 1), 1.0]) is None


def test_sensitivity_passes_over_weak_knees():
    curve = [9, 6, 6, 3, 0, 0, 0, 0, 0]
    assert kneedle(curve, sensitivity=0.5) == 1
    assert kneedle(curve, sensitivity=1.0) == 4
    assert kneedle(curve, sensitivity=9.0) is None
