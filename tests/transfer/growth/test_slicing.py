"""Smaller models out of a large one, and what of it matters."""

import keras
import numpy as np
import pytest

from qwen3_next import ETDConfig, Qwen3NextClassifier
from qwen3_next.transfer.growth.net2deeper import grow_model_depth
from qwen3_next.transfer.growth.slicing import create_model_family, kept_layers, slice_model
from qwen3_next.transfer.growth.unit_importance import activation_importance, weight_importance
from qwen3_next.transfer.named_weights import NamedWeights
from tests.support.grown_models import (
    IDS,
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
from tests.support.small_models import logits_once, random_ids, small

DATA = [random_ids(n, seed=n) for n in (9, 5, 9)]
NORMS = {"importance": "weight_norm"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((6, 3, "first", None, True), [0, 1, 5]),
        ((6, 3, "first", None, False), [0, 1, 2]),
        ((6, 3, "last", None, True), [0, 4, 5]),
        ((6, 3, "last", None, False), [3, 4, 5]),
        ((6, 2, "last", None, True), [0, 5]),
        ((6, 4, "uniform", None, True), [0, 2, 4, 5]),
        ((6, 3, "uniform", None, False), [1, 3, 5]),
        ((5, 3, "importance", [0, 2, 1, 3, 0], True), [0, 3, 4]),
        ((5, 3, "importance", [0, 2, 1, 3, 0], False), [1, 2, 3]),
        ((4, 2, "importance", [1, 1, 1, 1], False), [0, 1]),
        ((1, 1, "importance", [0], True), [0]),
    ],
)
def test_layers_are_kept_as_they_should_be(arguments, expected):
    assert kept_layers(*arguments) == expected


def states_of(model, token_ids):
    """For each layer what it reads, what its second norm gives, and what it hands on, float64."""
    hidden = model.backbone.embed_tokens(token_ids)
    for layer in model.backbone.decoder_layers:
        before, hidden = hidden, layer(hidden)
        mixed = before + layer.mixer(layer.input_layernorm(before))
        normed = layer.input_layernorm(before), layer.post_attention_layernorm(mixed)
        yield [
            keras.ops.convert_to_numpy(x)[0].astype("float64") for x in (before, *normed, hidden)
        ]


def test_importance_on_tokens_matches_an_oracle():
    model = kind("plain")
    found = activation_importance(model, DATA, batch_size=2)
    weights, tokens = NamedWeights(model), sum(map(len, DATA))
    layers, channels, units = np.zeros(2), np.zeros(24), np.zeros((2, 20))
    for row in DATA:
        for i, (before, first, second, after) in enumerate(states_of(model, row[None])):
            lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
            layers[i] += (1 - (before * after).sum(-1) / lengths).sum()
            channels += np.square(first).sum(0) + np.square(second).sum(0)
            gate, up, down = (
                weights[f"model/layers_{i}/mlp/{name}_proj/kernel"].astype("float64")
                for name in ("gate", "up", "down")
            )
            gated = second @ gate
            hidden = gated / (1 + np.exp(-gated)) * (second @ up)
            units[i] += np.square(hidden).sum(0) * np.square(down).sum(-1)
        last = keras.ops.convert_to_numpy(model.backbone.norm(after.astype("float32")))
        channels += np.square(last.astype("float64")).sum(0)
    assert_close(found.layers, layers / tokens, 1e-5)
    assert_close(found.channels, channels / tokens, 1e-5)
    for i in range(2):
        assert_close(found.networks[f"model/layers_{i}/mlp"], units[i], 1e-5)


def test_importance_of_weights_matches_an_oracle():
    model = kind("hybrid")
    found, weights = weight_importance(model), NamedWeights(model)
    sparse, dense = "model/layers_0/mlp", "model/layers_1/mlp"
    gate, up = np.split(weights[f"{sparse}/experts/gate_up"].astype("float64"), 2, axis=-1)
    down = weights[f"{sparse}/experts/down"].astype("float64")
    experts = [np.prod([np.linalg.norm(part[e]) for part in (gate, up, down)]) for e in range(5)]
    assert_close(found.networks[sparse], np.array(experts), 1e-6)
    units = 1.0
    for name in ("gate", "up", "down"):
        kernel = weights[f"{dense}/{name}_proj/kernel"].astype("float64")
        units = units * np.linalg.norm(kernel, axis=1 if name == "down" else 0)
    assert_close(found.networks[dense], units, 1e-6)
    written = [
        np.square(weights["model/layers_0/linear_attn/out_proj/kernel"]).sum()
        + np.square(down).sum() / 5
        + np.square(weights[f"{sparse}/shared_expert/down_proj/kernel"]).sum(),
        np.square(weights["model/layers_1/self_attn/o_proj/kernel"]).sum()
        + np.square(weights[f"{dense}/down_proj/kernel"]).sum(),
    ]
    assert_close(found.layers, written, 1e-5)


def test_layers_that_do_nothing_are_left_out_first():
    model = kind("plain")
    deeper = grow_model_depth(model, positions=[0, 0])
    before = snapshot(deeper)
    for importance in ({"calibration_data": DATA}, NORMS):
        sliced = slice_model(deeper, num_layers=2, **importance)
        assert_close(all_logits(sliced), logits_of("plain"), 1e-6)
    assert_unchanged(deeper, before)


def test_units_that_do_nothing_are_left_out_first():
    model = small(**{**PLAIN, **ONE_FULL})
    kernel = model.backbone.decoder_layers[0].mlp.down_proj.kernel
    dead = np.arange(20) % 3 == 0
    kernel.assign(np.where(dead[:, None], 0, keras.ops.convert_to_numpy(kernel.value)))
    expected = all_logits(model)
    for importance in ({"calibration_data": DATA}, NORMS):
        sliced = slice_model(model, intermediate_size=13, **importance)
        assert sliced.backbone.decoder_layers[0].mlp.down_proj.kernel.shape == (13, 24)
        assert_close(all_logits(sliced), expected, 1e-5)


@pytest.mark.parametrize("name", ["mtp", "tied_mtp"])
def test_one_choice_of_channels_holds_everywhere(name):
    model = kind(name)
    sliced = slice_model(model, hidden_size=17, **NORMS)
    kept = np.sort(np.argsort(-weight_importance(model).channels)[:17])
    old, new = NamedWeights(model), NamedWeights(sliced)
    for path, array in old.items():
        for axis, (size, smaller) in enumerate(zip(array.shape, new[path].shape)):
            if size != smaller:
                places = kept if size == 24 else np.concatenate([kept, kept + 24])
                array = np.take(array, places, axis=axis)
        assert np.array_equal(new[path], array), path
    assert np.isfinite(all_logits(sliced)).all()


def test_experts_and_units_are_chosen_where_they_are_used():
    model = kind("mtp")
    sizes = {"num_experts": 3, "intermediate_size": 9}
    sliced = slice_model(model, **sizes, calibration_data=DATA)
    found = activation_importance(model, DATA, batch_size=8)
    assert set(found.networks) == {
        "model/layers_0/mlp",
        "model/layers_1/mlp",
        "mtp/layers_0/mlp",
    }
    old, new = NamedWeights(model), NamedWeights(sliced)
    for network in ("model/layers_0/mlp", "mtp/layers_0/mlp"):
        assert found.networks[network].sum() == pytest.approx(
            sum(len(row) - network.startswith("mtp") for row in DATA), rel=1e-5
        )
        kept = np.sort(np.argsort(-found.networks[network])[:3])
        for leaf, axis in (("gate/kernel", 1), ("experts/gate_up", 0), ("experts/down", 0)):
            path = f"{network}/{leaf}"
            assert np.array_equal(new[path], np.take(old[path], kept, axis=axis)), path
    kept = np.sort(np.argsort(-found.networks["model/layers_1/mlp"])[:9])
    path = "model/layers_1/mlp/up_proj/kernel"
    assert np.array_equal(new[path], old[path][:, kept])


def test_a_family_is_made_of_slices():
    model = kind("plain")
    sizes = {
        "short": {"num_layers": 2},
        "narrow": {"hidden_size": 16, "intermediate_size": 10},
        "narrower": {"hidden_size": 8},
    }
    family = create_model_family(model, sizes, DATA)
    assert list(family) == list(sizes)
    for name, asked in sizes.items():
        assert family[name].name == name
        for field, size in asked.items():
            assert getattr(family[name].config, field) == size
    alone = slice_model(model, **sizes["narrow"], calibration_data=DATA, batch_size=1)
    together = NamedWeights(family["narrow"])
    assert all(np.array_equal(array, together[path]) for path, array in NamedWeights(alone).items())


def test_it_learns_and_is_kept(tmp_path):
    model = small(Qwen3NextClassifier, **{**PLAIN, **ONE_FULL}, num_labels=3)
    sliced = slice_model(model, hidden_size=16, **NORMS, name="sliced")
    assert sliced.name == "sliced"
    path = tmp_path / "sliced.keras"
    sliced.save(path)
    loaded = keras.saving.load_model(path)
    assert np.array_equal(logits_once(loaded, IDS), logits_once(sliced, IDS))
    model = small(**{**PLAIN, **ONE_FULL})
    before = snapshot(model)
    assert_learns(slice_model(model, hidden_size=16, intermediate_size=9, **NORMS))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "at least one"),
        ({"num_layers": 3, **NORMS}, "`num_layers`"),
        ({"num_layers": 1, **NORMS}, "`num_layers`"),
        ({"hidden_size": 0, **NORMS}, "`hidden_size`"),
        ({"hidden_size": 25, **NORMS}, "`hidden_size`"),
        ({"num_experts": 2, **NORMS}, "`num_experts`"),
        ({"hidden_size": 8}, "`calibration_data`"),
        ({"hidden_size": 8, "calibration_data": iter([])}, "`calibration_data`"),
        ({"hidden_size": 8, "calibration_data": DATA, **NORMS}, "`calibration_data`"),
        ({"num_layers": 2, "layer_selection": "first", "calibration_data": DATA}, "nothing reads"),
        ({"hidden_size": 8, "calibration_data": [[99]]}, "99"),
        ({"hidden_size": 8, "calibration_data": [[1] * 300]}, "300"),
        ({"num_layers": 2, "layer_selection": "middle"}, "`layer_selection`"),
        ({"num_layers": 2, "importance": "gradient"}, "`importance`"),
        ({"num_layers": 2, "preserve_first_last": 1}, "`preserve_first_last`"),
        ({"num_layers": 2, "batch_size": 0}, "`batch_size`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        slice_model(kind("plain"), **arguments)


@pytest.mark.parametrize(
    "sizes", [{}, [], {"a": {}}, {"a": 3}, {1: {"num_layers": 2}}, {"a": {"head_dim": 4}}]
)
def test_wrong_families_are_refused(sizes):
    with pytest.raises(ValueError, match=r"`sizes`|at least one"):
        create_model_family(kind("plain"), sizes, **NORMS)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="`model`"):
        slice_model(kind("plain").backbone, num_layers=2)
    with pytest.raises(ValueError, match="`num_experts_per_tok`"):
        slice_model(kind("hybrid"), num_experts=1, **NORMS)
    with pytest.raises(ValueError, match="more than 1 tokens"):
        slice_model(kind("tied_mtp"), hidden_size=8, calibration_data=[[1]])
    broken = small(**{**PLAIN, **ONE_FULL})
    broken.backbone.embed_tokens.embeddings.assign(np.full((61, 24), np.nan))
    with pytest.raises(ValueError, match="finite"):
        slice_model(broken, hidden_size=8, calibration_data=DATA)
    thinks = small(**{**DENSE, **ONE_FULL}, etd=ETDConfig(0, 1, 0))
    with pytest.raises(ValueError, match="think loop"):
        slice_model(thinks, hidden_size=8, **NORMS)
