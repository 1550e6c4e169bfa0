"""DARE: which entries are dropped, what becomes of the rest, and how they are merged."""

import numpy as np
import pytest

from qwen3_next.transfer.merge.dare import drop, merge_dare, random_stream
from qwen3_next.transfer.merge.task_arithmetic import merge_task_arithmetic
from qwen3_next.transfer.merge.ties import merge_ties
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

LARGE = "model/layers_0/mlp/experts/gate_up"


def kept(seed, path, place, shape, density):
    """The entries that stay: part of the contract, as the seed is."""
    return random_stream(seed, path, place).random(shape, "float32") < density


def dropped(start, others, path, densities, seed, rescale):
    for place, (other, density) in enumerate(zip(others, densities)):
        delta = other[path] - start[path]
        mask = (
            np.ones_like(delta) if density == 1 else kept(seed, path, place, delta.shape, density)
        )
        yield delta * mask / (density if rescale else 1.0)


@pytest.mark.parametrize("rescale", [True, False])
def test_what_is_kept_is_rescaled_and_summed(rescale):
    models, weights, densities = [changed(1), changed(2)], (0.7, -0.4), [0.3, 0.6]
    start, others = weights_of(base()), [weights_of(model) for model in models]
    expected = {}
    for path in start:
        deltas = dropped(start, others, path, densities, 5, rescale)
        expected[path] = start[path] + 0.5 * sum(w * d for w, d in zip(weights, deltas))
    merged = merge_dare(base(), models, weights, densities, rescale=rescale, scale=0.5, seed=5)
    assert_weights(merged, expected)


@pytest.mark.parametrize("normalize", [None, True, False])
def test_what_is_kept_elects_its_sign(normalize):
    models, weights = [changed(1), changed(2), changed(3)], (1.0, 0.5, 2.0)
    start, others = weights_of(base()), [weights_of(model) for model in models]
    expected = {}
    for path in start:
        deltas = list(dropped(start, others, path, [0.5] * 3, 0, True))
        mass = sum(w * d for w, d in zip(weights, deltas))
        agree = [w * (d * mass > 0) for w, d in zip(weights, deltas)]
        step = sum(a * d for a, d in zip(agree, deltas))
        if normalize is not False:
            step = step / np.maximum(sum(agree), 1e-30)
        expected[path] = start[path] + step
    merged = merge_dare(base(), models, weights, 0.5, combine="ties", normalize=normalize)
    assert_weights(merged, expected)


def test_density_1_is_the_method_without_dropping():
    models, weights = [changed(1), changed(2)], [0.5, 0.25]
    linear = merge_dare(base(), models, weights, 1)
    assert bits_of(linear) == bits_of(merge_task_arithmetic(base(), models, weights))
    mean = merge_dare(base(), models, weights, 1, normalize=True)
    assert bits_of(mean) == bits_of(merge_task_arithmetic(base(), models, weights, True))
    elected = merge_dare(base(), models, weights, 1, combine="ties")
    assert bits_of(elected) == bits_of(merge_ties(base(), models, weights, 1))
    assert_same_function(merge_dare(base(), models[:1], [1], 1), models[0])


def test_a_seed_gives_the_same_entries_and_another_seed_others():
    one, same, other = (merge_dare(base(), [changed(1)], [1], 0.5, seed=seed) for seed in (3, 3, 4))
    assert bits_of(one) == bits_of(same)
    assert all(bits_of(one)[path] != bits_of(other)[path] for path in (LARGE, "lm_head/kernel"))


def test_entries_depend_on_nothing_but_seed_path_and_place():
    mask = kept(7, "model/norm/weight", 1, (12,), 0.5)
    assert np.flatnonzero(mask).tolist() == [1, 2, 4, 5, 8]


def test_models_and_weights_drop_entries_of_their_own():
    masks = [kept(0, path, place, (1000,), 0.5) for path in ("a", "b") for place in (0, 1)]
    for i, mask in enumerate(masks):
        assert 440 < mask.sum() < 560
        assert all(440 < (mask == other).sum() < 560 for other in masks[:i])


def test_the_expectation_is_the_task_vector():
    delta = np.full(200_000, 2.0, "float32")
    drop(delta, 0.1, True, np.random.default_rng(0))
    assert set(np.unique(delta)) == {np.float32(0), np.float32(20)}
    np.testing.assert_allclose(delta.mean(), 2.0, rtol=0.02)


def test_the_models_stay_as_they_are():
    models = [with_noise(base(), seed) for seed in (5, 6)]
    before = [bits_of(model) for model in models]
    merge_dare(models[0], models[1:], [1], 0.2)
    assert [bits_of(model) for model in models] == before


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"density": 0}, "density[0]=0"),
        ({"density": 2}, "density[0]=2"),
        ({"rescale": "yes"}, "rescale='yes'"),
        ({"combine": "mean"}, "combine='mean'"),
        ({"normalize": 0}, "normalize=0"),
        ({"scale": "1"}, "scale='1'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"weights": [-1], "combine": "ties"}, "weights[0]=-1"),
        ({"weights": [-1], "normalize": True}, "sum above 0"),
    ],
)
def test_wrong_arguments_are_refused(options, word):
    arguments = {"weights": [1], "density": 0.5, **options}
    refused(lambda: merge_dare(base(), [changed(1)], **arguments), word)
