"""The arguments of layers: what `get_config` holds, and what is refused."""

import keras
import pytest

from qwen3_next import layers
from qwen3_next.layers.norms import make_norm


@pytest.mark.parametrize(
    "layer",
    [
        (layers.ZeroCenteredRMSNorm, {"epsilon": 1e-3}),
        (layers.GatedRMSNorm, {"epsilon": 1e-3}),
        (layers.PartialRotaryEmbedding, {"rope_theta": 5.0, "partial_rotary_factor": 0.5}),
        (
            layers.SwiGLU,
            {"intermediate_size": 3, "ffn_type": "geglu", "initializer_range": 0.5},
        ),
        (
            layers.RoutedExperts,
            {
                "num_experts": 3,
                "moe_intermediate_size": 5,
                "ffn_type": "geglu",
                "initializer_range": 0.5,
            },
        ),
        (
            layers.SparseMoE,
            {
                "num_experts": 3,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 5,
                "shared_expert_intermediate_size": 7,
                "norm_topk_prob": False,
                "ffn_type": "geglu",
                "initializer_range": 0.5,
            },
        ),
        (
            layers.GatedAttention,
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "output_gate": False,
                "partial_rotary_factor": 0.5,
                "rope_theta": 5.0,
                "normalization_type": "rms_norm",
                "rms_norm_eps": 1e-3,
                "attention_dropout": 0.5,
                "initializer_range": 0.5,
                "gate_bias": None,
            },
        ),
        (
            layers.GatedDeltaNet,
            {
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 6,
                "linear_value_head_dim": 8,
                "linear_conv_kernel_dim": 3,
                "rms_norm_eps": 1e-3,
                "initializer_range": 0.5,
            },
        ),
        (
            layers.DecoderLayer,
            {
                "mixer": layers.GatedAttention(4, 2, 8),
                "mlp": layers.SwiGLU(3),
                "normalization_type": "rms_norm",
                "rms_norm_eps": 1e-3,
                "dropout": 0.5,
                "gradient_checkpointing": True,
            },
        ),
        (
            layers.MultiTokenPrediction,
            {
                "body": layers.SwiGLU(3),
                "normalization_type": "rms_norm",
                "rms_norm_eps": 1e-3,
                "initializer_range": 0.5,
            },
        ),
    ],
    ids=lambda layer: layer[0].__name__,
)
def test_config_holds_every_argument(layer):
    cls, arguments = layer
    made = cls(**arguments, dtype="mixed_bfloat16", name="given")
    config = made.get_config()
    names = set(cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount])
    assert set(arguments) == names
    for name, value in arguments.items():
        if not isinstance(value, keras.layers.Layer):
            assert config[name] == value
    assert cls.from_config(config).get_config() == config


def test_config_holds_the_bias_of_a_gate():
    config = layers.GatedAttention(2, 2, 8, gate_bias=0.5).get_config()
    assert config["gate_bias"] == 0.5
    assert layers.GatedAttention.from_config(config).get_config() == config


@pytest.mark.parametrize(
    "names, make",
    [
        (["linear_num_value_heads"], lambda: layers.GatedDeltaNet(2, 3, 4, 4)),
        (["num_attention_heads", "num_key_value_heads"], lambda: layers.GatedAttention(3, 2, 8)),
        (["partial_rotary_factor"], lambda: layers.GatedAttention(2, 2, 6, True, 0.5)),
        (["partial_rotary_factor"], lambda: layers.GatedAttention(2, 2, 8, True, 1.5)),
        (["gate_bias"], lambda: layers.GatedAttention(2, 2, 8, False, gate_bias=0.5)),
        (["num_experts_per_tok", "num_experts"], lambda: layers.SparseMoE(4, 5, 8)),
        (["num_experts_per_tok"], lambda: layers.SparseMoE(4, 0, 8)),
        (["ffn_type"], lambda: layers.SwiGLU(4, ffn_type="relu")),
        (["ffn_type"], lambda: layers.RoutedExperts(4, 4, ffn_type="relu")),
        (["normalization_type"], lambda: make_norm("layer_norm", 1e-6, "norm", "float32")),
    ],
)
def test_an_error_names_the_argument_and_the_value(names, make):
    with pytest.raises(ValueError, match=f"`{names[0]}|{names[0]}`") as error:
        make()
    assert all(f"{name}=" in str(error.value) for name in names)
