"""What routes cost, pictures of routes and experts, and an expert built into its model."""

import functools

import numpy as np
import pytest

from qwen3_next import (
    Qwen3Next,
    Qwen3NextBackbone,
    Qwen3NextConfig,
    merge_lora_expert,
    plot_expert_shares,
    plot_router_actions,
    route_flops,
)
from qwen3_next.models.compiled import compile_with_weights
from tests.support.routed_models import BY_TOKEN, ETD, EXPERTS, FIXED, routed
from tests.support.running import assert_close, to_numpy, to_tensors
from tests.support.small_models import SMALL, random_ids, small

CONFIG = Qwen3NextConfig(**SMALL, etd=ETD)  # one layer, then two that think three times

# Weights that a token meets, counted from SMALL: D 24, and 2 of 5 experts.
MOE = 24 * 5 + 2 * 3 * 24 * 12 + 3 * 24 * 14 + 24
DELTANET = 4 * 2 * 52 + 2 * 4 + 24 * 2 * 72 + 24 * 2 * 4 + 10 + 4 * 10 * 24
ATTENTION = 24 * 4 * 16 + 2 * 24 * 2 * 8 + 4 * 8 * 24 + 2 * 8
LINEAR = 2 * (DELTANET + MOE + 2 * 24) + 6 * 4 * 16 * 10
HEAD = 2 * 24 * 61


def full(context=0):
    return 2 * (ATTENTION + 3 * 24 * 20 + 2 * 24) + 4 * 4 * 8 * (context + 1)


@pytest.mark.parametrize("iterations", [None, 1, 2])
def test_the_cost_of_a_route_is_that_of_its_passes(iterations):
    cost = functools.partial(route_flops, CONFIG, think_iterations=iterations)
    k = iterations or 3
    assert cost() == LINEAR + k * (full() + LINEAR) + HEAD
    assert cost([0, 2]) == LINEAR + k * 2 * LINEAR + HEAD
    assert cost([0, 0]) == LINEAR + HEAD
    assert cost(context=100) == LINEAR + k * (full(100) + LINEAR) + HEAD


def test_skipping_costs_less_and_repeating_more():
    skip, once, twice = route_flops(CONFIG, [[0, 1], [1, 1], [2, 1]])
    assert skip < once < twice
    assert twice - once == once - skip == 3 * full()


def test_expected_passes_cost_the_mean_of_the_routes():
    routes = np.array([[0, 1], [2, 2], [1, 0]])
    share = np.array([0.2, 0.5, 0.3])
    found = route_flops(CONFIG, share @ routes)
    np.testing.assert_allclose(found, share @ route_flops(CONFIG, routes), rtol=1e-12)
    assert found.shape == () and found.dtype == "float64"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route": [1]}, "each of the 2 think layers.*route="),
        ({"route": [1, -1]}, "each of the 2 think layers"),
        ({"route": [[[1, 1]]]}, "each of the 2 think layers"),
        ({"route": [np.inf, 1]}, "each of the 2 think layers"),
        ({"route": ["1", "1"]}, "each of the 2 think layers"),
        ({"route": [[1, 1], [1]]}, "`route` must be an array"),
        ({"context": -1}, "`context`"),
        ({"think_iterations": 4}, "`think_iterations`"),
        ({"config": CONFIG.replace(etd=None)}, "`config` must be .* think loop"),
        ({"config": "tiny"}, "`config` must be .* think loop"),
    ],
)
def test_what_has_no_cost_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        route_flops(**{"config": CONFIG, **changes})


def test_actions_are_drawn_as_shares_that_stand_on_each_other(tmp_path):
    axes = plot_router_actions([[3, 1, 0], [0, 2, 6]], tmp_path / "routes.png", first=4)
    skip, execute, repeat = ([bar.get_height() for bar in bars] for bars in axes.containers)
    assert (skip, execute, repeat) == ([0.75, 0], [0.25, 0.25], [0, 0.75])
    feet = [[bar.get_y() for bar in bars] for bars in axes.containers]
    assert feet == [[0, 0], [0.75, 0], [1, 0.25]]
    assert [bar.get_center()[0] for bar in axes.containers[0]] == [4, 5]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["skip", "execute", "repeat"]
    assert (tmp_path / "routes.png").stat().st_size > 0
    assert plot_router_actions([[1, 0, 0]], ax=axes) is axes


def test_experts_are_drawn_as_shares_beside_each_other(tmp_path):
    path = tmp_path / "experts.png"
    axes = plot_expert_shares([[3, 1], [0, 4]], ["sums", "products"], path)
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[0.75, 0.25], [0, 1]]
    centres = [[bar.get_center()[0] for bar in bars] for bars in axes.containers]
    np.testing.assert_allclose(centres, [[-0.2, 0.8], [0.2, 1.2]])
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.5]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sums", "products"]
    assert path.stat().st_size > 0
    one = plot_expert_shares([1, 2, 1], path=path)
    assert [bar.get_height() for bar in one.patches] == [0.25, 0.5, 0.25]
    assert one.get_legend() is None


@pytest.mark.parametrize(
    "counts", [[1, 2, 3], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3], [0, 0, 0]], [[np.inf, 1, 2]], "a"]
)
def test_actions_that_cannot_be_drawn_are_refused(counts):
    with pytest.raises(ValueError, match=r"`actions` must be counts.*Received: actions="):
        plot_router_actions(counts)


@pytest.mark.parametrize(
    "counts", [[], [0, 0], [[1, 2], [0, 0]], [[[1, 2]]], [-1, 5], [np.inf, 1], "a"]
)
def test_experts_that_cannot_be_drawn_are_refused(counts):
    with pytest.raises(ValueError, match=r"`selections` must be counts.*Received: selections="):
        plot_expert_shares(counts)


@pytest.mark.parametrize("labels", [["sums"], "ab", 5, [3, 4]])
def test_every_kind_needs_a_name(labels):
    with pytest.raises(ValueError, match="`labels` must name each of the 2 kinds"):
        plot_expert_shares([[1, 2], [3, 4]], labels)


def test_the_number_of_the_first_layer_is_one():
    with pytest.raises(ValueError, match="`first` must be"):
        plot_router_actions([[1, 2, 3]], first="a")


IDS = random_ids(3, 9)


@functools.cache
def adapted():
    return routed(Qwen3Next, "experts", etd=ETD, **SMALL)


@functools.cache
def program(model):
    return compile_with_weights(model, lambda inputs: model(inputs))


def logits(model, **inputs):
    return to_numpy(program(model)(to_tensors({"token_ids": IDS, **inputs})))


def values(model):
    return {v.path: to_numpy(v.value).copy() for v in model.variables}


def test_a_merged_expert_gives_the_logits_of_its_branch():
    model, branch = adapted(), np.full(3, 2, "int32")
    found = logits(merge_lora_expert(model, 2))
    expected = logits(model, branch=branch)
    assert_close(found, expected, 1e-5)
    assert np.abs(logits(model, branch=branch - 1) - expected).max() > 0.1


@pytest.mark.parametrize("expert", range(3))
def test_an_expert_goes_into_the_weights_that_it_changes_and_into_no_other(expert):
    model = adapted()
    before, scale = values(model), 32 / 4
    merged = merge_lora_expert(model, expert)
    after, experts = values(merged), model.backbone.think_loop.experts
    deltas = {}
    for layer, own in zip(model.backbone.think_loop.layers, experts):
        for name, one in own.items():
            a, b = (to_numpy(v.value).astype("float64") for v in (one.lora_a, one.lora_b))
            deltas[getattr(layer.mixer, name).kernel.path] = scale * a[:, expert] @ b[expert]
    assert len(deltas) == 6
    for path, array in after.items():
        delta = deltas.pop(path, np.zeros(array.shape)).reshape(array.shape)
        assert_close(array, before[path] + delta, 1e-6)
    assert deltas == {}
    assert not merged.config.etd.use_lora_experts and not any("lora" in path for path in after)


def test_the_model_itself_stays_as_it_is():
    model = adapted()
    before = values(model)
    merge_lora_expert(model, 0)
    after = values(model)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(after[path], before[path])


def test_a_merged_model_shares_no_array_with_the_first():
    """A training step may give the memory of its weights away."""
    model = adapted()
    arrays = {v.path: v.value for v in model.weights}
    for variable in merge_lora_expert(model, 0).weights:
        assert variable.value is not arrays[variable.path]


def test_what_is_frozen_is_so_in_the_merged_model():
    frozen = routed(Qwen3Next, "experts", freeze_backbone=True)
    merged = merge_lora_expert(frozen, 0)
    assert merged.trainable_variables == [] and not merged.freeze_backbone
    both = routed(Qwen3Next, "both", freeze_backbone=True)
    for experts in both.backbone.think_loop.experts:
        for expert in experts.values():
            expert.trainable = False
    both.backbone.norm.trainable = True
    merged = merge_lora_expert(both, 0)
    assert merged.freeze_backbone
    left = {v.path for v in merged.weights}
    expected = [v.path for v in both.trainable_variables if v.path in left]
    assert [v.path for v in merged.trainable_variables] == expected
    assert "model/norm/weight" in expected and any("router" in path for path in expected)


def test_what_cannot_be_merged_is_refused():
    by_token = small(etd={**ETD, **EXPERTS, **BY_TOKEN, **FIXED})
    with pytest.raises(ValueError, match="'block_output' change what a layer returns"):
        merge_lora_expert(by_token, 0)
    for expert in (-1, 3, 0.0):
        with pytest.raises(ValueError, match=f"`expert` must be .*0 to 2.*expert={expert}"):
            merge_lora_expert(adapted(), expert)
    for model in (small(), routed(Qwen3Next, "routes"), small(Qwen3NextBackbone)):
        with pytest.raises(ValueError, match=r"`model` must be a Qwen3Next .*with LoRA experts"):
            merge_lora_expert(model, 0)


def test_what_was_learned_beside_an_expert_is_not_dropped_in_silence():
    model = routed(Qwen3Next, "experts", etd=ETD, **SMALL)
    model.lm_head.enable_lora(2)
    with pytest.raises(ValueError, match=r"no others.*Received: lm_head/lora_kernel_a"):
        merge_lora_expert(model, 0)
