"""The arguments of layers: what `get_config` holds, and what is refused."""

import inspect

import keras
import numpy as np
import pytest

from qwen3_next import layers
from qwen3_next.config import ETDConfig, LayerRouterConfig, LoRAExpertConfig, Qwen3NextConfig
from qwen3_next.layers.arguments import RULES
from qwen3_next.layers.norms import make_norm

LAYERS = [
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
    (
        layers.LayerRouter,
        {
            "hidden_size": 3,
            "window_size": 2,
            "num_windows": 5,
            "temperature": 0.5,
            "execute_bias": 2.0,
            "initializer_range": 0.5,
        },
    ),
    (layers.ExpertRouter, {"num_experts": 3, "granularity": "token", "bias_update_rate": 0.5}),
    (layers.HaltingUnit, {"confidence_threshold": 0.5, "initializer_range": 0.5}),
    (
        layers.LoRAExperts,
        {
            "num_experts": 3,
            "rank": 2,
            "output_shape": [2, 4],
            "alpha": 2.0,
            "dropout": 0.5,
            "initializer_range": 0.5,
        },
    ),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[0].__name__)
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
        (["rate"], lambda: layers.ExpertRouter(2).update_bias(float("nan"))),
        (["rate"], lambda: layers.ExpertRouter(2).update_bias(-1)),
        (["rate"], lambda: layers.ExpertRouter(2).update_bias("a")),
        (["expert"], lambda: layers.LoRAExperts(2, 1, (4,)).merged(2)),
        (["expert"], lambda: layers.LoRAExperts(2, 1, (4,)).merged(True)),
        (["routings"], lambda: layers.load_balancing_loss([])),
        (["routings"], lambda: layers.load_balancing_loss([], by_layer=True)),
        (["routings"], lambda: layers.load_balancing_loss([1])),
        (["ffn_type"], lambda: layers.SwiGLU(4, ffn_type="relu")),
        (["ffn_type"], lambda: layers.RoutedExperts(4, 4, ffn_type="relu")),
        (["normalization_type"], lambda: make_norm("layer_norm", 1e-6, "norm", "float32")),
    ],
)
def test_an_error_names_the_argument_and_the_value(names, make):
    with pytest.raises(ValueError, match=f"`{names[0]}|{names[0]}`") as error:
        make()
    assert all(f"{name}=" in str(error.value) for name in names)


WRONG = [None, "a", True, -1, 2.5, float("nan"), 10**400, [], np.zeros(2)]
LOOP = {
    "layers": [layers.DecoderLayer(layers.GatedAttention(2, 1, 8), layers.SwiGLU(4))],
    "max_think_iterations": 2,
}


@pytest.mark.parametrize(
    "layer", [*LAYERS, (layers.ThinkLoop, LOOP)], ids=lambda layer: layer[0].__name__
)
def test_a_value_that_breaks_a_rule_is_refused(layer):
    cls, arguments = layer
    for name in RULES.keys() & inspect.signature(cls).parameters.keys():
        for value in WRONG:
            if not RULES[name].fits(value):
                with pytest.raises(ValueError, match=f"`{name}` must be .*{name}="):
                    cls(**{**arguments, name: value})


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[0].__name__)
def test_every_argument_has_a_rule(layer):
    named = {"ffn_type", "normalization_type"}  # by the tables of what they name
    assert set(layer[1]) - named <= set(RULES)


@pytest.mark.parametrize(
    "config", [Qwen3NextConfig, ETDConfig, LayerRouterConfig, LoRAExpertConfig]
)
def test_rules_are_those_of_the_configuration(config):
    shared = (RULES.keys() & config.RULES.keys()) - {"num_experts"}  # of a model 0 as well
    assert shared
    assert {name: RULES[name].what for name in shared} == {
        name: config.RULES[name].what for name in shared
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.SwiGLU(np.int64(4)),
        lambda: layers.GatedAttention(2, 1, 8, rope_theta=np.float32(2)),
    ],
)
def test_layers_take_numbers_of_python(make):
    with pytest.raises(ValueError, match=r"must be a number of Python.*Received: .*=np\."):
        make()


def test_a_refused_size_leaves_no_trace():
    """JAX keeps programs by values of which 2.0 == 2."""
    x = np.ones((1, 3, 4), "float32")
    with pytest.raises(ValueError, match="`num_experts_per_tok`"):
        layers.SparseMoE(4, 2.0, 6)(x)
    assert layers.SparseMoE(4, 2, 6)(x).shape == x.shape
