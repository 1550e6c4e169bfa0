"""Every field of the configurations of a transfer changes what comes out, or is refused."""

import dataclasses
import functools

import numpy as np
import pytest

from qwen3_next.config import CrossArchTransferConfig, HybridAttentionConfig
from qwen3_next.transfer import DistillationTrainer, transfer_qwen3_to_hybrid
from tests.support.small_models import random_ids
from tests.support.teachers import qwen3, weights_of

IDS = random_ids(2, 12)
BASE = {"deltanet_layer_pattern": (0,), "pattern_period": 2}
HYBRID = {
    "deltanet_layer_pattern": (1,),
    "pattern_period": 1,
    "layer_types": ("full_attention", "linear_attention"),
    "n_heads": 2,
    "n_kv_heads": 2,
    "head_dim": 16,
    "query_reduction": "first",
    "qk_norm": False,
    "conv_kernel_dim": 3,
    "conv_init": "small_tap",
    "decay_init": "half_life",
    "half_life": 10.0,
    "output_gate_init": "random",
    "output_projection_init": "least_squares",
    "gate_bias": True,
    "gate_init_value": 1.0,
}
NEEDS = {  # what a field has no meaning without
    "pattern_period": {"allow_no_attention": True},
    "query_reduction": {"n_kv_heads": 2},
    "half_life": {"decay_init": "half_life"},
    "gate_init_value": {"gate_bias": True},
}
TRANSFER = {
    "copy_attention_weights": False,
    "copy_ffn_weights": False,
    "copy_norm_weights": False,
    "copy_embedding_weights": False,
    "gate_init_strategy": "small",
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "expert_init_noise": 0.1,
    "seed": 1,
}
TRANSFER_NEEDS = {
    "num_experts_per_tok": {"num_experts": 2},
    "expert_init_noise": {"num_experts": 2},
    "seed": {"gate_init_strategy": "small"},
}
IN_TRAINING = {
    "use_distillation": False,
    "distillation_temperature": 1.0,
    "distillation_alpha": 0.1,
}


@functools.cache
def teacher():
    return qwen3(num_layers=2)


def made(hybrid=None, **fields):
    """The weights and the configuration of a hybrid, or why there is none."""
    try:
        config = CrossArchTransferConfig(hybrid_attention={**BASE, **(hybrid or {})}, **fields)
        model = transfer_qwen3_to_hybrid(teacher(), config, IDS, progress=False)
    except ValueError as error:
        return str(error)
    return model.config, weights_of(model)


def assert_differ(found, other, field):
    if isinstance(found, str):
        assert f"`{field}`" in found
        return
    (config, weights), (other_config, others) = found, other
    same = config == other_config and weights.keys() == others.keys()
    assert not (same and all(np.array_equal(weights[path], others[path]) for path in weights))


def test_every_field_is_tested():
    known = {field.name for field in dataclasses.fields(HybridAttentionConfig)}
    assert known == {*HYBRID, "allow_no_attention"}
    known = {field.name for field in dataclasses.fields(CrossArchTransferConfig)}
    assert known == {*TRANSFER, *IN_TRAINING, "source_model", "hybrid_attention"}


@functools.cache
def needed_alone(hybrid=(), fields=()):
    """What the fields without which others have no meaning make; many others need the same."""
    return made(dict(hybrid), **dict(fields))


@pytest.mark.parametrize("field", HYBRID)
def test_every_field_of_the_hybrid_is_live(field):
    needed = NEEDS.get(field, {})
    base = needed_alone(tuple(needed.items()))
    assert not isinstance(base, str)
    assert_differ(made({**needed, field: HYBRID[field]}), base, field)


@pytest.mark.parametrize("field", TRANSFER)
def test_every_field_of_the_transfer_is_live(field):
    needed = TRANSFER_NEEDS.get(field, {})
    if needed.get("num_experts"):
        needed = {**needed, "num_experts_per_tok": 2}
    base = needed_alone(fields=tuple(needed.items()))
    assert_differ(made(**{**needed, field: TRANSFER[field]}), base, field)


@pytest.mark.parametrize("field", IN_TRAINING)
def test_every_field_of_distillation_is_live(field):
    student = transfer_qwen3_to_hybrid(
        teacher(), CrossArchTransferConfig(hybrid_attention=BASE), progress=False
    )

    def loss(**fields):
        config = CrossArchTransferConfig(**fields)
        return float(DistillationTrainer(teacher(), student, config).compute_loss(IDS)["loss"])

    assert abs(loss(**{field: IN_TRAINING[field]}) - loss()) > 1e-4
