"""Every weight that a model may have is found by its path, and by one pattern alone."""

import re

import pytest

from qwen3_next import MTPConfig, Qwen3Next, Qwen3NextBackbone, Qwen3NextClassifier
from qwen3_next.models.weight_table import weight_table
from qwen3_next.scale.mesh_sizes import sizes_of
from qwen3_next.scale.sharding_rules import sharding_of
from qwen3_next.scale.weight_patterns import patterns_of, row_at
from tests.support.mtp_models import DENSE
from tests.support.routed_models import KINDS
from tests.support.small_models import small

STEPS = {"num_predict_tokens": 2, "speculation_lookahead": 2}
OWN = {**STEPS, "share_weights_across_steps": False}
LOOP = {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 0, "input_injection": True}
MODELS = {
    "experts": (Qwen3Next, {"attention_gate_bias": 1.0}),
    "tied": (Qwen3Next, {"tie_word_embeddings": True}),
    "dense": (Qwen3Next, {**DENSE, "normalization_type": "rms_norm"}),
    "transformer steps": (Qwen3Next, {"mtp": MTPConfig(**OWN, warmup_steps=2, draft_vocab_size=8)}),
    "mlp steps": (Qwen3Next, {"mtp": MTPConfig(mtp_head_type="mlp", **OWN)}),
    "shared head": (Qwen3Next, {"mtp": MTPConfig(mtp_head_type="shared_lm_head", **STEPS)}),
    "classifier": (Qwen3NextClassifier, {"num_labels": 3}),
    "backbone": (Qwen3NextBackbone, {"name": "trunk"}),
    **{f"thinks {kind}": (Qwen3Next, {"etd": {**LOOP, **KINDS[kind]}}) for kind in KINDS},
}
# Numbers of steps and of tokens: whatever else has no row in the weight table fails here.
COUNTERS = {"mtp_steps", "counts", "steps"}


def made(name):
    model, options = MODELS[name]
    return small(model, **options)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_a_model_has_one_row_with_an_axis_for_each_dim(name):
    model = made(name)
    patterns = patterns_of(weight_table(model.config, getattr(model, "num_labels", None)))
    for variable in model.weights:
        matching = [row for key, row in patterns.items() if re.fullmatch(key, variable.path)]
        if variable.name in COUNTERS:
            assert matching == [] and "int" in variable.dtype
            continue
        assert len(matching) == 1, variable.path
        found = row_at(f"wrapper/{variable.path}", len(variable.shape))
        assert found.axes == matching[0].axes, variable.path
        shape = matching[0]._replace(shape=tuple(variable.shape))
        assert len(sharding_of(shape, sizes_of("data=2")).axes) == len(variable.shape)


def test_every_row_of_a_table_is_found_as_it_is_split():
    sizes = sizes_of("expert=4,tensor=2")
    for row in weight_table(made("transformer steps").config.replace(vocab_size=64, num_experts=8)):
        found = row_at(row.path, len(row.shape))._replace(shape=row.shape)
        assert sharding_of(found, sizes) == sharding_of(row, sizes)


@pytest.mark.parametrize("path", ["layers_0/linear_attn/conv2d", "seed_generator_state", "kernel"])
def test_what_is_no_weight_has_no_row(path):
    assert row_at(path, 2) is None


def test_the_longest_path_counts():
    assert row_at("a/model/think_loop/router_1/score/kernel", 2).axes == (
        "router_hidden",
        "actions",
    )
    assert row_at("a/score/kernel", 2).axes == ("embed", "labels")
    assert row_at("a/layers_7/linear_attn/norm/weight", 1).axes == ("linear_head_dim",)
