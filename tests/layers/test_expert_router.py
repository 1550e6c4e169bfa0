"""The router of LoRA experts: scores in float64, who is chosen, and the balance between them."""

import keras
import numpy as np
import pytest

from qwen3_next.layers import ExpertRouter
from qwen3_next.layers.expert_router import NO_EXPERT
from tests.support.running import (
    assert_close,
    gradients,
    run,
    to_numpy,
    weight_arrays,
    with_weights,
)

RNG = np.random.default_rng(0)
ENCODED, HIDDEN = (RNG.normal(size=(2, 4, 7, 6)) * [[[[1.0]]], [[[7.0]]]]).astype("float32")
PROMPT = np.stack([RNG.permutation(np.arange(7) < length) for length in (1, 3, 5, 7)])
EXPERTS = 3


def learned(granularity="sequence", **options):
    """A router as if it had learned, always the same."""
    router = ExpertRouter(EXPERTS, granularity, **options)
    router.build(ENCODED.shape)
    kernel = router.score.kernel
    kernel.assign(np.random.default_rng(1).normal(size=kernel.shape))
    return router


def by_hand(router, prompt):
    """Scores `(B, T, N)` in float64; `None` for those of every token by itself."""
    states = [x.astype("float64") for x in (ENCODED, HIDDEN)]
    normed = [x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) for x in states]
    u = np.concatenate(normed, axis=-1) @ to_numpy(router.score.kernel.value)
    if prompt is not None:
        u = np.stack([row[real].mean(0, keepdims=True) for row, real in zip(u, prompt)])
    return 1 / (1 + np.exp(-u))


def test_a_sequence_is_scored_by_the_mean_over_its_prompt():
    router = learned()
    assert_close(run(router, ENCODED, HIDDEN, PROMPT), by_hand(router, PROMPT), 1e-6)
    whole = by_hand(router, np.ones_like(PROMPT))
    assert_close(run(router, ENCODED, HIDDEN), whole, 1e-6)


def test_a_token_is_scored_by_itself():
    router = learned("token")
    assert_close(run(router, ENCODED, HIDDEN, PROMPT), by_hand(router, None), 1e-6)


@pytest.mark.parametrize("granularity, length", [("sequence", 1), ("token", 7)])
def test_the_shape_is_known_before_the_values(granularity, length):
    router, x = learned(granularity), keras.KerasTensor((4, 7, 6))
    spec = router(x, x, keras.KerasTensor((4, 7), dtype="bool"))
    assert spec.shape == (4, length, EXPERTS) and spec.dtype == "float32"


def test_the_size_of_a_state_is_not_seen():
    router = learned()
    expected = run(router, ENCODED, HIDDEN, PROMPT)
    assert_close(run(router, 50 * ENCODED, HIDDEN / 3, PROMPT), expected, 2e-5)


def test_a_new_router_tells_inputs_apart():
    router = ExpertRouter(200)
    router.build((None, None, 32))
    assert np.std(to_numpy(router.score.kernel.value)) == pytest.approx(1 / 8, rel=0.05)


def test_without_a_prompt_no_expert_is_better():
    scores = run(learned(), ENCODED, HIDDEN, np.zeros_like(PROMPT))
    np.testing.assert_array_equal(scores, np.full((4, 1, EXPERTS), 0.5))


def test_scores_are_float32_under_every_policy():
    low, router = learned(dtype="bfloat16"), learned()
    scores = low(ENCODED, HIDDEN, PROMPT)
    assert keras.backend.standardize_dtype(scores.dtype) == "float32"
    expected = to_numpy(router(ENCODED, HIDDEN, PROMPT))
    np.testing.assert_array_equal(to_numpy(scores), expected)


def test_the_selection_bias_changes_who_is_chosen_and_never_the_scores():
    router = learned()
    scores = to_numpy(router(ENCODED, HIDDEN, PROMPT))
    np.testing.assert_array_equal(to_numpy(router.select(scores)), scores.argmax(-1))
    assert len(set(scores.argmax(-1).flat)) > 1
    router.selection_bias.assign([0.0, 0.0, 2.0])
    assert (to_numpy(router.select(scores)) == 2).all()
    np.testing.assert_array_equal(to_numpy(router(ENCODED, HIDDEN, PROMPT)), scores)


def test_the_chosen_expert_weighs_exactly_one():
    router = learned("token")

    def weigh(encoded, hidden):
        scores = router(encoded, hidden)
        chosen = router.select(scores)
        return chosen, router.weigh(chosen, scores), router.weigh(chosen, None)

    chosen, weights, plain = run(weigh, ENCODED, HIDDEN)
    np.testing.assert_array_equal(weights, np.eye(EXPERTS)[chosen])
    np.testing.assert_array_equal(plain, weights)


def test_the_gradient_of_a_weight_is_that_of_the_score_of_the_chosen():
    router = learned()
    chosen = to_numpy(router.select(router(ENCODED, HIDDEN, PROMPT)))
    cotangent = RNG.normal(size=(4, 1, EXPERTS)).astype("float32")

    def weigh(encoded, hidden):
        scores = router(encoded, hidden, PROMPT)
        return router.weigh(router.select(scores), scores)

    def score(encoded, hidden):
        return router(encoded, hidden, PROMPT)

    arrays = [*weight_arrays(router), ENCODED, HIDDEN]
    found = gradients(with_weights(router, weigh), arrays, cotangent)
    of_chosen = cotangent * np.eye(EXPERTS, dtype="float32")[chosen]
    expected = gradients(with_weights(router, score), arrays, of_chosen)
    assert len(found) == 3
    for one, other in zip(found, expected):
        assert np.abs(one).max() > 1e-3
        assert_close(one, other, 1e-6)


def test_no_expert_weighs_nothing():
    router, scores = learned(), np.full((2, 1, EXPERTS), 0.3, "float32")
    chosen = np.array([[NO_EXPERT], [1]], "int32")
    expected = [[[0, 0, 0]], [[0, 1, 0]]]
    for given in (scores, None):
        np.testing.assert_array_equal(to_numpy(router.weigh(chosen, given)), expected)


def test_the_bias_moves_by_the_sign_rule_and_the_counts_begin_anew():
    router = learned(bias_update_rate=0.25)
    router.count(np.array([[1.0, 1, 0], [2, 0, 0]], "float32"))
    router.count(np.array([[0.0, 1, 1]], "float32"))  # 3, 2 and 1 of them
    router.update_bias()
    np.testing.assert_array_equal(to_numpy(router.selection_bias.value), [-0.25, 0, 0.25])
    np.testing.assert_array_equal(to_numpy(router.selected.value), [0, 0, 0])
    router.update_bias()
    np.testing.assert_array_equal(to_numpy(router.selection_bias.value), [-0.25, 0, 0.25])
    router.count(np.array([[0.0, 0, 3]], "float32"))
    router.update_bias(rate=1.0)
    np.testing.assert_array_equal(to_numpy(router.selection_bias.value), [0.75, 1, -0.75])


def test_the_bias_of_a_frozen_router_stays():
    router = learned()
    router.trainable = False
    router.count(np.array([[3.0, 0, 0]], "float32"))
    router.update_bias()
    assert not to_numpy(router.selection_bias.value).any()
    router.trainable = True
    router.update_bias()  # what was counted while it was frozen is forgotten
    assert not to_numpy(router.selection_bias.value).any()


def test_an_overloaded_expert_loses_selection():
    router, chosen = learned(bias_update_rate=0.01), []
    scores = np.tile(np.array([0.5, 0.3, 0.45], "float32"), (4, 1, 1))
    for _ in range(4):
        one = router.select(scores)
        chosen.append(int(to_numpy(one)[0, 0]))
        router.count(np.eye(EXPERTS, dtype="float32")[to_numpy(one)[:, 0]])
        router.update_bias()
    assert chosen == [0, 0, 0, 2]  # 0.02 a step of the 0.05 between them


@pytest.mark.parametrize("options", [{"num_experts": 0}, {"granularity": "row"}])
def test_bad_arguments_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        ExpertRouter(**{"num_experts": 2, **options})
