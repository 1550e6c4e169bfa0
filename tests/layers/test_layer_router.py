"""The router of a layer against its definition in float64: windows of the prompt, mean logits."""

import keras
import numpy as np
import pytest

from qwen3_next.layers import LayerRouter
from tests.support.running import assert_close, run, to_numpy

RNG = np.random.default_rng(0)
LENGTHS = [1, 3, 5, 6, 7, 13, 20]  # three windows of two tokens hold six
HIDDEN = RNG.normal(size=(len(LENGTHS), 20, 6)).astype("float32")
PROMPT = np.stack([RNG.permutation(np.arange(20) < length) for length in LENGTHS])
BIAS, TEMPERATURE = 1.5, 0.7


def learned(**options):
    """A router with other weights than the first ones, always the same."""
    router = LayerRouter(
        5, window_size=2, num_windows=3, temperature=TEMPERATURE, execute_bias=BIAS, **options
    )
    router.build(HIDDEN.shape)
    rng = np.random.default_rng(1)
    for variable in router.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return router


def by_hand(router, hidden, prompt):
    """Logits of one row after the other, from lists of its windows."""
    w1, b1, w2, b2 = (to_numpy(v.value).astype("float64") for v in router.trainable_variables)
    found = []
    for row, real in zip(hidden.astype("float64"), prompt):
        tokens = row[real]
        size = max(2, int(np.ceil(len(tokens) / 3)))
        windows = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        logits = [gelu(window.mean(0) @ w1 + b1) @ w2 + b2 for window in windows]
        found.append((np.mean(logits, axis=0) + BIAS * np.eye(3)[1]) / TEMPERATURE)
    return np.stack(found)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_logits_are_the_mean_over_windows_of_prompts_of_any_length_and_place():
    router = learned()
    expected = by_hand(router, HIDDEN, PROMPT)
    assert len(set(expected.argmax(-1))) > 1
    assert_close(run(router, HIDDEN, PROMPT), expected, 2e-6)


def test_padding_moves_nothing():
    router, packed = learned(), np.zeros_like(HIDDEN)
    left = np.arange(20) < np.array(LENGTHS)[:, None]
    packed[left] = HIDDEN[PROMPT]
    assert_close(run(router, packed, left), run(router, HIDDEN, PROMPT), 1e-6)


def test_what_is_not_prompt_is_not_read():
    router, changed = learned(), np.where(PROMPT[..., None], HIDDEN, 100)
    expected = run(router, HIDDEN, PROMPT)
    np.testing.assert_array_equal(run(router, changed.astype("float32"), PROMPT), expected)


def test_every_token_of_the_prompt_counts():
    router, changed = learned(), HIDDEN.copy()
    last = [np.flatnonzero(row)[-1] for row in PROMPT]
    changed[np.arange(len(last)), last] += 1
    difference = run(router, changed, PROMPT) - run(router, HIDDEN, PROMPT)
    assert (np.abs(difference).max(-1) > 1e-3).all()


def test_a_new_router_executes_whatever_it_reads():
    router = LayerRouter(5, temperature=2.0)
    logits = to_numpy(router(50 * HIDDEN, PROMPT))
    np.testing.assert_array_equal(logits, np.tile([0, 1.5, 0], (len(LENGTHS), 1)))


def test_without_a_prompt_only_the_bias_speaks():
    logits = run(learned(), HIDDEN, np.zeros_like(PROMPT))
    assert_close(logits, np.tile([0, BIAS / TEMPERATURE, 0], (len(LENGTHS), 1)), 1e-7)


def test_logits_are_float32_under_every_policy():
    low, router = learned(dtype="bfloat16"), learned()
    logits = low(HIDDEN, PROMPT)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert {v.dtype for v in low.trainable_variables} == {"float32"}
    np.testing.assert_array_equal(to_numpy(logits), to_numpy(router(HIDDEN, PROMPT)))


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 0},
        {"window_size": 0},
        {"num_windows": -1},
        {"temperature": 0.0},
        {"execute_bias": 0.0},
        {"execute_bias": float("nan")},
    ],
)
def test_bad_arguments_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        LayerRouter(**options)
