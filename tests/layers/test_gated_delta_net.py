"""Gated DeltaNet: the state it leaves, its initial decay rates, and a pass that is taken back."""

import keras
import numpy as np
import pytest

from qwen3_next import layers
from qwen3_next.models.weight_table import weight_table
from tests.support.layers import (
    DELTA_NETS,
    FIXTURES,
    ROWS,
    TOKENS,
    config_of,
    inputs_of,
    program,
    subject,
    tokens,
)
from tests.support.running import assert_close, run, to_numpy


@pytest.mark.parametrize("name", DELTA_NETS)
def test_delta_net_leaves_the_published_state(name):
    it, config = subject(name), config_of(name)
    _, conv, recurrent = run(it.of_weights, *it.weights, *inputs_of(name))
    assert_close(recurrent, FIXTURES[f"{name}/out/recurrent_state"], 3e-5)
    channels = FIXTURES[f"{name}/out/conv_state"][0][:, None, 1:]
    layout = next(row.layout for row in weight_table(config) if row.path.endswith("conv1d"))
    assert_close(conv[0], layout.load([channels]).reshape(conv.shape[1:]), 1e-5)


def test_initial_decay_rates_are_log_uniform():
    keras.utils.set_random_seed(0)
    layer = layers.GatedDeltaNet(1, 2000, 2, 2)
    layer.build((None, None, 4))
    rates = np.exp(to_numpy(layer.A_log.value))
    assert 0.01 <= rates.min() and rates.max() <= 16
    assert abs(rates.mean() - 8) < 0.5


def test_a_pass_of_which_nothing_stays_leaves_the_cache_as_it_was():
    name, rng = "gated_delta_net_ratio2", np.random.default_rng(5)
    cache = [rng.normal(size=x.shape).astype("float32") for x in subject(name).empty_cache(TOKENS)]
    none = np.zeros(ROWS, "int32")
    _, committed = program(name, "replayed")(tokens()[:, :6], tuple(cache), none, none)
    assert subject(name).update_type is layers.DeltaNetUpdate
    for buffer, expected in zip(committed, cache, strict=True):
        assert_close(buffer, expected, 1e-6)
