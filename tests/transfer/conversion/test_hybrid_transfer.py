"""From a Qwen3 to the hybrid: what is kept, what is made, and what is refused."""

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next
from qwen3_next.config import CrossArchTransferConfig, ETDConfig, HybridAttentionConfig, MTPConfig
from qwen3_next.models.weight_table import weight_table
from qwen3_next.transfer.conversion.hybrid_transfer import (
    create_full_hybrid_model,
    create_hybrid_from_qwen3,
    transfer_qwen3_to_hybrid,
)
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import logits_once, random_ids
from tests.support.teachers import QWEN3_MOE, qwen3, weights_of

IDS = random_ids(2, 12)
NONE = {"deltanet_layer_pattern": ()}
HALF = HybridAttentionConfig(deltanet_layer_pattern=(0,), pattern_period=2)


@pytest.fixture(scope="module")
def teacher():
    return qwen3()


def converted(source, hybrid=None, **changes):
    config = CrossArchTransferConfig(hybrid_attention=hybrid or {}, **changes)
    return create_hybrid_from_qwen3(source, config, progress=False)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, QWEN3_MOE])
def test_without_converted_layers_the_logits_are_the_teachers(changes):
    teacher = qwen3(**changes)
    hybrid = converted(teacher, NONE)
    assert hybrid.config.attention_type == "gated_attention"
    assert np.abs(logits_once(hybrid, IDS) - logits_once(teacher, IDS)).max() < 1e-4


def test_dense_networks_become_experts_on_the_way():
    teacher = qwen3(num_layers=2)
    hybrid = converted(teacher, NONE, num_experts=4, num_experts_per_tok=2)
    assert hybrid.config.num_experts == 4
    assert np.abs(logits_once(hybrid, IDS) - logits_once(teacher, IDS)).max() < 1e-4
    report = hybrid.coverage_report
    listed = [*report.copied, *report.transformed, *report.initialised]
    assert sorted(listed) == sorted(row.path for row in weight_table(hybrid.config))
    assert {path for path in report.initialised} == {
        f"model/layers_{i}/mlp/gate/kernel" for i in (0, 1)
    }
    noisy = converted(teacher, NONE, num_experts=4, expert_init_noise=0.1)
    assert np.abs(logits_once(noisy, IDS) - logits_once(teacher, IDS)).max() > 1e-3


def test_gate_strategies_stay_within_their_bounds_and_differ(teacher):
    expected = logits_once(teacher, IDS)

    def differs(strategy, **hybrid):
        model = converted(teacher, {**NONE, **hybrid}, gate_init_strategy=strategy)
        return np.abs(logits_once(model, IDS) - expected).max() / np.abs(expected).max()

    assert differs("zero") < 1e-5
    assert differs("zero", gate_bias=True, gate_init_value=1.5) < 1e-5
    # Each of four layers gives attention a factor of sigmoid(8) = 1 - 3.4e-4.
    assert 1e-5 < differs("ones", gate_bias=True) < 4 * 3.4e-4
    assert 4 * 3.4e-4 < differs("ones", gate_bias=True, gate_init_value=3.0)
    assert 1e-4 < differs("small") < 0.1


def test_gate_strategies_never_touch_the_decay(teacher):
    biased = {"gate_bias": True}
    models = [converted(teacher, biased, gate_init_strategy=s) for s in ("zero", "small", "ones")]
    first, *others = (weights_of(model) for model in models)
    for other in others:
        differing = {path for path in first if not np.array_equal(first[path], other[path])}
        assert differing and all(path.startswith("model/layers_3/self_attn") for path in differing)


def test_a_half_life_halves_the_state(teacher):
    model = converted(teacher, {"half_life": 10.0})
    decay = np.exp(-np.log1p(np.exp(weights_of(model)["model/layers_1/linear_attn/dt_bias"])))
    np.testing.assert_allclose(decay**10, 0.5, rtol=1e-5)
    assert not weights_of(model)["model/layers_1/linear_attn/A_log"].any()


def test_queries_and_keys_point_where_the_teachers_do(teacher):
    source, x = weights_of(teacher), np.random.default_rng(0).normal(size=24)
    for qk_norm in (True, False):
        made = weights_of(converted(teacher, {"qk_norm": qk_norm}))
        kernel = made["model/layers_1/linear_attn/in_proj_qkvz/kernel"]
        for name, place in (("q", slice(0, 8)), ("k", slice(8, 16))):
            base = f"model/layers_1/self_attn/{name}"
            per_head = np.einsum("d,dhk->hk", x, source[f"{base}_proj/kernel"])
            wanted = per_head * source[f"{base}_norm/scale"]
            wanted = np.repeat(wanted, 4 // len(wanted), axis=0)
            found = np.einsum("d,dhk->hk", x, kernel[..., place])
            unit = found / np.linalg.norm(found, axis=-1, keepdims=True)
            wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
            assert (np.abs(unit - wanted).max() < 1e-5) == qk_norm


def test_every_weight_is_accounted_for_once(teacher):
    model = converted(teacher, {"qk_norm": False})
    report = model.coverage_report
    listed = [*report.copied, *report.transformed, *report.initialised]
    assert sorted(listed) == sorted(row.path for row in weight_table(model.config))
    norms = {f"model/layers_{i}/self_attn/{n}_norm/scale" for i in range(3) for n in "qk"}
    assert set(report.unused) == norms
    assert not converted(teacher).coverage_report.unused
    assert "half-life of 64 tokens" in str(report)
    unused = converted(teacher, copy_ffn_weights=False).coverage_report.unused
    assert len(unused) == 12
    assert all("/mlp/" in path and "not copied" in why for path, why in unused.items())


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("copy_attention_weights", ("self_attn", "linear_attn")),
        ("copy_ffn_weights", ("mlp",)),
        ("copy_norm_weights", ("layernorm", "model/norm")),
        ("copy_embedding_weights", ("embed_tokens", "lm_head")),
    ],
)
def test_what_is_not_copied_is_that_of_a_new_model(teacher, flag, parts):
    full, without = converted(teacher), converted(teacher, **{flag: False})
    full, made = weights_of(full), weights_of(without)
    named = {path for path in made if any(part in path for part in parts)}
    assert named <= set(without.coverage_report.initialised)
    assert {path for path in made if not np.array_equal(made[path], full[path])} <= named
    for path in named:
        if "norm" in path:
            assert np.ptp(made[path]) == 0
        elif path.endswith("kernel") or path.endswith("embeddings"):
            assert made[path].std() == pytest.approx(0.2, rel=0.2)
            assert not np.array_equal(made[path], full[path])


@pytest.mark.parametrize("heads", [(4, 2), (2, 1)])
def test_fewer_heads_run(heads):
    hybrid = {"n_heads": heads[0], "n_kv_heads": heads[1], "query_reduction": "first"}
    hybrid |= {"output_gate_init": "random", "layer_types": ("linear_attention", "full_attention")}
    model = converted(qwen3(num_layers=2), hybrid)
    assert model.config.linear_num_value_heads == heads[0]
    assert np.isfinite(logits_once(model, IDS)).all()


def test_a_directory_and_a_model_give_the_same(teacher, tmp_path):
    expected = weights_of(converted(teacher))
    teacher.export_to_transformers(tmp_path / "published")
    teacher.save_to_preset(tmp_path / "own")
    for name in ("published", "own"):
        found = weights_of(create_hybrid_from_qwen3(str(tmp_path / name), progress=False))
        assert all(np.array_equal(found[path], expected[path]) for path in expected)
    named = CrossArchTransferConfig(source_model=str(tmp_path / "own"))
    assert transfer_qwen3_to_hybrid(config=named, progress=False).count_params() > 0


def test_half_precision_is_rounded_once():
    teacher = qwen3(num_layers=2, dtype="bfloat16")
    exact = weights_of(converted(qwen3(num_layers=2), HALF.to_dict()))
    wide = weights_of(
        transfer_qwen3_to_hybrid(
            teacher, CrossArchTransferConfig(hybrid_attention=HALF), dtype="float32", progress=False
        )
    )
    path = "model/layers_0/linear_attn/in_proj_qkvz/kernel"
    # Of two factors that were rounded before, and no more.
    np.testing.assert_allclose(wide[path], exact[path], rtol=2.1 * 2**-8, atol=1e-9)


def test_the_source_stays_as_it_is():
    teacher = qwen3(num_layers=2)
    before = weights_of(teacher)
    model = create_hybrid_from_qwen3(teacher, HALF, progress=False)
    model.compile("adamw", **CHEAPEST_STEPS)
    model.train_on_batch(IDS)
    assert all(np.array_equal(value, before[path]) for path, value in weights_of(teacher).items())


def test_a_hybrid_is_a_model_like_any_other(teacher, tmp_path):
    model = converted(teacher)
    expected = logits_once(model, IDS)
    model.save(tmp_path / "hybrid.keras")
    assert np.array_equal(
        logits_once(keras.saving.load_model(tmp_path / "hybrid.keras"), IDS), expected
    )
    model.export_to_transformers(tmp_path / "published")
    again = Qwen3Next.from_preset(tmp_path / "published", progress=False)
    assert again.config == model.config.replace(dropout=0.0)
    np.testing.assert_allclose(logits_once(again, IDS), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"attention_gate_bias=0\.0"):
        converted(teacher, {"gate_bias": True}).export_to_transformers(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_hybrid_learns_to_think_and_to_look_ahead():
    model = create_full_hybrid_model(
        qwen3(num_layers=2),
        config=HALF,
        etd=ETDConfig(0, 1, 1, max_think_iterations=2),
        mtp=MTPConfig(1, "shared_lm_head", speculation_lookahead=1),
        progress=False,
    )
    assert "half-life" in str(model.coverage_report)
    model.compile("adamw", **CHEAPEST_STEPS)
    losses = [model.train_on_batch(IDS) for _ in range(3)]
    assert losses[2] < losses[0]


def test_layer_stats_are_counted(teacher):
    stats = create_hybrid_from_qwen3(teacher, progress=False).get_layer_stats()
    assert (stats["deltanet_layers"], stats["gated_attention_layers"]) == (3, 1)
    assert HybridAttentionConfig().layer_types_of(36).count("linear_attention") == 27
    assert teacher.get_layer_stats()["group_query_attention_layers"] == 4


@pytest.mark.parametrize(
    ("changes", "hybrid", "message"),
    [
        ({"normalization_type": "zero_centered_rms_norm"}, {}, "must be a Qwen3 .*normalization"),
        ({"attention_type": "gated_attention"}, {}, "must be a Qwen3 .*attention_type"),
        ({"full_attention_interval": 2}, {}, "attention in all layers"),
        ({"mtp": MTPConfig()}, {}, "must be a Qwen3 .*mtp"),
        ({}, {"deltanet_layer_pattern": (0, 1, 2, 3)}, "allow_no_attention"),
        ({"num_layers": 3}, {}, "allow_no_attention"),
        ({}, {"layer_types": ("full_attention",) * 3}, "`layer_types` must name a kind"),
        ({}, {"n_heads": 3}, "`n_heads` must be a divisor"),
        ({}, {"n_kv_heads": 3}, "`n_kv_heads` must be a divisor"),
        ({}, {"head_dim": 16}, "`head_dim` must be None or the source's 8"),
        ({}, {"decay_init": "attention_distance"}, "`decay_init=.*needs `calibration`"),
        ({}, {"output_gate_init": "least_squares"}, "`output_gate_init=.*needs `calibration`"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(changes, hybrid, message):
    with pytest.raises(ValueError, match=message):
        converted(qwen3(**changes), hybrid)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: converted(3), "`source` must be a Qwen3Next, a directory.*int"),
        (lambda: converted("nowhere"), "`preset` must be a directory"),
        (lambda: converted(qwen3(**QWEN3_MOE), num_experts=4), "`num_experts` must be 0"),
        (lambda: create_hybrid_from_qwen3(qwen3(), {}), "`config` must be a HybridAttentionConfig"),
        (lambda: create_hybrid_from_qwen3(qwen3(), hidden_size=3), "Received: .'hidden_size'"),
        (lambda: create_full_hybrid_model(qwen3(), False, etd=ETDConfig(1, 2, 1)), "use_etd"),
        (lambda: create_full_hybrid_model(qwen3(), use_mtp=False, mtp=MTPConfig()), "use_mtp"),
        (lambda: create_hybrid_from_qwen3(qwen3(), calibration=[[99]]), "Token ids must be"),
        (
            lambda: create_hybrid_from_qwen3(qwen3(), HybridAttentionConfig(()), IDS),
            "`calibration` must be None where no layer",
        ),
        (
            lambda: create_hybrid_from_qwen3(
                qwen3(),
                HybridAttentionConfig(decay_init="half_life", output_gate_init="zero"),
                IDS,
            ),
            "`calibration` must be None where nothing",
        ),
        (lambda: HybridAttentionConfig(gate_init_value=1.0), "`gate_init_value` needs"),
        (lambda: HybridAttentionConfig(deltanet_layer_pattern=[4]), "below `pattern_period`"),
        (lambda: CrossArchTransferConfig(gate_init_strategy="ones"), "needs `gate_bias=True`"),
        (lambda: CrossArchTransferConfig(num_experts=1), "`num_experts_per_tok` must be at most"),
        (lambda: CrossArchTransferConfig(hybrid_attention={"heads": 1}), "Unknown fields"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
