"""Adaptive Computation Time: sums, weights and exits against their definition."""

import keras
import numpy as np
import pytest

from qwen3_next.layers import HaltingUnit
from tests.support.running import assert_close, run, to_numpy

RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(4, 2, 5, 3)).astype("float32")  # k, B, T, D


def halted(probabilities, threshold=0.9, real=None):
    """`Halting` after as many iterations as there are probabilities `(k, B, T)`."""
    unit = HaltingUnit(threshold)
    real = np.ones(probabilities.shape[1:], bool) if real is None else real

    def think(probabilities, states, real):
        halting = unit.start(real, states[0])
        for number, (p, state) in enumerate(zip(probabilities, states), start=1):
            halting = unit.advance(halting, p, state, number == len(probabilities))
        return halting

    states = tuple(STATES[: len(probabilities)])
    return run(think, tuple(probabilities.astype("float32")), states, real)


def by_hand(probabilities, threshold):
    """Depth, remainder and mean state of every token, one at a time."""
    count, batch, length = probabilities.shape
    depth, rest = np.zeros((batch, length), int), np.zeros((batch, length))
    mean = np.zeros((batch, length, STATES.shape[-1]))
    for place in np.ndindex(batch, length):
        p = probabilities[(slice(None), *place)]
        stop = next((n for n in range(1, count) if p[:n].sum() >= threshold), count)
        depth[place], rest[place] = stop, 1 - p[: stop - 1].sum()
        weights = [*p[: stop - 1], rest[place]]
        mean[place] = sum(w * STATES[(n, *place)] for n, w in enumerate(weights))
    return depth, rest, mean


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
def test_states_weigh_their_probabilities_and_the_last_one_the_rest(threshold):
    probabilities = RNG.uniform(0, 0.8, (4, 2, 5))
    found, (depth, rest, mean) = halted(probabilities, threshold), by_hand(probabilities, threshold)
    np.testing.assert_array_equal(found.iterations, depth)
    assert len(set(depth.flat)) > 1
    assert_close(found.remainder, rest, 1e-6)
    assert_close(found.mean, mean, 1e-6)


def test_a_sum_that_equals_the_threshold_halts():
    halting = halted(np.full((4, 2, 5), 0.25), threshold=0.5)
    assert (halting.iterations == 2).all()


def test_the_last_iteration_is_run():
    assert (halted(np.zeros((4, 2, 5))).iterations == 4).all()


@pytest.mark.parametrize("probability, last", [(1.0, 0), (0.0, 3)])
def test_the_mean_of_a_saturated_unit_is_its_last_state(probability, last):
    halting = halted(np.full((4, 2, 5), probability))
    np.testing.assert_array_equal(halting.mean, STATES[last])


def test_padding_does_not_think():
    real = np.arange(5) < np.array([[3], [5]])
    halting = halted(np.full((4, 2, 5), 0.1), real=real)
    np.testing.assert_array_equal(halting.iterations, np.where(real, 4, 0))


def test_probabilities_are_float32_under_every_policy():
    unit = HaltingUnit(dtype="bfloat16")
    p = unit(keras.ops.ones((1, 3, 8), "bfloat16"))
    assert keras.backend.standardize_dtype(p.dtype) == "float32"
    assert keras.backend.standardize_dtype(unit.score.kernel.dtype) == "float32"
    np.testing.assert_allclose(to_numpy(p), 0.5, atol=0.2)


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="confidence_threshold"):
        HaltingUnit(threshold)
