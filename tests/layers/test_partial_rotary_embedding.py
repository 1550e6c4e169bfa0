"""Rotary positions: against the published layer and a float64 oracle."""

import numpy as np
import pytest

from qwen3_next import layers
from tests.support import oracles
from tests.support.layers import FIXTURES, config_of
from tests.support.running import assert_close, run


def test_rotary_agrees_with_the_published_one():
    config = config_of("rotary")
    layer = layers.PartialRotaryEmbedding(config.rope_theta, config.partial_rotary_factor)
    positions = FIXTURES["rotary/in/position_ids"]
    for name in ("query", "key"):
        x = FIXTURES[f"rotary/in/{name}"].astype("float32")
        assert_close(run(layer, x, positions), FIXTURES[f"rotary/out/{name}"], 1e-5)


@pytest.mark.portable
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_rotary_matches_the_oracle(factor):
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 16)).astype("float32")
    positions = np.array([[0, 1, 2, 3, 4, 5], [900, 7, 7, 0, 30, 2]], "int32")
    layer = layers.PartialRotaryEmbedding(1e4, factor)
    expected = oracles.rotary(x, positions, 1e4, factor)
    assert_close(run(layer, x, positions), expected, 5e-5)


@pytest.mark.portable
def test_far_positions_turn_alike_on_every_backend(compiled):
    x = np.repeat([1.0, 0.0], 32)[None, None, None].astype("float32").repeat(3, axis=1)
    positions = np.array([[32767, 131071, 262143]], "int32")
    frequencies = 1e7 ** (-np.arange(0, 64, 2) / 64)
    angles = (positions[..., None].astype("float32") * np.float32(frequencies)).astype("float64")
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)[:, :, None]
    layer = layers.PartialRotaryEmbedding(1e7)
    assert_close(run(layer, x, positions, mode=compiled), expected, 2e-6)
