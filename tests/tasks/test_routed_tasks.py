"""Models with layer routers and LoRA experts: training, evaluation and files."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import (
    ETDConfig,
    MTPConfig,
    Qwen3Next,
    Qwen3NextClassifier,
    describe,
    wrap_transformer_with_etd,
)
from tests.support.mtp_models import DENSE, LIGHT
from tests.support.routed_models import ETD, EXPERTS, KINDS, ROUTES, learn
from tests.support.running import to_numpy
from tests.support.small_models import ONE_LAYER, assert_greedy, random_ids, small

IDS = random_ids(4, 16)
LABELS = np.where((np.arange(16) < 7) | (np.arange(16) == 15), -100, np.roll(IDS, -1, axis=1))
# The labels ask for what comes behind the first eight tokens.
ASKED = {"token_ids": IDS, "prompt_mask": np.tile(np.arange(16) < 8, (4, 1))}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1], [30, 41], [17, 3, 59, 20, 11]]
# One layer, which thinks, for tests that compile a training step.
ONE = {**ONE_LAYER, "layer_types": ("full_attention",)}
LOOP = {**KINDS["both"], **ETD, "n_encoder_layers": 0, "n_think_layers": 1, "adaptive_depth": False}
LOOP |= {"lora_expert": {"rank": 4, "target_modules": ["q_proj"]}}


def one(model=Qwen3Next, etd=(), **changes):
    made = small(model, **{**ONE, **changes}, etd={**LOOP, **dict(etd)})
    learn(made.backbone.think_loop, seed=3)  # skips, runs and repeats it
    return made


def values(model):
    return {v.path: to_numpy(v.value).copy() for v in model.variables}


def thinking(model):
    """What routers and experts decide for `ASKED`, and the hidden states it leads to."""
    output = model.backbone(ASKED, full_output=True)
    return output.thinking, to_numpy(output.hidden)


@pytest.fixture(scope="module")
def warmed_up():
    """A model that was trained until its routers and experts took part, and the logs of that."""
    model = one(etd={"router_warmup_steps": 2, "expert_warmup_steps": 3})
    model.compile("sgd")
    before = values(model)
    logs = model.fit(IDS, LABELS, epochs=3, verbose=0).history
    after = values(model)
    return model, logs, {path for path in before if np.array_equal(before[path], after[path])}


def test_all_but_routers_learn_while_they_warm_up(warmed_up):
    *_, same = warmed_up
    assert any("/router_0/" in path for path in same)
    assert all("router" in path or "seed" in path for path in same), same


def test_warm_up_is_counted_in_training_only(warmed_up):
    model, logs, _ = warmed_up
    assert logs["router_execute"][:2] == [1.0, 1.0] and logs["router_execute"][2] < 1
    model.evaluate(IDS, LABELS, verbose=0)
    assert int(model.backbone.think_loop.steps.value) == 3


def test_a_prompt_in_training_is_what_comes_before_the_first_label(warmed_up):
    model, *_ = warmed_up
    logs = model.evaluate(IDS, LABELS, verbose=0, return_dict=True)
    route = to_numpy(thinking(model)[0].route)
    shares = [logs[f"router_{name}"] for name in ("skip", "execute", "repeat")]
    np.testing.assert_allclose(shares, np.bincount(route.ravel(), minlength=3) / 4)
    assert model.get_metrics()["etd"]["router_actions"] == [
        np.bincount(route[:, 0], minlength=3).tolist()
    ]
    output = model(ASKED, labels=np.where(np.arange(16) < 8, -100, IDS))
    loss = to_numpy(output.loss) - 0.01 * to_numpy(output.aux_loss)  # `evaluate` leaves that out
    assert float(loss) == pytest.approx(logs["loss"], rel=1e-5)


def test_files_hold_decisions_and_the_steps_of_the_warm_up(warmed_up, tmp_path):
    model, *_ = warmed_up
    expected, hidden = thinking(model)
    assert len(np.unique(to_numpy(expected.route))) > 1
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        Qwen3Next.from_preset(tmp_path / "preset", progress=False),
    ):
        assert int(loaded.backbone.think_loop.steps.value) == 3
        assert loaded.config == model.config
        found, same = thinking(loaded)
        np.testing.assert_array_equal(to_numpy(found.route), to_numpy(expected.route))
        np.testing.assert_array_equal(same, hidden)


def test_routers_experts_and_gates_learn_and_the_selection_bias_follows_the_sign_rule():
    router = {**ROUTES["layer_router"], "use_gumbel": True}
    budget = {"budget_weight": 2.0, "compute_budget": 0.2}
    experts = {"rank": 4, "bias_update_rate": 0.25, "target_modules": ["q_proj"]}
    model = one(etd={"layer_router": {**router, **budget}, "lora_expert": experts}, **DENSE)
    before, passes = values(model), mean_passes(model)
    model.compile(keras.optimizers.SGD(0.01))
    model.fit(IDS, LABELS, batch_size=4, verbose=0)
    counts = np.array(model.get_metrics()["etd"]["expert_selections"])
    after = values(model)
    path = "model/think_loop/expert_router/"
    moved = after[path + "selection_bias"] - before[path + "selection_bias"]
    np.testing.assert_array_equal(moved, 0.25 * np.sign(counts.mean() - counts))
    assert not after[path + "selected"].any() and counts.sum() == 3 * 4
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert all("selected" in path or "seed" in path for path in same), same
    model.fit(IDS, LABELS, epochs=3, verbose=0)
    assert mean_passes(model) < passes - 0.01


def mean_passes(model):
    logits = to_numpy(thinking(model)[0].route_logits)
    return (to_numpy(keras.ops.softmax(logits)) @ np.arange(3)).mean()


def test_new_parts_with_a_loop_and_drafts_generate_what_the_model_did():
    mtp = MTPConfig(num_predict_tokens=1, speculation_lookahead=1)
    base = small(**{**ONE_LAYER, **DENSE}, mtp=mtp)
    once = ETDConfig(0, 1, 0, max_think_iterations=1, adaptive_depth=False, **ROUTES, **EXPERTS)
    model = wrap_transformer_with_etd(base, once)
    tokens, _ = model.generate(PROMPTS, 8, use_speculative=True)
    assert_greedy(base, PROMPTS, tokens)


def test_a_classifier_decides_from_the_whole_row():
    model = one(Qwen3NextClassifier, num_labels=3)
    asked = {"token_ids": IDS, "prompt_mask": np.ones((4, 16), bool)}
    route = to_numpy(model.backbone(asked, full_output=True).thinking.route)
    assert (route != 1).any()
    whole = to_numpy(model(IDS))
    np.testing.assert_allclose(to_numpy(model(IDS, route=route)), whole, atol=1e-5)
    assert np.abs(to_numpy(model(IDS, route=[1])) - whole).max() > 1e-3


def test_second_runs_have_caches_that_are_counted():
    fields = dict(num_layers=4, num_experts=0, etd={**ETD, "n_decoder_layers": 1})
    plain = describe("tiny", **fields)
    with_routers = describe(
        "tiny", **{**fields, "etd": {**fields["etd"], "use_layer_router": True}}
    )
    # Layers 1 and 2, DeltaNets, run three times: 2 + 6 caches without routers, 2 + 12 with them.
    ratio = with_routers.cache_bytes_per_row["float32"] / plain.cache_bytes_per_row["float32"]
    assert ratio == pytest.approx((1 + 12) / (1 + 6))
    assert with_routers.layer_passes == plain.layer_passes


def test_decisions_without_routers_are_refused():
    model = small(**LIGHT)
    with pytest.raises(ValueError, match="use_layer_router"):
        model.generate(PROMPTS, 2, route=[1])
    with pytest.raises(ValueError, match="use_lora_experts"):
        model.generate(PROMPTS, 2, branch=0)
    with pytest.raises(ValueError, match="use_layer_router"):
        model.get_router_stats()


@pytest.mark.parametrize(
    ("decided", "message"),
    [
        ({"route": np.full((4, 1), 7)}, "`route` must hold actions.*Received: route="),
        ({"route": np.full((4, 1), -1)}, "`route` must hold actions.*Received: route="),
        ({"branch": np.full(4, 9)}, "`branch` must be -1 .*Received: branch="),
        ({"branch": np.full((4, 2), 9)}, "`branch` must be -1 .*Received: branch="),
        ({"branch": np.full(4, 0.5)}, "`branch` must be integers.*Received: branch"),
    ],
)
def test_decisions_that_cannot_be_followed_are_refused_before_a_step(decided, message):
    model, x = undecided(), {"token_ids": IDS, **decided}
    calls = [
        lambda: model(x),
        lambda: model.fit(x, verbose=0),
        lambda: model.evaluate(x, verbose=0),
        lambda: model.predict(x, verbose=0),
        lambda: model.train_on_batch(x),
        lambda: model.test_on_batch(x),
        lambda: model.predict_on_batch(x),
        lambda: model.extend(x, model.init_cache(4, 16)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@functools.cache
def undecided():
    model = one()
    model.compile("sgd")
    return model
