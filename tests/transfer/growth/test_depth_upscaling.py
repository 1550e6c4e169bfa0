"""Deeper models of overlapping copies."""

import keras
import numpy as np
import pytest

from qwen3_next import ETDConfig, MTPConfig, Qwen3NextClassifier
from qwen3_next.transfer.growth.depth_upscaling import depth_upscale, upscaled_layers
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
from tests.support.small_models import small


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4,), [0, 1, 2, 1, 2, 3]),
        ((4, "original", 2), [0, 1, 2, 3]),
        ((4, "original", 0), [0, 1, 2, 3, 0, 1, 2, 3]),
        ((4, "interlocked_1"), [0, 1, 1, 2, 2, 3]),
        ((6, "interlocked_2", 2), [0, 1, 2, 3, 2, 3, 4, 5]),
        ((5, "interlocked_2", 2), [0, 1, 2, 3, 2, 4]),
        ((1,), [0, 0]),
        ((32,), [*range(24), *range(8, 32)]),
        ((32, "interlocked_1"), [n for i in range(24) for n in (i, i + 8)]),
        (
            (32, "interlocked_8"),
            [*range(16), *range(8, 16), *range(16, 24), *range(16, 24), *range(24, 32)],
        ),
    ],
)
def test_arrangements_are_the_published_ones(arguments, expected):
    assert upscaled_layers(*arguments) == expected


@pytest.mark.parametrize("name", ["hybrid", "tied_mtp"])
def test_every_layer_is_the_one_it_should_be(name):
    model = kind(name)
    before = snapshot(model)
    last = model.config.num_layers - 1
    layers = [0, last, last, 0]
    deeper = depth_upscale(model, layers, name="deeper")
    assert deeper.name == "deeper"
    old, new = NamedWeights(model), NamedWeights(deeper)
    rest = [path for path in old if "model/layers_" not in path]
    assert all(np.array_equal(new[path], old[path]) for path in rest)
    found = len(rest)
    for place, layer in enumerate(layers):
        assert deeper.config.layer_types[place] == model.config.layer_types[layer]
        assert deeper.config.is_moe(place) == model.config.is_moe(layer)
        for path in old:
            if path.startswith(f"model/layers_{layer}/"):
                here = path.replace(f"layers_{layer}/", f"layers_{place}/", 1)
                assert np.array_equal(new[here], old[path]), here
                found += 1
    assert found == len(new)
    assert_unchanged(model, before)


def test_a_sparse_step_becomes_a_list_of_dense_layers():
    fields = {"num_layers": 4, "layer_types": None, "mlp_only_layers": (), "decoder_sparse_step": 2}
    deeper = depth_upscale(small(**fields))
    assert deeper.config.layer_types == tuple(
        f"{kind}_attention" for kind in ("linear", "linear", "linear", "linear", "linear", "full")
    )
    assert deeper.config.moe_layers == [1, 3, 5]
    assert deeper.config.decoder_sparse_step == 1


def test_the_same_layers_are_the_same_model():
    assert np.array_equal(all_logits(depth_upscale(kind("plain"), [0, 1])), logits_of("plain"))


def test_copies_learn_apart_and_are_kept(tmp_path):
    model = small(**{**PLAIN, **ONE_FULL})
    deeper = depth_upscale(model)
    path = tmp_path / "deeper.keras"
    deeper.save(path)
    loaded = keras.saving.load_model(path)
    assert np.array_equal(all_logits(loaded), all_logits(deeper))
    before = snapshot(model)
    assert_learns(deeper)
    assert_unchanged(model, before)
    learned = NamedWeights(deeper)
    leaf = "self_attn/o_proj/kernel"
    assert (learned[f"model/layers_0/{leaf}"] != learned[f"model/layers_1/{leaf}"]).any()


def test_a_classifier_grows_too():
    model = small(Qwen3NextClassifier, **PLAIN, num_labels=3)
    deeper = depth_upscale(model)
    assert deeper(IDS).shape == (2, 3)
    assert np.array_equal(NamedWeights(deeper)["score/kernel"], NamedWeights(model)["score/kernel"])


def test_what_training_counted_goes_on():
    mtp = MTPConfig(num_predict_tokens=1, speculation_lookahead=1, warmup_steps=3)
    model = small(**{**DENSE, **ONE_FULL}, mtp=mtp.replace(draft_vocab_size=7))
    model.mtp_steps.assign(2)
    model.token_counts.counts.assign(np.arange(61))
    deeper = depth_upscale(model)
    assert int(deeper.mtp_steps.value) == 2
    assert np.array_equal(deeper.frequent_tokens(), np.arange(54, 61))
    deeper.mtp_steps.assign_add(1)
    assert int(model.mtp_steps.value) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("solar",), "arrangement"),
        (("interlocked_0",), "arrangement"),
        (([],), "arrangement"),
        (([0, 2],), "arrangement"),
        (([0, -1],), "arrangement"),
        ((3,), "arrangement"),
        (([0, 1], 1), "num_dropped"),
        (("original", 2), "num_dropped"),
        (("original", -1), "num_dropped"),
    ],
)
def test_wrong_arguments_are_refused(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        depth_upscale(kind("plain"), *arguments)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="`model`"):
        depth_upscale(kind("plain").backbone)
    with pytest.raises(ValueError, match="`num_layers`"):
        upscaled_layers(0)
    thinks = small(**{**DENSE, **ONE_FULL}, etd=ETDConfig(0, 1, 0))
    with pytest.raises(ValueError, match="think loop"):
        depth_upscale(thinks)
