"""Spherical interpolation of two models, and the spherical mean of more."""

import numpy as np
import pytest

from qwen3_next.transfer.merge.karcher import merge_karcher
from qwen3_next.transfer.merge.slerp import merge_slerp
from qwen3_next.transfer.merge.spherical import cosines, karcher_coefficients
from tests.support.merge_models import (
    assert_same_function,
    assert_weights,
    base,
    bits_of,
    changed,
    refused,
    weights_of,
    with_noise,
    with_weights_of,
)


def slerp(a, b, t):
    """By rotating one direction towards the other, in float64; then with the lengths of both."""
    u, v = a.ravel() / np.linalg.norm(a), b.ravel() / np.linalg.norm(b)
    side = v - (u @ v) * u  # orthogonal to u, in the plane of both
    if np.linalg.norm(side) < 1e-6:
        return (1 - t) * a + t * b
    side /= np.linalg.norm(side)
    angle = np.arctan2(v @ side, u @ v)
    middle = np.cos(t * angle) * u + np.sin(t * angle) * side
    parts, *_ = np.linalg.lstsq(np.stack([u, v], 1), middle, rcond=None)
    return parts[0] * a + parts[1] * b


def direction(array):
    return array.ravel() / np.linalg.norm(array)


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_tensors_go_along_the_arc(t):
    first, second = weights_of(base()), weights_of(changed(1))
    expected = {path: slerp(first[path], second[path], t) for path in first}
    assert_weights(merge_slerp(base(), changed(1), t), expected)


def test_the_ends_are_the_models():
    ends = merge_slerp(changed(1), changed(2), 0), merge_slerp(changed(1), changed(2), 1.0)
    assert bits_of(ends[0]) == bits_of(changed(1))
    assert bits_of(ends[1]) == bits_of(changed(2))
    assert_same_function(ends[1], changed(2))


def test_the_middle_does_not_depend_on_the_order():
    there, back = merge_slerp(changed(1), changed(2), 0.3), merge_slerp(changed(2), changed(1), 0.7)
    assert_weights(there, weights_of(back))


def test_parallel_opposite_and_zero_tensors_go_along_the_chord():
    paths = [f"model/layers_1/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")]
    start = weights_of(base())
    other = {path: factor * start[path] for path, factor in zip(paths, (3.0, -2.0, 0.0))}
    expected = {path: 0.75 * start[path] + 0.25 * other[path] for path in paths}
    second = with_weights_of(base(), other)
    mean = merge_karcher([base(), second], [3, 1])
    for merged in (merge_slerp(base(), second, 0.25), mean):
        found = weights_of(merged)
        for path in paths:
            np.testing.assert_allclose(found[path], expected[path], atol=1e-6)


def test_small_angles_keep_their_arc():
    rng = np.random.default_rng(0)
    first, noise = rng.normal(size=(2, 3000))
    pair = [first.astype("float32"), (first + 1e-3 * noise).astype("float32")]
    u, v = (direction(array.astype("float64")) for array in pair)
    angle = 2 * np.arcsin(np.linalg.norm(u - v) / 2)
    np.testing.assert_allclose(np.arccos(cosines(pair)[0, 1]), angle, rtol=1e-8)


def test_t_by_part_path_and_layer():
    t = {"experts": 1, r"layers_1/mlp": 0.0, "deltanet": 0.5, "*": [0.0, 1.0]}
    first, second = weights_of(base()), weights_of(changed(1))
    found = weights_of(merge_slerp(base(), changed(1), t))
    for path, end in {
        "model/layers_0/mlp/experts/down": second,
        "model/layers_1/mlp/down_proj/kernel": first,
        "model/layers_0/mlp/gate/kernel": first,
        "model/embed_tokens/embeddings": first,
        "model/layers_1/self_attn/q_proj/kernel": second,
        "model/norm/weight": second,
        "lm_head/kernel": second,
    }.items():
        np.testing.assert_array_equal(found[path], end[path])
    path = "model/layers_0/linear_attn/A_log"
    np.testing.assert_allclose(found[path], slerp(first[path], second[path], 0.5), atol=1e-6)


def test_the_mean_of_two_is_the_slerp():
    expected = weights_of(merge_slerp(changed(1), changed(2), 0.2))
    assert_weights(merge_karcher([changed(1), changed(2)], [4, 1]), expected)


def test_the_mean_of_three_is_where_their_pulls_cancel():
    models, weights = [base(), changed(1), changed(2)], (1.0, 2.0, 0.5)
    merged = weights_of(merge_karcher(models, weights))
    for path, mean in merged.items():
        directions = [direction(weights_of(model)[path]) for model in models]
        lengths = [np.linalg.norm(weights_of(model)[path]) for model in models]
        solved = np.linalg.lstsq(np.stack(directions, 1) * lengths, mean.ravel(), rcond=None)
        u = direction(sum(c * v for c, v in zip(solved[0], directions)))
        pulls = []
        for weight, v in zip(weights, directions):
            side = v - (u @ v) * u
            angle = np.arctan2(np.linalg.norm(side), u @ v)
            pulls.append(weight * angle * side / max(np.linalg.norm(side), 1e-12))
        assert np.abs(sum(pulls)).max() < 2e-6


def test_the_mean_of_equal_lengths_keeps_the_length():
    vectors = [np.array(v) for v in ([1, 0, 0], [0, 1, 0], [0.6, 0, 0.8])]
    c = karcher_coefficients(cosines(vectors), [0.2, 0.3, 0.5])
    np.testing.assert_allclose(np.linalg.norm(sum(c[:, None] * vectors)), 1.0, atol=1e-12)


def test_the_mean_of_three_does_not_depend_on_their_order_and_one_alone_is_kept():
    there = merge_karcher([base(), changed(1), changed(2)], [1, 2, 3])
    back = merge_karcher([changed(2), changed(1), base()], [3, 2, 1])
    assert_weights(there, weights_of(back))
    alone = merge_karcher([base(), changed(1), changed(2)], [0, 0, 2])
    assert bits_of(alone) == bits_of(changed(2))


def test_the_models_stay_as_they_are():
    models = [with_noise(base(), seed) for seed in (5, 6)]
    before = [bits_of(model) for model in models]
    merge_slerp(*models, 0.5)
    merge_karcher(models, [1, 1])
    assert [bits_of(model) for model in models] == before


@pytest.mark.parametrize("t", [1.1, -0.1, None, "half", True, [], [0, 2], float("nan")])
def test_a_wrong_t_is_refused(t):
    refused(lambda: merge_slerp(base(), changed(1), t), "`t", "Received")


@pytest.mark.parametrize(
    ("t", "word"),
    [
        ({"attention": 0.5}, "without"),
        ({"mlps": 0.5, "*": 0.1}, "'mlps'"),
        ({"think": 0.5, "*": 0.1}, "'think'"),
        ({"mlp": 0.5, "layers_1/mlp": 0.2, "*": 0.1}, "'layers_1/mlp'"),
        ({"(": 0.5, "*": 0.1}, "regular expression"),
        ({3: 0.5, "*": 0.1}, "regular expression"),
        ({"*": 2}, "t['*']=2"),
    ],
)
def test_a_wrong_key_or_a_weight_without_a_number_is_refused(t, word):
    refused(lambda: merge_slerp(base(), changed(1), t), word)


def test_weights_of_a_mean_must_be_at_least_0_and_not_all_0():
    two = [base(), changed(1)]
    refused(lambda: merge_karcher(two, [1, -1]), "weights[1]=-1")
    refused(lambda: merge_karcher(two, [0, 0]), "sum above 0")
    refused(lambda: merge_karcher(two, [1]), "each of 2 models")
    refused(lambda: merge_karcher([base()], [1]), "at least 2 models")
