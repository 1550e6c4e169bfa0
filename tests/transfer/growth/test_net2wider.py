"""Wider models that compute the same."""

import keras
import numpy as np
import pytest

from qwen3_next import ETDConfig, LayerRouterConfig, MTPConfig, Qwen3NextClassifier
from qwen3_next.transfer.growth.net2wider import grow_model_width
from qwen3_next.transfer.named_weights import NamedWeights
from tests.support.grown_models import (
    CALLED,
    IDS,
    KINDS,
    ONE_FULL,
    PLAIN,
    all_logits,
    assert_learns,
    assert_unchanged,
    kind,
    logits_of,
    snapshot,
)
from tests.support.mtp_models import DENSE
from tests.support.running import assert_close
from tests.support.small_models import logits_once, small

# Everything that a model may have, to the sizes of `SMALL`.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
LINEAR = {"linear_num_key_heads": 4, "linear_num_value_heads": 16}
EXPERTS = {
    "num_experts": 10,
    "moe_intermediate_size": 13,
    "shared_expert_intermediate_size": 21,
}
ALL = {
    "plain": {**HEADS, "hidden_size": 72, "intermediate_size": 33},
    "tied": {"num_attention_heads": 12, "hidden_size": 72, "intermediate_size": 21},
    "mtp": {**HEADS, **LINEAR, **EXPERTS, "hidden_size": 48, "intermediate_size": 47},
    "tied_mtp": {"num_key_value_heads": 4, "hidden_size": 48},
}


@pytest.mark.parametrize(("name", "noise"), [("plain", 0.0), *((name, 0.5) for name in CALLED)])
def test_a_wider_model_computes_the_same(name, noise):
    model = kind(name)
    before = snapshot(model)
    wider = grow_model_width(model, **ALL[name], noise_std=noise, seed=0)
    for field, size in ALL[name].items():
        assert getattr(wider.config, field) == size
    assert wider.config.head_dim == model.config.head_dim
    assert_close(all_logits(wider), logits_of(name), 1e-5)
    assert_unchanged(model, before)


def test_every_size_grows_alone():
    model = kind("mtp")
    for field in (*ALL["mtp"],):
        size = 2 * getattr(model.config, field)
        wider = grow_model_width(model, **{field: size})
        old, new = NamedWeights(model), NamedWeights(wider)
        assert sum(a.size for a in new.values()) > sum(a.size for a in old.values())


@pytest.mark.parametrize("fields", [{"hidden_state": "before_norm"}, {"mtp_head_type": "mlp"}])
def test_modules_are_kept_whatever_they_read(fields):
    mtp = MTPConfig(num_predict_tokens=2, speculation_lookahead=2, **fields)
    model = small(**{**KINDS["tied_mtp"], "mtp": mtp})
    # So small that the epsilon of the norm behind it would be felt, were its mean square another.
    model.backbone.norm.weight.assign(keras.ops.full((24,), -0.95))
    wider = grow_model_width(model, hidden_size=72, noise_std=0.1, seed=0)
    assert_close(all_logits(wider), all_logits(model), 1e-5)


@pytest.mark.parametrize("labels", [{}, {"num_labels": 3}])
def test_thinking_models_and_classifiers_grow(labels):
    etd = ETDConfig(
        0, 1, 1, max_think_iterations=2, input_injection=True, use_layer_router=True,
        layer_router=LayerRouterConfig(hidden_size=6),
    )  # fmt: skip
    fields = {**KINDS["tied"], **labels, "etd": etd}
    model = small(*([Qwen3NextClassifier] if labels else []), **fields)
    for variable in model.backbone.think_loop.trainable_variables:
        if "router" in variable.path or "injection" in variable.path:
            drawn = np.random.default_rng(1).standard_normal(variable.shape)
            variable.assign(keras.ops.cast(drawn, variable.dtype))
    wider = grow_model_width(model, hidden_size=48, noise_std=0.1, seed=0)
    assert_close(logits_once(wider, IDS), logits_once(model, IDS), 1e-5)


def test_experts_grow_whatever_their_weights_sum_to():
    fields = {**ONE_FULL, "mlp_only_layers": (), "norm_topk_prob": False}
    model = small(**fields)
    wider = grow_model_width(model, num_experts=15, noise_std=0.1, seed=0)
    assert wider.config.num_experts_per_tok == 6
    assert_close(all_logits(wider), all_logits(model), 1e-5)


def test_query_heads_keep_their_key_heads():
    model = kind("plain")
    wider = grow_model_width(model, num_attention_heads=16, num_key_value_heads=4)
    old, new = NamedWeights(model), NamedWeights(wider)
    base = "model/layers_0/self_attn"
    of_key = {new[f"{base}/k_proj/kernel"][:, g].tobytes(): g for g in range(4)}
    assert len(of_key) == 2
    for head in range(16):
        copies = [
            h
            for h in range(4)
            if np.array_equal(
                new[f"{base}/q_proj/kernel"][:, head], old[f"{base}/q_proj/kernel"][:, h]
            )
        ]
        (source,) = copies
        assert np.array_equal(
            new[f"{base}/k_proj/kernel"][:, head // 4],
            old[f"{base}/k_proj/kernel"][:, source // 2],
        )


def test_noise_tells_copies_apart_where_they_are_read():
    model = kind("plain")
    name = "model/layers_0/mlp/down_proj/kernel"
    old = NamedWeights(model)[name]
    wider = grow_model_width(model, intermediate_size=40, noise_std=0.1, seed=0)
    new = NamedWeights(wider)[name]
    up = NamedWeights(wider)["model/layers_0/mlp/up_proj/kernel"]
    twin = {}
    for unit, column in enumerate(up.T):
        twin.setdefault(column.tobytes(), []).append(unit)
    assert len(twin) == 20 and max(map(len, twin.values())) > 2
    for source, units in enumerate(twin.values()):
        assert_close(new[units].sum(0), old[source], 1e-6)
        assert len(units) == 1 or (new[units[0]] != new[units[1]]).all()


def test_noise_is_relative_to_what_it_is_put_on():
    model = kind("plain")
    wider = NamedWeights(grow_model_width(model, hidden_size=48, noise_std=0.1, seed=0))
    for name in ("model/layers_0/self_attn/q_proj/kernel", "lm_head/kernel"):
        old = NamedWeights(model)[name]
        noise = 2 * wider[name] - np.concatenate([old, old])
        # Of two copies the second has the negative noise of the first, half of their difference.
        assert noise.std() / old.std() == pytest.approx(0.1 * 0.5**0.5, rel=0.1)


def test_it_learns_and_is_kept(tmp_path):
    model = small(**{**PLAIN, **ONE_FULL})
    before = snapshot(model)
    wider = grow_model_width(model, hidden_size=48, noise_std=0.1, name="wider")
    assert wider.name == "wider"
    path = tmp_path / "wider.keras"
    wider.save(path)
    assert np.array_equal(all_logits(keras.saving.load_model(path)), all_logits(wider))
    assert_learns(wider)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hidden_size": 12}, "hidden_size"),
        ({"hidden_size": 36}, "hidden_size"),
        ({"intermediate_size": 19}, "intermediate_size"),
        ({"num_attention_heads": 6}, "num_attention_heads"),
        ({"num_key_value_heads": 8}, "num_attention_heads"),
        ({"num_experts": 8}, "num_experts"),
        ({"moe_intermediate_size": 24}, "moe_intermediate_size"),
        ({"linear_num_key_heads": 4}, "linear_num_key_heads"),
        ({"hidden_size": 48, "noise_std": -1.0}, "noise_std"),
        ({"hidden_size": 48, "seed": -1}, "seed"),
        ({}, "at least one size"),
    ],
)
def test_wrong_arguments_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        grow_model_width(kind("plain"), **arguments)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="`model`"):
        grow_model_width(kind("plain").backbone, hidden_size=48)
    thinks = small(**{**DENSE, **ONE_FULL}, etd=ETDConfig(0, 1, 0, use_lora_experts=True))
    with pytest.raises(ValueError, match="LoRA experts"):
        grow_model_width(thinks, hidden_size=48)
