"""Layers under half-precision policies: near their float32 selves, with islands of float32."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from keras.backend import standardize_dtype

from qwen3_next import layers
from tests.support.layers import FIXTURES, KINDS, inputs_of, load_published, new_layer
from tests.support.running import run, to_numpy, weight_arrays, with_weights


class Half:
    """A layer in mixed precision as a function of its weights, with all it can return."""

    def __init__(self, name):
        self.layer = load_published(new_layer(name, "mixed_bfloat16"), name)
        self.weights = weight_arrays(self.layer)
        self.function = with_weights(self.layer, self.call)

    def call(self, *inputs):
        layer, options = self.layer, {}
        if isinstance(layer, layers.GatedDeltaNet | layers.DecoderLayer):
            options["cache"] = layer.init_cache(inputs[0].shape[0], inputs[0].shape[1])
        if isinstance(layer, layers.SparseMoE):
            options["return_routing"] = True
        outputs = layer(*inputs, **options)
        outputs = tuple(outputs) if isinstance(outputs, tuple) else (outputs,)
        self.dtypes = keras.tree.map_structure(lambda x: standardize_dtype(x.dtype), outputs)
        return outputs

    def moved(self, path, name):
        """What a change of a weight too small for bfloat16 does to the outputs."""
        place = [v.path.endswith(path) for v in self.layer.trainable_variables].index(True)
        outputs = []
        for factor in (1.0, 1.0001):
            exact = to_numpy(ops.cast(self.weights[place], "bfloat16"))
            weights = list(self.weights)
            weights[place] = exact * np.float32(factor)
            assert np.array_equal(to_numpy(ops.cast(weights[place], "bfloat16")), exact)
            outputs.append(run(self.function, *weights, *inputs_of(name)))
        return keras.tree.map_structure(lambda a, b: np.abs(a - b).max(), *outputs)


half = functools.cache(Half)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "decoder_layer_full"])
def test_mixed_precision_runs_and_stays_near(name):
    it = half(name)
    output, *_ = run(it.function, *it.weights, *inputs_of(name))
    assert it.dtypes[0] == "bfloat16"
    expected = FIXTURES[f"{name}/out/hidden_states"]
    assert np.linalg.norm(output - expected) < 3e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("weight", ["A_log", "dt_bias"])
@pytest.mark.parametrize("name", ["gated_delta_net_ratio2", "decoder_layer_linear"])
def test_decay_rates_and_states_are_float32_in_mixed_precision(name, weight):
    _, cache, *_ = half(name).moved(weight, name)
    assert cache[1] > 1e-6
    assert half(name).dtypes[1] == ("bfloat16", "float32")


@pytest.mark.parametrize("name", ["sparse_moe", "decoder_layer_linear"])
def test_the_router_is_float32_in_mixed_precision(name):
    *_, routing = half(name).moved("gate/kernel", name)
    assert routing[1] > 1e-6
    assert set(half(name).dtypes[-1]) == {"float32"}


def test_islands_are_float32_variables_under_a_bfloat16_policy():
    delta = new_layer("gated_delta_net_ratio2", "bfloat16")
    moe = new_layer("sparse_moe", "bfloat16")
    assert {v.dtype for v in (delta.A_log, delta.dt_bias, moe.gate.kernel)} == {"float32"}
    assert {delta.in_proj_ba.kernel.dtype, moe.experts.down.dtype} == {"bfloat16"}
