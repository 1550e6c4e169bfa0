"""Modules for multi-token prediction on disk: published layout, files and presets."""

import functools
import json

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file

from qwen3_next import MTPConfig, Qwen3Next
from qwen3_next.checkpoints.safetensors_files import SINGLE
from tests.support.mtp_models import step_logits, two_steps
from tests.support.published import (
    FIXTURES,
    assert_same_weights,
    load,
    published,
    save,
    weights,
)
from tests.support.running import CHEAPEST, run, weight_arrays, with_weights
from tests.support.small_models import small


@functools.cache
def steps_of(model):
    return with_weights(model, lambda ids: tuple(step_logits(model, ids)))


def check_against_published(model):
    fixture = np.load(FIXTURES / "next_mtp.npz")
    ids = fixture["case/mtp/input_ids"]
    found = run(steps_of(model), *weight_arrays(model), ids, mode=CHEAPEST)
    for step, logits in enumerate(found, start=1):
        np.testing.assert_allclose(logits, fixture[f"case/mtp/logits_k{step}"], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def mtp_checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mtp"), *published("next_mtp"))


@pytest.fixture(scope="module")
def model(mtp_checkpoint):
    return load(mtp_checkpoint, mtp=MTPConfig())


def test_published_modules_give_published_logits(model):
    assert any(path.startswith("mtp/") for path in model.coverage_report.copied)
    assert not model.coverage_report.unused
    check_against_published(model)


def test_reading_the_wrong_hidden_state_is_seen(mtp_checkpoint):
    with pytest.raises(AssertionError):
        check_against_published(load(mtp_checkpoint, mtp=MTPConfig(hidden_state="before_norm")))


def test_the_other_order_of_the_halves_is_seen(model):
    kernel = model.mtp_modules[0].fc.kernel
    half = kernel.shape[0] // 2
    kernel.assign(ops.roll(kernel, half, axis=0))
    with pytest.raises(AssertionError):
        check_against_published(model)
    kernel.assign(ops.roll(kernel, half, axis=0))  # back


def test_modules_are_exported_as_they_were_published(model, tmp_path):
    model.export_to_transformers(tmp_path)
    tensors = published("next_mtp")[1]
    exported = load_file(tmp_path / SINGLE)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)
    assert "mtp" not in json.loads((tmp_path / "config.json").read_text())


def test_incomplete_modules_are_refused_by_name(tmp_path):
    config, tensors = published("next_mtp")
    del tensors["mtp.fc.weight"]
    with pytest.raises(ValueError, match=r"missing.*mtp\.fc\.weight"):
        load(save(tmp_path, config, tensors), mtp=MTPConfig())


@pytest.mark.parametrize(
    "fields", [{"mtp_head_type": "mlp"}, {"share_weights_across_steps": False}]
)
def test_modules_without_a_published_layout_are_not_exported(fields, tmp_path):
    with pytest.raises(ValueError, match="mtp"):
        small(mlp_only_layers=(), mtp=MTPConfig(**fields)).export_to_transformers(tmp_path)


def test_a_saved_model_keeps_its_modules(tmp_path):
    model = two_steps()
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.config == model.config
    assert_same_weights(weights(loaded), weights(model))
    model.save_to_preset(tmp_path / "preset")
    again = Qwen3Next.from_preset(tmp_path / "preset", progress=False)
    assert_same_weights(weights(again), weights(model))
