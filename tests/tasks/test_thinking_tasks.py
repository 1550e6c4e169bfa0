"""Models that think: training, evaluation, generation and files."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import (
    ETDConfig,
    MTPConfig,
    Qwen3Next,
    Qwen3NextClassifier,
    create_qwen3_next_efficient,
    create_qwen3_next_model,
    create_qwen3_next_performance,
    describe,
    wrap_model_with_mtp,
    wrap_transformer_with_etd,
)
from tests.support.mtp_models import DENSE, LIGHT
from tests.support.running import to_numpy
from tests.support.small_models import TWO_LAYERS, assert_greedy, random_ids, small

IDS = random_ids(4, 16)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
HALF = ETDConfig(1, 1, 0, max_think_iterations=3)
# For one layer, which thinks, in tests that compile a training step.
ALONE = ETDConfig(0, 1, 0, max_think_iterations=3)
NAMES = {"think_iterations", "early_exit", "exit_confidence"}
# What `create_qwen3_next_...` build quickly.
TINY = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_experts": 0}


@functools.cache
def pair():
    """A model without a loop, and one with a loop and MTP on its weights."""
    base = small(**TWO_LAYERS, **DENSE)
    model = wrap_model_with_mtp(
        wrap_transformer_with_etd(base, HALF),
        MTPConfig(num_predict_tokens=1, speculation_lookahead=1),
    )
    score = model.backbone.think_loop.halting_unit.score.kernel
    score.assign(np.random.default_rng(7).normal(size=score.shape) * 0.4)
    return base, model


def test_wrapping_shares_every_weight():
    base, model = pair()
    shared = {id(v) for v in base.weights}
    new = [v.path for v in model.weights if id(v) not in shared]
    assert shared <= {id(v) for v in model.weights}
    assert all("mtp" in path or "think_loop" in path for path in new)


def test_speculation_is_greedy_and_one_iteration_is_the_base():
    base, model = pair()
    plain, stats = model.generate(PROMPTS, 10, use_speculative=False)
    drafted, speculative = model.generate(PROMPTS, 10, use_speculative=True)
    once, single = model.generate(PROMPTS, 10, use_speculative=False, think_iterations=1)
    for a, b in zip(plain, drafted):
        np.testing.assert_array_equal(a, b)
    assert_greedy(base, PROMPTS, once)
    assert 1 < stats["think_iterations"] < 3
    assert stats["think_iterations"] == pytest.approx(speculative["think_iterations"])
    assert single["think_iterations"] == 1
    assert model.get_metrics()["etd"] == {name: single[name] for name in NAMES}


def test_generation_is_the_uncached_forward_pass():
    _, model = pair()
    tokens, _ = model.generate(PROMPTS, 10, use_speculative=False)
    assert_greedy(model, PROMPTS, tokens)


def test_fit_and_evaluate_log_depth_and_evaluate_takes_one():
    model = small(**LIGHT, etd=ALONE.replace(warmup_steps=4))
    model.compile("sgd")
    logs = model.fit(IDS, epochs=3, batch_size=4, verbose=0).history
    assert NAMES <= set(logs)
    assert logs["think_iterations"][0] == 1  # the warm-up begins there
    assert int(model.backbone.think_loop.steps.value) == 3
    found = {k: model.evaluate(IDS, verbose=0, think_iterations=k) for k in (1, 3)}
    assert int(model.backbone.think_loop.steps.value) == 3
    assert model.evaluate(IDS, verbose=0) == pytest.approx(found[3], abs=1e-6)
    assert abs(found[1] - found[3]) > 1e-4
    assert model.get_metrics()["etd"]["think_iterations"] > 1
    with pytest.raises(ValueError, match="think_iterations"):
        model.evaluate(IDS, verbose=0, think_iterations=4)


def test_files_hold_all_of_it(tmp_path):
    _, model = pair()
    expected = to_numpy(model(IDS))
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        Qwen3Next.from_preset(tmp_path / "preset", progress=False),
    ):
        assert loaded.config == model.config
        np.testing.assert_allclose(to_numpy(loaded(IDS)), expected, atol=1e-6)
    with pytest.raises(ValueError, match="etd="):
        model.export_to_transformers(tmp_path / "published")


def test_a_published_checkpoint_gets_a_loop_that_begins_as_the_base(tmp_path):
    base, _ = pair()
    base.export_to_transformers(tmp_path)
    model = Qwen3Next.from_preset(tmp_path, progress=False, etd=HALF)
    assert {path.split("/")[1] for path in model.coverage_report.initialised} == {"think_loop"}
    once = to_numpy(model(IDS, think_iterations=1))
    np.testing.assert_allclose(once, to_numpy(base(IDS)), atol=1e-6)


def test_a_classifier_thinks_and_logs_it():
    base = small(Qwen3NextClassifier, **LIGHT, num_labels=3)
    model = wrap_transformer_with_etd(base, ALONE.replace(ponder_cost=0.1))
    assert model.score is base.score
    model.compile("sgd", metrics=["accuracy"])
    logs = model.fit(IDS, np.array([0, 1, 2, 0]), verbose=0).history
    assert {"accuracy", *NAMES} <= set(logs)
    assert 1 <= model.get_metrics()["etd"]["think_iterations"] <= 3
    once = model.predict(IDS, verbose=0, think_iterations=1)
    assert np.abs(once - model.predict(IDS, verbose=0)).max() > 1e-6


def test_pondering_has_a_price():
    losses = []
    for cost in (0.0, 0.5):
        model = small(**LIGHT, etd=ALONE.replace(ponder_cost=cost))
        output = model(IDS, labels=IDS)
        losses.append(float(output.loss))
    ponder = to_numpy(output.thinking.ponder)
    assert losses[1] - losses[0] == pytest.approx(0.5 * ponder.mean(), rel=1e-5)
    assert float(output.ponder_loss) == pytest.approx(0.5 * ponder.mean(), rel=1e-5)


def test_every_pass_is_described():
    once = describe("tiny", **TINY)
    thinking = describe("tiny", **TINY, etd=ETDConfig.from_ratio(4, 0.25, 0.5, 0.25))
    assert (once.layer_passes, thinking.layer_passes) == (4, 2 + 2 * 5)
    row = {d.cache_bytes_per_row["float32"] for d in (once, thinking)}
    assert max(row) == pytest.approx(min(row) / 3 * (1 + 2 * 5), rel=1e-6)  # 3 DeltaNet layers


def test_presets_of_settings(capsys):
    efficient = create_qwen3_next_efficient("tiny", **TINY)
    etd, mtp = efficient.config.etd, efficient.config.mtp
    assert (etd.max_think_iterations, etd.confidence_threshold) == (2, 0.8)
    assert (etd.n_encoder_layers, etd.n_think_layers, mtp.num_predict_tokens) == (1, 2, 3)
    assert (etd.num_lora_experts, etd.lora_expert.rank, etd.use_layer_router) == (2, 8, True)
    trains = {v.path for v in efficient.trainable_variables}
    assert all("mtp" in path or "think_loop" in path for path in trains)
    share = sum(np.prod(v.shape) for v in efficient.trainable_weights) / efficient.count_params()
    assert f"({100 * share:.2f} %)" in capsys.readouterr().out
    performance = create_qwen3_next_performance("tiny", use_mtp=False, **TINY)
    etd = performance.config.etd
    assert (etd.max_think_iterations, etd.confidence_threshold) == (5, 0.95)
    assert (etd.num_lora_experts, etd.lora_expert.rank, etd.use_layer_router) == (8, 32, True)
    left = {v.path.rpartition("/")[2] for v in performance.non_trainable_weights}
    assert left == {"selection_bias", "selected", "steps"}


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: wrap_transformer_with_etd(pair()[1], HALF), "already"),
        (lambda: wrap_transformer_with_etd(pair()[0].backbone, HALF), "Qwen3NextBackbone"),
        (lambda: wrap_transformer_with_etd(pair()[0], ETDConfig()), "num_layers=2"),
        (lambda: create_qwen3_next_model("tiny", no_such=1, **TINY), "no_such"),
        (lambda: create_qwen3_next_model("no such model"), "no such model"),
        (lambda: create_qwen3_next_model("tiny", use_etd=False, etd=HALF), "use_etd"),
        (lambda: create_qwen3_next_model("tiny", use_etd="yes"), "use_etd"),
        (lambda: pair()[1].generate(PROMPTS, 2, think_iterations=4), "think_iterations"),
        (lambda: pair()[0].generate(PROMPTS, 2, think_iterations=1), "etd=None"),
    ],
)
def test_what_cannot_be_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
