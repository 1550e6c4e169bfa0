"""Training on eight devices is training on one."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import (
    MTPConfig,
    Qwen3Next,
    Qwen3NextClassifier,
    Qwen3NextConfig,
    layout_map,
)
from tests.support.devices import WIDE, distribution_of, eight_devices

pytestmark = eight_devices
MIXED = "data=2,expert=2,tensor=2"
BASE = Qwen3NextConfig.from_variant("tiny", num_layers=2, full_attention_interval=2, **WIDE)
ONE_LAYER = BASE.replace(num_layers=1, mlp_only_layers=())
CONFIGS = {
    "experts": BASE,
    "tied mtp": ONE_LAYER.replace(
        mtp=MTPConfig(num_predict_tokens=2, speculation_lookahead=2),  # brings attention with it
        router_aux_loss_scope="layer",
        tie_word_embeddings=True,
    ),
    "dense classifier": ONE_LAYER.replace(num_experts=0),
}
CLASSES = 3


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, BASE.vocab_size, (8, 12)).astype("int32")
    mask = np.arange(12) < rng.integers(5, 13, (8, 1))
    return {"token_ids": ids, "padding_mask": mask}, rng.integers(0, CLASSES, 8)


def make(kind, accumulated=None, **options):
    keras.utils.set_random_seed(0)
    if kind == "dense classifier":
        model = Qwen3NextClassifier(CONFIGS[kind], num_labels=CLASSES, **options)
    else:
        model = Qwen3Next(CONFIGS[kind], **options)
    model.compile(keras.optimizers.AdamW(1e-3, gradient_accumulation_steps=accumulated))
    return model


def steps(model, number):
    """The losses of a number of training steps."""
    inputs, classes = batch()
    labels = classes if isinstance(model, Qwen3NextClassifier) else None
    found = [model.train_on_batch(inputs, labels) for _ in range(number)]
    return np.array([np.ravel(x)[0] for x in found])


def losses(kind, **options):
    """Of four steps: the last three show what the steps before have made of the weights."""
    return steps(make(kind, **options), 4)


on_one = functools.cache(losses)


def assert_trains_as_one(mesh, kind, fsdp=False, **options):
    expected = on_one(kind, **options)
    with distribution_of(mesh, fsdp=fsdp):
        found = losses(kind, **options)
    assert expected[0] > expected[3]  # it learns
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# "data=2,expert=4" is the mesh that Keras' own `ModelParallel` has below, MIXED that of the files.
@pytest.mark.parametrize("mesh", ["data=8", "expert=8", "tensor=4"])
def test_every_mesh_trains_as_one_device(mesh):
    assert_trains_as_one(mesh, "experts")


@pytest.mark.parametrize("name", ["ModelParallel", "DataParallel"])
def test_distributions_of_keras_itself_train_as_one_device(name):
    if name == "DataParallel":
        parallel = keras.distribution.DataParallel()
    else:
        mesh = keras.distribution.DeviceMesh((2, 4), ("data", "expert"))
        layouts = layout_map(mesh, CONFIGS["experts"])
        parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")
    expected = on_one("experts")
    with parallel.scope():
        np.testing.assert_allclose(losses("experts"), expected, rtol=1e-5)


def test_a_classifier_trains_as_on_one_device():
    assert_trains_as_one(MIXED, "dense classifier")


def test_tied_embeddings_mtp_checkpointing_and_accumulation_train_as_on_one_device():
    assert_trains_as_one(MIXED, "tied mtp", gradient_checkpointing=True, accumulated=2)


def test_weights_spread_over_all_devices_train_as_on_one():
    assert_trains_as_one("data=4,expert=2", "experts", fsdp=True)


def test_predictions_are_those_of_one_device():
    inputs, _ = batch()
    expected = make("experts").predict(inputs, batch_size=8, verbose=0)
    with distribution_of(MIXED):
        found = make("experts").predict(inputs, batch_size=8, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_files_lead_from_eight_devices_to_one_and_back_in_the_midst_of_training(tmp_path):
    path, again = tmp_path / "eight.keras", tmp_path / "one.keras"
    expected = on_one("experts")
    with distribution_of(MIXED):
        model = make("experts")
        found = [*steps(model, 2)]
        model.save(path)
        found += [*steps(model, 2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alone = keras.saving.load_model(path)
    np.testing.assert_allclose(steps(alone, 1), expected[2:3], rtol=1e-5)
    alone.save(again)
    with distribution_of(MIXED):
        model = keras.saving.load_model(again)
        assert len(model.backbone.embed_tokens.embeddings.value.sharding.device_set) == 8
        np.testing.assert_allclose(steps(model, 1), expected[3:], rtol=1e-5)
