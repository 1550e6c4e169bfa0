"""A (forward, backward) pair is differentiated in every way, whichever came before."""

import numpy as np
from keras import ops

from qwen3_next.layers.ops.backend.autodiff import custom_gradient
from qwen3_next.layers.ops.backend.loops import scan
from tests.support.running import MODES, assert_close, gradients

X = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
COTANGENT = np.random.default_rng(1).normal(size=(5, 3)).astype("float32")


def forward(x):
    def step(carry, xs):
        return (carry[0] + xs[0],), (carry[0] + xs[0],)

    _, (sums,) = scan(step, (ops.zeros_like(x[0]),), (x,), (ops.zeros_like(x),))
    return sums**2, sums


def backward(sums, d_squares):
    return (ops.flip(ops.cumsum(ops.flip(2 * sums * d_squares, 0), 0), 0),)


squares_of_sums = custom_gradient(forward, backward)


def test_gradients_are_the_same_eagerly_after_a_program():
    sums = np.cumsum(np.float64(X), axis=0)
    expected = np.cumsum((2 * sums * COTANGENT)[::-1], axis=0)[::-1]
    for mode in (*reversed(MODES), *MODES):
        (found,) = gradients(squares_of_sums, (X,), COTANGENT, mode=mode)
        assert_close(found, expected, 1e-6)
