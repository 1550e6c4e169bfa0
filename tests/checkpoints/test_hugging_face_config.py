"""Configurations from and to `config.json`."""

import json

import pytest

from qwen3_next import Qwen3NextConfig, variants
from qwen3_next.checkpoints.hugging_face_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)
from tests.support.published import published

NEXT = {"model_type": "qwen3_next", "num_hidden_layers": 4}
DENSE = {"model_type": "qwen3", "num_hidden_layers": 2}


def read(fields, **changes):
    return Qwen3NextConfig.from_dict(config_from_hugging_face({**fields, **changes}))


def test_old_and_new_spellings_mean_the_same():
    old = read(
        NEXT,
        rope_theta=10000000,
        partial_rotary_factor=0.5,
        rope_scaling=None,
        full_attention_interval=2,
        num_experts=6,
        num_experts_per_tok=2,
    )
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}
    kinds = ["linear_attention", "full_attention"] * 2
    new = read(
        NEXT,
        rope_parameters=rope,
        layer_types=kinds,
        num_local_experts=6,
        num_experts_per_tok=2,
    )
    assert new == old
    assert (old.rope_theta, old.partial_rotary_factor, old.num_experts) == (1e7, 0.5, 6)


def test_absent_keys_mean_what_transformers_takes():
    config = read({"model_type": "qwen3_next"})
    assert (config.rope_theta, config.partial_rotary_factor) == (1e4, 0.25)
    assert (config.intermediate_size, config.max_position_embeddings) == (5632, 32768)
    assert config.layer_types[:4] == ("linear_attention",) * 3 + ("full_attention",)
    config = read({"model_type": "qwen3_moe"})
    assert (config.head_dim, config.num_experts, config.norm_topk_prob) == (64, 128, False)
    config = read({"model_type": "qwen3", "num_key_value_heads": None})
    assert (config.num_layers, config.num_key_value_heads, config.num_experts) == (32, 32, 0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({**NEXT, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({**NEXT, "rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type='linear'"),
        ({**NEXT, "rope_parameters": {"full_attention": {}}}, "full_attention"),
        ({**NEXT, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e7}}, "rope_theta"),
        ({**NEXT, "attention_bias": True}, "attention_bias=True"),
        ({**NEXT, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**NEXT, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({**DENSE, "hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({**DENSE, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({**DENSE, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({**DENSE, "use_sliding_window": True, "max_window_layers": 1}, "sliding_window=4096"),
        ({"model_type": "qwen3_moe", "use_sliding_window": True}, "sliding_window=4096"),
    ],
)
def test_settings_without_a_counterpart_are_refused(fields, name):
    with pytest.raises(ValueError) as error:
        read(fields)
    assert name in str(error.value)


def test_windows_that_no_layer_uses_are_accepted():
    plain = read(DENSE)
    assert read(DENSE, use_sliding_window=True) == plain
    assert read(DENSE, use_sliding_window=True, sliding_window=None, max_window_layers=0) == plain
    assert read(DENSE, sliding_window=64, max_window_layers=0) == plain


def test_gelu_is_geglu_where_nothing_else_depends_on_it():
    assert read(DENSE, hidden_act="gelu").ffn_type == "geglu"
    assert config_to_hugging_face(read(DENSE, hidden_act="gelu"))["hidden_act"] == "gelu"


@pytest.mark.parametrize("name", variants.names())
def test_variants_survive_the_round_trip(name):
    config = Qwen3NextConfig.from_variant(name)
    fields = json.loads(json.dumps(config_to_hugging_face(config)))
    assert read(fields).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", ["next_4layer", "qwen3_dense", "qwen3_moe"])
def test_both_spellings_are_written(name):
    fields = config_to_hugging_face(read(published(name)[0]))
    assert fields["rope_parameters"]["rope_theta"] == fields["rope_theta"]
    assert fields.get("partial_rotary_factor") == fields["rope_parameters"].get(
        "partial_rotary_factor"
    )


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("next_4layer", {"normalization_type": "rms_norm"}, "gated_attention"),
        ("next_4layer", {"ffn_type": "geglu"}, "ffn_type='geglu' with linear attention"),
        ("next_4layer", {"shared_expert_intermediate_size": 0}, "shared_expert"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
        ("qwen3_dense", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen3_dense", {"full_attention_interval": 2}, "linear_attention"),
    ],
)
def test_what_no_published_type_says_is_refused(name, changes, problem):
    config = read(published(name)[0]).replace(**changes)
    with pytest.raises(ValueError) as error:
        config_to_hugging_face(config)
    assert problem in str(error.value)
