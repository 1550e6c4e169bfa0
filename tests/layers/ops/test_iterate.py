"""A loop with a computed number of steps, forward and backward."""

import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops.backend.iterate import iterate
from qwen3_next.layers.ops.backend.seeds import folded
from tests.support.running import MODES, gradients, run, to_numpy

X = np.array([0.5, -1.5], "float32")


def powers(x, count):
    """x, x a, x a^2, ... with a = 1.5: `count` steps of the 4 there is room for."""
    return iterate(lambda i, state: state * 1.5, x, count, 4)


def three_powers(x):
    return iterate(lambda i, state: state * 1.5, x, 3, 3)


def below(x):
    """Steps until the sum of squares reaches 10, and how many they were."""
    start = (x, ops.zeros((), "int32"))
    return iterate(
        lambda i, state: (state[0] * 1.5, i + 1), start, 9, 9, lambda s: ops.sum(s[0] ** 2) < 10
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_computed_number_of_steps_runs_and_differentiates(mode, count):
    count = np.int32(count)
    np.testing.assert_allclose(run(powers, X, count, mode=mode), X * 1.5**count, rtol=1e-6)
    slope, _ = gradients(powers, [X, count], np.ones(2, "float32"), mode)
    np.testing.assert_allclose(slope, np.full(2, 1.5**count), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_fixed_number_of_steps_runs_and_differentiates(mode):
    (slope,) = gradients(three_powers, [X], np.ones(2, "float32"), mode)
    np.testing.assert_allclose(run(three_powers, X, mode=mode), X * 1.5**3, rtol=1e-6)
    np.testing.assert_allclose(slope, np.full(2, 1.5**3), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_ends_when_nothing_is_going(mode):
    state, steps = run(below, X, mode=mode)
    assert steps == 2  # the sum of squares is 2.5, 5.6 and 12.7
    np.testing.assert_allclose(state, X * 1.5**steps, rtol=1e-6)


def test_folded_seeds_differ_by_number_and_zero_keeps_them():
    seeds = (ops.convert_to_tensor(np.array([3, 4], "uint32")), None)
    found = [to_numpy(folded(seeds, number)) for number in range(4)]
    np.testing.assert_array_equal(found[0][0], [3, 4])
    assert len({tuple(seed) for seed, _ in found}) == 4
    assert all(nothing is None for _, nothing in found)
