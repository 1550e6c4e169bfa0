"""Means of directions on the unit sphere, as coefficients of the vectors they lie between.

    slerp     c = (sin((1 - t) theta), sin(t theta)) / sin(theta),    theta the angle of two vectors
    Karcher   c with  sum_i w_i log_u(v_i / |v_i|) = 0  at  u = sum_i c_i v_i / |v_i|,  |u| = 1

A mean lies in the span of the vectors, so their dot products are all there is to know of them.
The merged tensor is sum_i c_i v_i of the vectors with their lengths. Float64.
"""

from collections.abc import Sequence

import numpy as np

# Radians. Closer than that a chord is the arc to float32, and opposite vectors have no one arc.
PARALLEL = 1e-4
CHUNK = 2**20
STEPS, STILL = 1000, 1e-10


def cosines(vectors: Sequence[np.ndarray]) -> np.ndarray | None:
    """Cosines `(N, N)` of the angles between N arrays; `None` if one of them is zero."""
    count = len(vectors)
    products = np.zeros((count, count))
    flat = [vector.reshape(-1) for vector in vectors]
    for start in range(0, flat[0].size, CHUNK):
        # Float64 one chunk at a time: float32 sums would lose the small angles.
        part = np.stack([vector[start : start + CHUNK] for vector in flat]).astype(np.float64)
        products += part @ part.T
    lengths = np.sqrt(np.diag(products))
    if not lengths.all():
        return None
    found = np.clip(products / np.outer(lengths, lengths), -1.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


def slerp_coefficients(cosine: float, t: float) -> tuple[float, float]:
    """Coefficients of two vectors at the fraction `t` of the arc between their directions."""
    theta = float(np.arccos(cosine))
    if np.sin(theta) < PARALLEL:
        return 1.0 - t, t
    return float(np.sin((1.0 - t) * theta) / np.sin(theta)), float(
        np.sin(t * theta) / np.sin(theta)
    )


def karcher_coefficients(cosine: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Coefficients `(N,)` of the weighted Karcher mean of N directions.

    Descent from the normalised weighted sum, with two vectors one step to the slerp. The weights
    themselves where the directions cancel out or one is opposite to the mean.

    Args:
        cosine: Cosines `(N, N)` between the directions.
        weights: N numbers of at least 0 with the sum 1.
    """
    w = np.asarray(weights, np.float64)
    if np.count_nonzero(w) == 1:
        return w
    length = np.sqrt(max(w @ cosine @ w, 0.0))
    if length < PARALLEL:
        return w
    c = w / length
    for _ in range(STEPS):
        theta = np.arccos(np.clip(cosine @ c, -1.0, 1.0))  # (N,), angles to the mean
        if (theta[w > 0] > np.pi - PARALLEL).any():
            return w
        # log_u(v) = theta / sin(theta) (v - cos(theta) u)
        pull = w / np.sinc(theta / np.pi)
        pull[w == 0] = 0.0
        step = pull - (pull @ np.cos(theta)) * c
        size = np.sqrt(max(step @ cosine @ step, 0.0))
        if size < STILL:
            break
        c = np.cos(size) * c + np.sinc(size / np.pi) * step
        c /= np.sqrt(c @ cosine @ c)
    return c
