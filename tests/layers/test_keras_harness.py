"""Keras' own checks of a layer: eager, symbolic, serialized, trained, in mixed precision."""

import pytest
from keras.src import testing

from qwen3_next import layers
from tests.support.running import BACKEND

ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
DELTA_NET = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
WIDE = (2, 3, 8)
# Arguments, shape of the input, number of weights, other options of the harness.
CASES = {
    "ZeroCenteredRMSNorm": ({}, WIDE, 1, {}),
    "SwiGLU": ({"intermediate_size": 6}, WIDE, 3, {}),
    "SparseMoE": (MOE, WIDE, 3, {}),
    "GatedAttention": (ATTENTION, WIDE, 6, {}),
    "GatedDeltaNet": (DELTA_NET, WIDE, 7, {}),
    "TokenEmbedding": ({"input_dim": 9, "output_dim": 8}, (2, 3), 1, {"input_dtype": "int32"}),
    # It trains a layer of one input alone.
    "GatedRMSNorm": ({}, {"x_shape": WIDE, "gate_shape": WIDE}, 1, {"run_training_check": False}),
    "PartialRotaryEmbedding": (
        {},
        {"x_shape": (2, 3, 2, 8), "positions_shape": (2, 3)},
        0,
        {"run_training_check": False},
    ),
}


class Harness(testing.TestCase):
    def runTest(self):
        """For `unittest`, which wants a test in every case."""


@pytest.mark.skipif(BACKEND == "torch", reason="checked where it is compiled")
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_at_home_in_keras(name):
    arguments, shape, weights, options = CASES[name]
    output = shape["x_shape"] if isinstance(shape, dict) else shape
    harness = Harness()
    harness.setUp()
    harness.run_layer_test(
        getattr(layers, name),
        init_kwargs=arguments,
        input_shape=shape,
        expected_output_shape=WIDE if name == "TokenEmbedding" else output,
        expected_num_trainable_weights=weights,
        expected_num_non_trainable_weights=0,
        expected_num_losses=0,
        supports_masking=False,
        **options,
    )
