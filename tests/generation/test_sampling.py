"""Sampling: filters keep the right tokens, draws follow their distribution."""

import keras
import numpy as np
import pytest

from qwen3_next.generation.sampling import FILTERED, make_sampling, sample, warp

LOGITS = np.log(np.array([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.3, 0.4]], "float32"))


def distribution(**options):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    _, sampling = make_sampling(5, seed=0, stop_token_ids=(), **options)
    warped = warp(keras.ops.convert_to_tensor(LOGITS), sampling, FILTERED)
    return keras.ops.convert_to_numpy(keras.ops.softmax(warped))


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 2}, [0.4, 0.3]),
        ({"top_k": 9}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.7001}, [0.4, 0.3, 0.15]),
        ({"top_p": 0.1}, [0.4]),
        ({"min_p": 0.3}, [0.4, 0.3, 0.15]),
        ({"top_k": 4, "top_p": 0.5}, [0.4, 0.3]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
    ],
)
def test_filters_keep_the_right_tokens(options, kept):
    expected = np.zeros(5)
    expected[: len(kept)] = kept
    expected /= expected.sum()
    np.testing.assert_allclose(distribution(**options), [expected, expected[::-1]], atol=1e-6)


def test_samples_follow_the_distribution():
    mode, sampling = make_sampling(5, 0.8, 4, 0.95, 0.0, 7, ())
    rows = keras.ops.convert_to_tensor(np.tile(LOGITS[:1], (20000, 1)))
    drawn = keras.ops.convert_to_numpy(sample(rows, sampling, 0, mode))
    expected = distribution(temperature=0.8, top_k=4, top_p=0.95)[0] * 20000
    counts = np.bincount(drawn, minlength=5)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 16.3  # 99.9 % of draws with 3 degrees of freedom


def test_steps_and_rows_draw_independently():
    mode, sampling = make_sampling(5, 1.0, 0, 1.0, 0.0, 7, ())
    rows = keras.ops.convert_to_tensor(np.zeros((64, 5), "float32"))
    first, second = (keras.ops.convert_to_numpy(sample(rows, sampling, i, mode)) for i in (0, 1))
    assert len(set(first.tolist())) == 5
    assert 0.05 < (first == second).mean() < 0.5
