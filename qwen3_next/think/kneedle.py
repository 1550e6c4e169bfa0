"""Kneedle: where a decreasing, convex curve goes from steep to gradual decline.

With n values y_i at equal distances, both axes scaled to [0, 1] and the curve turned over so that
it rises,

    x_i = i / (n - 1)        c_i = (max y - y_i) / (max y - min y)        d_i = c_i - x_i,

a knee is the first local maximum d_i of the difference curve behind which, and before the next
local maximum, some d_j falls below the threshold

    T = d_i - S / (n - 1),

its height less `sensitivity` S times the mean spacing of x. A maximum from which the curve rises
again too early is passed over.

Reference: Satopaa, Albrecht, Irwin, Raghavan, "Finding a Kneedle in a Haystack", 2011.
"""

from collections.abc import Sequence

import numpy as np

ROUNDING = 1e-9  # a straight stretch of the curve ends on the threshold, not below it


def kneedle(y: Sequence[float] | np.ndarray, sensitivity: float = 1.0) -> int | None:
    """The index of the first knee of a curve, or `None` where it has none.

    Args:
        y: `(n,)` finite values.
        sensitivity: S; the larger, the more pronounced a knee must be.
    """
    y = np.asarray(y, np.float64)
    low, high = y.min(), y.max()
    if low == high:
        return None
    x = np.linspace(0.0, 1.0, len(y))
    difference = (high - y) / (high - low) - x
    rises = np.diff(difference)
    maxima = 1 + np.flatnonzero((rises[:-1] > 0) & (rises[1:] <= 0))
    thresholds = difference[maxima] - sensitivity * x[1] - ROUNDING
    for maximum, following, threshold in zip(maxima, [*maxima[1:], len(y)], thresholds):
        if (difference[maximum:following] < threshold).any():
            return int(maximum)
    return None
