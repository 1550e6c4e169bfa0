"""Speculation with sampling draws from the distribution of plain decoding."""

import numpy as np
import pytest

from qwen3_next import MTPConfig
from tests.support.mtp_models import LIGHT
from tests.support.small_models import logits, small

# Thousands of rows run through it.
NARROW = {
    "hidden_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 8,
}


@pytest.fixture(scope="module")
def pair_counts():
    """Pairs of tokens drawn by speculation, and the probability of each by plain warping."""
    mtp = MTPConfig(num_predict_tokens=2, speculation_lookahead=2)
    model = small(vocab_size=8, mtp=mtp, **LIGHT, **NARROW)
    options = {"temperature": 0.8, "top_p": 0.9}
    rows, draws = 4096, np.zeros((8, 8))
    for seed in range(6):
        prompts = np.tile(np.array([[3, 1, 4]], "int32"), (rows, 1))
        tokens, stats = model.generate(prompts, 3, seed=seed, use_speculative=True, **options)
        np.add.at(draws, tuple(np.stack(tokens)[:, 1:].T), 1)
    return draws, stats, _pair_probabilities(model, [3, 1, 4], **options)


def _pair_probabilities(model, prompt, temperature, top_p):
    """P(second, third new token), enumerated in NumPy from the logits of whole sequences."""

    def warped(x):
        x = x.astype("float64") / temperature
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        order = np.argsort(-p, axis=-1)
        ordered = np.take_along_axis(p, order, axis=-1)
        kept = np.cumsum(ordered, axis=-1) - ordered < top_p
        mask = np.zeros_like(kept)
        np.put_along_axis(mask, order, kept, axis=-1)
        p = np.where(mask, p, 0.0)
        return p / p.sum(-1, keepdims=True)

    grid = np.array([[*prompt, a, b] for a in range(8) for b in range(8)], "int32")
    probabilities = warped(logits(model, grid))
    first = probabilities[::8, 2][0]
    second = probabilities[::8, 3]
    third = probabilities[:, 4].reshape(8, 8, 8)
    return np.einsum("a,ab,abc->bc", first, second, third)


def chi_square(draws, probabilities):
    expected = probabilities * draws.sum()
    kept = expected > 5
    assert draws[probabilities == 0].sum() == 0
    return ((draws - expected)[kept] ** 2 / expected[kept]).sum(), kept.sum() - 1


def test_sampling_keeps_the_distribution(pair_counts):
    draws, stats, probabilities = pair_counts
    assert draws.sum() >= 20_000
    assert 0.05 < stats["avg_acceptance_rate"] < 0.95  # both roads were taken
    statistic, freedom = chi_square(draws, probabilities)
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_the_test_of_the_distribution_sees_a_bias_of_five_percent(pair_counts):
    draws, _, probabilities = pair_counts
    biased = 0.95 * probabilities
    biased[np.unravel_index(probabilities.argmax(), probabilities.shape)] += 0.05
    statistic, freedom = chi_square(draws, biased)
    assert statistic > freedom + 4 * np.sqrt(2 * freedom)
