"""Layers that hand on what they are given."""

import keras
import numpy as np
import pytest

from qwen3_next import ETDConfig, Qwen3NextClassifier
from qwen3_next.transfer.growth.net2deeper import grow_model_depth
from qwen3_next.transfer.named_weights import NamedWeights
from tests.support.grown_models import (
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
from tests.support.running import CHEAPEST_STEPS, assert_close
from tests.support.small_models import small

LINEAR, FULL = "linear_attention", "full_attention"


@pytest.mark.parametrize(("name", "number"), [("plain", 5), ("mtp", 1), ("tied_mtp", 1)])
def test_new_layers_change_nothing(name, number):
    model = kind(name)
    before = snapshot(model)
    deeper = grow_model_depth(model, number)
    assert deeper.config.num_layers == model.config.num_layers + number
    assert_close(all_logits(deeper), logits_of(name), 1e-6)
    assert_unchanged(model, before)


def test_new_layers_change_no_bit_of_what_is_not_fused():
    model = kind("plain")
    assert np.array_equal(grow_model_depth(model, 2)(IDS), model(IDS))


def test_a_classifier_grows_too():
    fields = {**KINDS["plain"], "num_labels": 3}
    model = small(Qwen3NextClassifier, **fields)
    deeper = grow_model_depth(model, 1)
    assert isinstance(deeper, Qwen3NextClassifier) and deeper.num_labels == 3
    assert np.array_equal(deeper(IDS), model(IDS))


@pytest.mark.parametrize(
    ("number", "positions", "expected"),
    [
        (1, None, [0, 1, 1]),
        (2, None, [0, 0, 1, 1]),
        (5, None, [0, 0, 0, 1, 1, 1, 1]),
        (None, [0], [0, 0, 1]),
        (None, [1, 1], [0, 1, 1, 1]),
    ],
)
def test_new_layers_stand_where_they_should(number, positions, expected):
    model = kind("hybrid")
    deeper = grow_model_depth(model, number, positions)
    old, new = NamedWeights(model), NamedWeights(deeper)
    seen = set()
    for place, layer in enumerate(expected):
        assert deeper.config.layer_types[place] == model.config.layer_types[layer]
        assert deeper.config.is_moe(place) == model.config.is_moe(layer)
        for path, array in old.items():
            here = path.replace(f"model/layers_{layer}/", f"model/layers_{place}/")
            if path.startswith(f"model/layers_{layer}/"):
                writes = any(part in path for part in ("/o_proj/", "/out_proj/", "/down"))
                is_new = layer in seen and writes
                assert np.array_equal(new[here], 0 * array if is_new else array), here
        seen.add(layer)


@pytest.mark.parametrize(("wanted", "source"), [(LINEAR, 0), (FULL, 1)])
def test_a_new_layer_is_of_the_type_that_is_asked_for(wanted, source):
    model = kind("hybrid")
    deeper = grow_model_depth(model, positions=[0], layer_type=wanted)
    assert deeper.config.layer_types == (LINEAR, wanted, FULL)
    assert deeper.config.moe_layers == ([0, 1] if source == 0 else [0])
    norm = "input_layernorm/weight"
    found = NamedWeights(deeper)[f"model/layers_1/{norm}"]
    assert np.array_equal(found, NamedWeights(model)[f"model/layers_{source}/{norm}"])


def test_new_layers_learn_and_their_model_is_kept(tmp_path):
    model = small(**{**PLAIN, **ONE_FULL})
    deeper = grow_model_depth(model, 1, name="deeper")
    assert deeper.name == "deeper"
    path = tmp_path / "deeper.keras"
    deeper.save(path)
    assert np.array_equal(keras.saving.load_model(path)(IDS), model(IDS))
    before = snapshot(model)
    deeper.compile(keras.optimizers.SGD(0.1), **CHEAPEST_STEPS)
    deeper.train_on_batch(IDS)
    learned = NamedWeights(deeper)
    for leaf in ("self_attn/o_proj/kernel", "mlp/down_proj/kernel"):
        assert learned[f"model/layers_1/{leaf}"].any()
    assert_unchanged(model, before)
    assert_learns(deeper)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "num_new_layers"),
        ({"num_new_layers": 1, "positions": [0]}, "num_new_layers"),
        ({"num_new_layers": 0}, "num_new_layers"),
        ({"positions": [2]}, "positions"),
        ({"positions": []}, "positions"),
        ({"num_new_layers": 1, "layer_type": "attention"}, "layer_type"),
        ({"num_new_layers": 1, "layer_type": LINEAR}, "layer_type"),
    ],
)
def test_wrong_arguments_are_refused(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        grow_model_depth(kind("plain"), **arguments)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="`model`"):
        grow_model_depth(kind("plain").backbone, 1)
    thinks = small(**{**DENSE, **ONE_FULL}, etd=ETDConfig(0, 1, 0))
    with pytest.raises(ValueError, match="think loop"):
        grow_model_depth(thinks, 1)
