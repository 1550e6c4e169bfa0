"""Configurations and variants: every field is live, checked and survives its dict."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next, Qwen3NextConfig, variants
from qwen3_next.config import model_config
from qwen3_next.layers.norms import NORMALIZATIONS
from qwen3_next.layers.swiglu import GATED_ACTIVATIONS
from qwen3_next.models.compiled import compile_with_weights
from tests.support.running import BACKEND
from tests.support.small_models import SMALL, random_ids, small

# A value for every field that must change the weights, the output in training, or raise.
CHANGES = {
    "etd": {"n_encoder_layers": 1, "n_think_layers": 1, "n_decoder_layers": 1},
    "mtp": {"num_predict_tokens": 1, "speculation_lookahead": 1},
    "vocab_size": 62,
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 21,
    "max_position_embeddings": 8,
    "rope_theta": 500.0,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 0.1,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "full_attention_interval": 1,
    "layer_types": ("full_attention", "linear_attention", "linear_attention"),
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 0,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.5,
    "router_aux_loss_scope": "layer",
    "mlp_only_layers": (0,),
    "decoder_sparse_step": 2,
    "dropout": 0.5,
    "attention_dropout": 0.5,
    "normalization_type": "rms_norm",
    "attention_type": "group_query_attention",
    "attention_gate_bias": 0.5,
    "ffn_type": "geglu",
}


def weights_of(model):
    return {w.path: keras.ops.convert_to_numpy(w) for w in model.weights if w.dtype == "float32"}


def same_weights(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def training_loss(model):
    ids = keras.ops.convert_to_tensor(random_ids(2, 12))
    step = compile_with_weights(model, lambda ids: model(ids, labels=ids, training=True).loss)
    return float(step(ids))


@pytest.fixture(scope="module")
def base():
    model = small()
    return weights_of(model), training_loss(model)


@pytest.mark.skipif(BACKEND != "jax", reason="a property of the configuration")
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Qwen3NextConfig)])
def test_every_field_is_live(field, base):
    changes = {field: CHANGES[field]}
    if field in ("num_layers", "full_attention_interval"):
        changes["layer_types"] = None
    try:
        model = small(**changes)
        if same_weights(weights_of(model), base[0]):
            assert training_loss(model) != base[1]
    except ValueError as error:
        assert field in str(error)


@pytest.mark.parametrize(
    "field, value",
    [
        ("vocab_size", 0),
        ("hidden_size", 2.5),
        ("num_key_value_heads", 3),
        ("linear_num_value_heads", 3),
        ("partial_rotary_factor", 0.0),
        ("partial_rotary_factor", 0.4),
        ("num_experts_per_tok", 6),
        ("dropout", 1.0),
        ("attention_dropout", -0.1),
        ("rms_norm_eps", 0.0),
        ("norm_topk_prob", 1),
        ("layer_types", ("full_attention",)),
        ("layer_types", ("sliding_attention",) * 3),
        ("full_attention_interval", 3),
        ("mlp_only_layers", (7,)),
        ("normalization_type", "layer_norm"),
        ("attention_type", "mha"),
        ("ffn_type", "relu"),
        ("router_aux_loss_coef", -1.0),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_right(field, value):
    with pytest.raises(ValueError, match=field) as error:
        Qwen3NextConfig(**{**SMALL, field: value})
    assert "Received" in str(error.value)


def test_configurations_and_layers_know_the_same_kinds():
    assert set(model_config.NORMALIZATION_TYPES) == set(NORMALIZATIONS)
    assert set(model_config.FFN_TYPES) == set(GATED_ACTIVATIONS)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"n_layers.*Known fields.*num_layers"):
        Qwen3Next(n_layers=3)
    with pytest.raises(ValueError, match=r"80b_a3b.*huge"):
        Qwen3Next.from_variant("huge")


def test_a_config_survives_its_dict():
    config = Qwen3NextConfig(**SMALL)
    assert Qwen3NextConfig.from_dict(config.to_dict()) == config
    assert Qwen3NextConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(num_layers=8).layer_types.count("full_attention") == 4


def test_numbers_of_numpy_are_numbers():
    config = Qwen3NextConfig(hidden_size=np.int64(64), rms_norm_eps=np.float32(0.5))
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert config == Qwen3NextConfig(hidden_size=64, rms_norm_eps=0.5)
    for field, value in (("hidden_size", np.bool_(True)), ("rope_theta", np.float32("inf"))):
        with pytest.raises(ValueError, match=field):
            Qwen3NextConfig(**{field: value})


def test_variants_have_their_published_shapes():
    assert variants.names() == ["80b", "80b_a3b", "small", "tiny"]
    tiny = Qwen3NextConfig.from_variant("tiny")
    assert (tiny.hidden_size, tiny.num_layers, tiny.num_experts) == (512, 6, 4)
    published = Qwen3NextConfig.from_variant("80b_a3b")
    assert published == Qwen3NextConfig()
    assert published.layer_types[3::4] == ("full_attention",) * 12
    assert Qwen3NextConfig.from_variant("80b").num_experts == 0
