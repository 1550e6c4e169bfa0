"""Keras' own checks of a layer: eager, symbolic, serialized, trained, in mixed precision."""

import inspect

import keras
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
BODY = {"mixer": layers.GatedAttention(**ATTENTION), "mlp": layers.SwiGLU(6)}
# Arguments, shape of the input, number of weights, other options of the harness. It trains a layer
# of one input and one output alone.
MANY = {"run_training_check": False}
CASES = {
    "ZeroCenteredRMSNorm": ({}, WIDE, 1, {}),
    "SwiGLU": ({"intermediate_size": 6}, WIDE, 3, {}),
    "SparseMoE": (MOE, WIDE, 3, {}),
    "GatedAttention": (ATTENTION, WIDE, 6, {}),
    "GatedDeltaNet": (DELTA_NET, WIDE, 7, {}),
    "TokenEmbedding": (
        {"input_dim": 9, "output_dim": 8},
        (2, 3),
        1,
        {"input_dtype": "int32", "expected_output_shape": WIDE},
    ),
    "DecoderLayer": (BODY, WIDE, 11, {}),
    "HaltingUnit": ({}, WIDE, 2, {"expected_output_shape": WIDE[:2]}),
    "ThinkLoop": (
        {
            "layers": [layers.DecoderLayer(**BODY)],
            "max_think_iterations": 2,
            "halting_unit": layers.HaltingUnit(),
            "input_injection": True,
        },
        WIDE,
        14,
        {},
    ),
    "LayerRouter": (
        {"hidden_size": 5},
        {"hidden_shape": WIDE, "prompt_shape": WIDE[:2]},
        4,
        {
            "expected_output_shape": (2, 3),
            **MANY,
        },
    ),
    "LoRAExperts": (
        {"num_experts": 3, "rank": 2, "output_shape": (2, 5)},
        {"x_shape": WIDE, "weights_shape": (2, 1, 3)},
        2,
        {"expected_output_shape": (2, 3, 2, 5), **MANY},
    ),
    "ExpertRouter": (
        {"num_experts": 4},
        {"encoded_shape": WIDE, "hidden_shape": WIDE},
        1,
        {
            "expected_output_shape": (2, 1, 4),
            "expected_num_non_trainable_weights": 2,
            **MANY,
        },
    ),
    "GatedRMSNorm": ({}, {"x_shape": WIDE, "gate_shape": WIDE}, 1, MANY),
    "PartialRotaryEmbedding": (
        {},
        {"x_shape": (2, 3, 2, 8), "positions_shape": (2, 3)},
        0,
        {"input_dtype": {"x_shape": "float32", "positions_shape": "int32"}, **MANY},
    ),
    "RoutedExperts": (
        {"num_experts": 3, "moe_intermediate_size": 4},
        {"x_shape": (6, 8), "experts_shape": (6, 2), "weights_shape": (6, 2)},
        2,
        {
            "input_dtype": {
                "x_shape": "float32",
                "experts_shape": "int32",
                "weights_shape": "float32",
            },
            "expected_output_shape": ((6, 8), (3,)),
            **MANY,
        },
    ),
    "MultiTokenPrediction": (
        {"body": layers.DecoderLayer(**BODY)},
        {"embedding_shape": WIDE, "hidden_shape": WIDE},
        15,
        MANY,
    ),
}


class Harness(testing.TestCase):
    def runTest(self):
        """For `unittest`, which wants a test in every case."""


def test_every_public_layer_is_checked():
    public = {name: getattr(layers, name) for name in layers.__all__}
    public = {name: thing for name, thing in public.items() if inspect.isclass(thing)}
    assert {n for n, cls in public.items() if issubclass(cls, keras.layers.Layer)} == set(CASES)


@pytest.mark.skipif(BACKEND == "torch", reason="checked where it is compiled")
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_at_home_in_keras(name):
    arguments, shape, weights, options = CASES[name]
    output = next(iter(shape.values())) if isinstance(shape, dict) else shape
    harness = Harness()
    harness.setUp()
    options = {
        "expected_output_shape": output,
        "expected_num_non_trainable_weights": 0,
        **options,
    }
    harness.run_layer_test(
        getattr(layers, name),
        init_kwargs=arguments,
        input_shape=shape,
        expected_num_trainable_weights=weights,
        expected_num_losses=0,
        supports_masking=False,
        **options,
    )
