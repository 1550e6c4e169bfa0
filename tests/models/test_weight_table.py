"""The weight table against the weights that models have."""

import pytest

from qwen3_next import MTPConfig, Qwen3Next, Qwen3NextClassifier, Qwen3NextConfig
from qwen3_next.checkpoints.hugging_face_config import config_from_hugging_face
from qwen3_next.models.weight_rows import AXES, PARTS
from qwen3_next.models.weight_table import weight_table
from tests.support.published import MODELS, published
from tests.support.small_models import SMALL, small


@pytest.mark.parametrize("name", MODELS)
def test_table_lists_every_weight(name):
    config = Qwen3NextConfig(**config_from_hugging_face(published(name)[0]))
    for model in (Qwen3Next(config), Qwen3NextClassifier(config, num_labels=3)):
        rows = weight_table(config, getattr(model, "num_labels", None))
        assert {row.part for row in rows} <= set(PARTS)
        listed = {row.path: row.shape for row in rows}
        assert listed == {v.path: tuple(v.shape) for v in model.weights}
        assert len(listed) == len(rows)


def test_table_lists_what_a_think_loop_adds():
    etd = {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 0}
    model = small(etd={**etd, "input_injection": True}, dtype="bfloat16")
    listed = {r.path: (r.shape, r.dtype or "bfloat16") for r in weight_table(model.config)}
    assert listed == {v.path: (tuple(v.shape), v.dtype) for v in model.weights}
    assert sum("think_loop" in path for path in listed) == 3


def test_table_counts_the_published_model():
    rows = weight_table(Qwen3NextConfig.from_variant("80b_a3b"))
    assert sum(row.size for row in rows) == 79_674_391_296
    assert {row.part for row in rows} == set(PARTS) - {"mlp", "think", "mtp"}


@pytest.mark.parametrize("options", [{}, {"num_labels": 3}])
def test_table_knows_what_stays_float32(options):
    model = small(Qwen3NextClassifier if options else Qwen3Next, dtype="bfloat16", **options)
    listed = {row.path: row.dtype or "bfloat16" for row in weight_table(model.config, **options)}
    assert listed == {v.path: v.dtype for v in model.weights}


def test_every_dim_has_an_axis_and_equal_axes_are_equally_long():
    config = Qwen3NextConfig(**SMALL, mtp=MTPConfig())
    assert {axis for row in weight_table(config) for axis in row.axes} <= set(AXES)
    for row in weight_table(config):
        assert len(row.axes) == len(row.shape)
    lengths = {
        "vocab": {config.vocab_size},
        "embed": {config.hidden_size, 2 * config.hidden_size},  # two of them go into `mtp/fc`
        "heads": {config.num_attention_heads},
        "kv_heads": {config.num_key_value_heads},
        "linear_key_heads": {config.linear_num_key_heads},
        "linear_value_heads": {config.linear_num_value_heads},
        "experts": {config.num_experts},
        "scores": {config.num_experts},
        "taps": {config.linear_conv_kernel_dim},
        "one": {1},
    }
    for row in weight_table(config):
        for axis, length in zip(row.axes, row.shape):
            assert length in lengths.get(axis, {length}), row.path


def test_only_a_new_head_is_optional_and_only_a_tied_embedding_has_a_second_name():
    config = Qwen3NextConfig(**SMALL, tie_word_embeddings=True)
    rows = weight_table(config, num_labels=3)
    assert [row.path for row in rows if row.optional] == ["score/kernel"]
    rows = weight_table(config)
    assert not any(row.optional for row in rows)
    assert {row.path: row.tied[0] for row in rows if row.tied} == {
        "model/embed_tokens/embeddings": "lm_head.weight"
    }
