"""Routes through the think layers, and LoRA experts in them: exact for every mixture of rows."""

import functools
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3NextBackbone, RouterAction
from qwen3_next.layers.think_routing import Routes, run_routed
from tests.support.routed_models import (
    DENSE,
    ETD,
    IDS,
    KINDS,
    LAYERS,
    LENGTH,
    MIXED,
    ONE_RUNS,
    PROMPT,
    PROMPTS,
    ROUTE,
    ROUTES,
    TOLERANCE,
    WHOLE,
    broken_layer,
    shared_routed,
)
from tests.support.running import BACKEND, assert_close, eagerly, run, to_numpy
from tests.support.small_models import ONE_LAYER, random_ids, small
from tests.support.thinking_models import hidden, think


def decisions(model, inputs=WHOLE):
    output = think(model, inputs).thinking
    return [to_numpy(x) for x in (output.route, output.selections) if not isinstance(x, tuple)]


@pytest.mark.parametrize("kind", MIXED)
def test_rows_take_different_routes_and_experts(kind):
    for found in decisions(shared_routed(kind)):
        assert len(np.unique(found, axis=0)) > 1


def by_hand(model, actions, iterations):
    """All rows through the layers themselves, each as often as its action says."""
    x = to_numpy(model.embed_tokens(IDS))
    for _ in range(iterations):
        for layer, action in zip(model.decoder_layers, actions, strict=True):
            for _ in range(action):
                x = run(layer, x)
    return to_numpy(model.norm(x))


def test_a_route_given_by_hand_runs_as_given():
    model = shared_routed("routes")
    found = hidden(model, {"token_ids": IDS, "route": ROUTE})
    for row, actions in enumerate(ROUTE):
        assert_close(found[row], by_hand(model, actions, 3)[row], TOLERANCE)


@pytest.mark.parametrize("kind", MIXED)
def test_a_row_does_not_see_the_others(kind):
    model = shared_routed(kind)
    together = hidden(model, WHOLE)
    for row in range(4):
        same = {name: np.repeat(x[row : row + 1], 4, axis=0) for name, x in WHOLE.items()}
        assert_close(hidden(model, same)[0], together[row], TOLERANCE)


@pytest.mark.parametrize("kind", MIXED)
def test_what_follows_the_prompt_is_not_seen(kind):
    model = shared_routed(kind)
    changed = {**WHOLE, "token_ids": IDS.copy()}
    changed["token_ids"][:, PROMPT + 3 :] = random_ids(4, LENGTH - PROMPT - 3, seed=5)
    before, after = hidden(model, WHOLE), hidden(model, changed)
    assert_close(after[:, : PROMPT + 3], before[:, : PROMPT + 3], TOLERANCE)
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("kind", MIXED)
def test_without_a_prompt_nothing_is_seen_and_no_router_asked(kind):
    model = shared_routed(kind)
    changed = IDS.copy()
    changed[:, PROMPT:] = random_ids(4, LENGTH - PROMPT, seed=5)
    before, after = hidden(model, IDS), hidden(model, changed)
    assert_close(after[:, :PROMPT], before[:, :PROMPT], TOLERANCE)
    assert isinstance(think(model, IDS).thinking.route, tuple)


@pytest.mark.parametrize("kind", MIXED)
def test_padding_does_not_change_real_tokens(kind):
    model, rng = shared_routed(kind), np.random.default_rng(2)
    real = PROMPT + 3
    whole = hidden(model, WHOLE)[:, :real]  # a row that ends there: nothing sees what follows
    mask = np.stack([rng.permutation(np.arange(LENGTH) < real) for _ in range(4)])
    padded = {"token_ids": random_ids(4, LENGTH, seed=9), "padding_mask": mask}
    padded["token_ids"][mask] = IDS[:, :real].reshape(-1)
    padded["prompt_mask"] = rng.random((4, LENGTH)) < 0.5
    padded["prompt_mask"][mask] = PROMPTS[:, :real].reshape(-1)
    assert_close(hidden(model, padded)[mask].reshape(whole.shape), whole, TOLERANCE)


def test_a_layer_reaches_the_rows_that_run_it_and_no_others():
    with broken_layer(shared_routed("routes")) as model:
        found = hidden(model, {"token_ids": IDS, "route": np.zeros_like(ROUTE)})
        assert np.isfinite(found).all()
        found = hidden(model, {"token_ids": IDS, "route": ONE_RUNS})
        assert np.isfinite(found[:3]).all() and np.isnan(found[3]).all()


class Turn(NamedTuple):
    hidden: Any


@pytest.mark.parametrize(("actions", "turns"), [([0, 0], []), ([0, 1], [0]), ([1, 2], [0, 1])])
def test_a_turn_that_every_row_skips_is_not_computed(actions, turns):
    computed = []

    def run_turn(x, turn, active):
        if BACKEND == "jax":  # which traces both ways of a choice
            import jax

            jax.debug.callback(lambda: computed.append(turn))
        else:
            computed.append(turn)
        return Turn(x + 1.0)

    x, real = keras.ops.zeros((2, 3, 4)), keras.ops.ones((2, 3), "bool")
    routes = Routes(keras.ops.convert_to_tensor(np.array(actions, "int32")[:, None]), (), ())
    first, _ = run_routed(run_turn, lambda x, turn: Turn(x), x, routes, 0, real)
    to_numpy(first.hidden)
    if BACKEND == "jax":
        import jax

        jax.effects_barrier()
    assert sorted(computed) == turns


@functools.cache
def with_new_parts(kind, num_layers):
    """A base that thinks, and the same with new parts that have learned nothing."""
    adaptive = KINDS[kind].get("adaptive_depth", True)
    etd = {**ETD, "n_encoder_layers": 0, "n_think_layers": num_layers, "adaptive_depth": adaptive}
    layers = {"num_layers": num_layers, "layer_types": LAYERS["layer_types"][:num_layers]}
    base = small(Qwen3NextBackbone, **layers, **DENSE, etd=etd)
    model = Qwen3NextBackbone(base.config.replace(etd={**etd, **KINDS[kind]}), base=base)
    if adaptive:
        score = base.think_loop.halting_unit.score.kernel
        model.think_loop.halting_unit.score.kernel.assign(score)
    return base, model


@pytest.mark.parametrize(("kind", "iterations"), [("both", 2), ("experts", 1)])
def test_new_parts_change_nothing_to_the_bit(kind, iterations):
    """Called layer by layer: a compiled program with a branch in it rounds in other places."""
    base, model = with_new_parts(kind, num_layers=1)
    with eagerly():
        found = to_numpy(model(WHOLE, think_iterations=iterations))
        expected = to_numpy(base(IDS, think_iterations=iterations))
    np.testing.assert_array_equal(found, expected)


def test_new_parts_change_nothing_in_a_program():
    base, model = with_new_parts("both", num_layers=2)
    assert_close(hidden(model, WHOLE), hidden(base, IDS), 1e-5)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"route": [1, 1, 1]}, "each of the 2 think layers"),
        ({"route": [[1, 1]] * 3}, "route"),
        ({"route": [1, 3]}, "0 .skip., 1 .execute. and 2 .repeat."),
        ({"route": [-1, 1]}, "skip"),
        ({"route": [1.0, 1.0]}, "skip"),
        ({"route": "skip"}, "route"),
        ({"branch": 3}, "-1 .none. to 2"),
        ({"branch": [0, 1]}, "branch"),
        ({"branch": [[0, 0]] * 4}, "each of the 3 iterations"),
        ({"branch": [[0, 0]] * 4, "think_iterations": 1}, "each of the 1 iterations"),
    ],
)
def test_decisions_that_cannot_be_followed_are_refused(inputs, match):
    with pytest.raises(ValueError, match=match):
        shared_routed("both")(IDS, **inputs)


@pytest.mark.parametrize("name", ["route", "branch"])
def test_a_decision_is_given_once(name):
    given = {"route": ROUTE, "branch": np.zeros(4, "int32")}[name]
    with pytest.raises(ValueError, match=f"Give the {name} once.*Received: `{name}`"):
        shared_routed("both")({"token_ids": IDS, name: given}, **{name: given})


def test_decisions_that_nothing_reads_are_refused():
    model = small(Qwen3NextBackbone, **ONE_LAYER)
    for inputs, match in (
        ({"route": ROUTE}, "use_layer_router"),
        ({"branch": ROUTE[:, 0]}, "use_lora_experts"),
        ({"prompt_mask": PROMPTS}, "use_layer_router"),
    ):
        with pytest.raises(ValueError, match=match):
            model({"token_ids": IDS, **inputs})
    model = shared_routed("both")
    with pytest.raises(ValueError, match="segment_ids"):
        model({**WHOLE, "segment_ids": np.zeros_like(IDS)})


def test_actions_have_names():
    assert [RouterAction.SKIP, RouterAction.EXECUTE, RouterAction.REPEAT] == [0, 1, 2]
    model = shared_routed("routes")
    route = (RouterAction.REPEAT, RouterAction.EXECUTE)
    found = hidden(model, IDS, route=route, think_iterations=1)
    assert_close(found, by_hand(model, route, 1), TOLERANCE)


def test_a_prompt_longer_than_its_windows_is_read_whole():
    """Only the last token of the prompt differs: some router must notice."""
    model = shared_routed("both")
    changed = {**WHOLE, "token_ids": IDS.copy()}
    changed["token_ids"][:, PROMPT - 1] = (IDS[:, PROMPT - 1] + 7) % 61
    logits = [to_numpy(think(model, x).thinking.route_logits) for x in (WHOLE, changed)]
    assert (np.abs(logits[0] - logits[1]).max((1, 2)) > 1e-3).all()
    assert ROUTES["layer_router"]["window_size"] * 4 < PROMPT
