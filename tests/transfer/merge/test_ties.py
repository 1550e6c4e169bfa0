"""TIES against a loop over entries."""

import numpy as np
import pytest

from qwen3_next.transfer.merge.task_arithmetic import merge_task_arithmetic
from qwen3_next.transfer.merge.ties import agreed, merge_ties, trim
from tests.support.merge_models import (
    assert_same_function,
    assert_weights,
    base,
    bits_of,
    changed,
    refused,
    weights_of,
    with_noise,
)


def ties(start, others, weights, densities, normalize=True, scale=1.0):
    """Entry by entry, in float64."""
    deltas = [(other - start).ravel().tolist() for other in others]
    kept = []
    for delta, density in zip(deltas, densities):
        count = max(1, round(density * len(delta)))
        places = sorted(range(len(delta)), key=lambda place: -abs(delta[place]))[:count]
        kept.append(set(places))
    result = start.ravel().tolist()
    for place in range(len(result)):
        entries = [d[place] if place in k else 0.0 for d, k in zip(deltas, kept)]
        mass = sum(w * e for w, e in zip(weights, entries))
        agreeing = [(w, e) for w, e in zip(weights, entries) if w * e * mass > 0]
        if agreeing:
            step = sum(w * e for w, e in agreeing)
            step /= sum(w for w, _ in agreeing) if normalize else 1.0
            result[place] += scale * step
    return np.reshape(result, start.shape)


@pytest.mark.parametrize(
    ("weights", "density", "options"),
    [
        ((1, 1), 0.2, {}),
        ((1, 0.5, 2), 0.3, {}),
        ((1, 0.5, 2), [0.3, 0.6, 1], {"scale": 0.7}),
        ((1, 1, 0), 0.5, {"normalize": False}),
    ],
)
def test_every_entry_is_the_mean_of_those_that_agree(weights, density, options):
    models = [changed(seed) for seed in range(len(weights))]
    each = density if isinstance(density, list) else [density] * len(weights)
    start, others = weights_of(base()), [weights_of(model) for model in models]
    expected = {
        path: ties(start[path], [o[path] for o in others], weights, each, **options)
        for path in start
    }
    assert_weights(merge_ties(base(), models, weights, density, **options), expected)


def test_one_model_of_density_1_is_that_model():
    merged = merge_ties(base(), [changed(1)], [1], 1)
    assert_weights(merged, weights_of(changed(1)))
    assert_same_function(merged, changed(1))


def test_the_order_of_models_does_not_matter():
    there = merge_ties(base(), [changed(1), changed(2), changed(3)], [1, 2, 3], [0.2, 0.4, 0.6])
    back = merge_ties(base(), [changed(3), changed(1), changed(2)], [3, 1, 2], [0.6, 0.2, 0.4])
    assert_weights(there, weights_of(back))


def test_equal_models_are_one_model():
    once = merge_ties(base(), [changed(1)], [1], 0.3)
    assert_weights(merge_ties(base(), [changed(1)] * 3, [1, 2, 5], 0.3), weights_of(once))


@pytest.mark.parametrize(("density", "count"), [(0.1, 1), (0.25, 2), (0.5, 4), (0.99, 8), (1, 8)])
def test_as_many_entries_are_kept_as_the_density_says(density, count):
    delta = np.array([[3, -1, 2, -2], [2, 0.5, -2, 1]], "float32")
    full = delta.copy()
    trim(delta, density)
    order = [0, 2, 3, 4, 6, 1, 7, 5]  # of equal magnitudes the first ones
    assert np.flatnonzero(delta).tolist() == sorted(order[:count])
    np.testing.assert_array_equal(delta[delta != 0], full[delta != 0])


def test_the_sign_is_that_of_the_larger_mass_not_of_the_majority():
    deltas = [np.array([x], "float32") for x in (-1.0, -1.0, 5.0)]
    assert agreed(deltas, [1, 1, 1], True) == 5.0
    assert agreed(deltas, [4, 2, 1], True) == -1.0


def test_masses_that_cancel_leave_the_base():
    deltas = [np.array([x], "float32") for x in (1.0, -1.0)]
    assert agreed(deltas, [1, 1], True) == 0.0


def test_density_by_part():
    density = {"attention": 1, "*": 0.01}
    found = weights_of(merge_ties(base(), [changed(1)], [1], density))
    start, other = weights_of(base()), weights_of(changed(1))
    path = "model/layers_1/self_attn/k_proj/kernel"
    np.testing.assert_allclose(found[path], other[path], atol=1e-6)
    path = "model/layers_1/mlp/up_proj/kernel"
    assert np.count_nonzero(found[path] != start[path]) == round(0.01 * start[path].size)


def test_without_disagreement_it_is_task_arithmetic():
    expected = weights_of(merge_task_arithmetic(base(), [changed(1)], [0.5]))
    assert_weights(merge_ties(base(), [changed(1)], [0.5], 1, normalize=False), expected)


def test_the_models_stay_as_they_are():
    models = [with_noise(base(), seed) for seed in (5, 6, 7)]
    before = [bits_of(model) for model in models]
    merge_ties(models[0], models[1:], [1, 1], 0.2)
    assert [bits_of(model) for model in models] == before


@pytest.mark.parametrize(
    ("weights", "density", "options", "word"),
    [
        ([1, -1], 0.5, {}, "weights[1]=-1"),
        ([1, 1], 0, {}, "density[0]=0"),
        ([1, 1], 1.5, {}, "density[0]=1.5"),
        ([1, 1], [0.5], {}, "density"),
        ([1, 1], None, {}, "density[0]=None"),
        ([1, 1], {"mlp": 0.5}, {}, "density[0]"),
        ([1, 1], 0.5, {"normalize": None}, "normalize=None"),
        ([1, 1], 0.5, {"scale": None}, "scale=None"),
        ([1], 0.5, {}, "each of 2 models"),
    ],
)
def test_wrong_arguments_are_refused(weights, density, options, word):
    models = [changed(1), changed(2)]
    refused(lambda: merge_ties(base(), models, weights, density, **options), word)
