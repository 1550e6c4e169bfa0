"""Saving and loading: `.keras` files and weights, within and across backends."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from qwen3_next import GroupedAdamW, MTPConfig, Qwen3NextClassifier
from tests.support.mtp_models import LIGHT
from tests.support.paths import ROOT
from tests.support.published import assert_same_weights, weights
from tests.support.running import BACKEND, CHEAPEST_STEPS
from tests.support.small_models import ONE_LAYER, TWO_LAYERS, logits_once, random_ids, small

IDS = random_ids(2, 12)

OTHER = {"jax": "tensorflow", "tensorflow": "jax"}.get(BACKEND)
SAVE_ELSEWHERE = """
import numpy as np
from tests.support.small_models import logits_once, random_ids, small
from qwen3_next import GroupedAdamW
model = small(**{layers!r})
model.compile(GroupedAdamW(1e-3, {{"experts": 0.5}}), metrics=["accuracy"])
model.optimizer.build(model.trainable_variables)
for number, variable in enumerate(model.optimizer.variables):
    variable.assign(np.full(variable.shape, number))  # as if it had made steps
np.save({folder!r} + "/logits.npy", logits_once(model, random_ids(2, 12)))
model.save({folder!r} + "/model.keras")
"""


def test_a_file_restores_outputs_generation_and_compile_state(tmp_path):
    model = small(**LIGHT)
    optimizer = GroupedAdamW(1e-3, {"self_attn": 0.5})
    model.compile(optimizer, metrics=["accuracy"], **CHEAPEST_STEPS)
    model.fit(IDS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    tokens = np.asarray(loaded.generate(IDS, max_new_tokens=4).tokens)
    whole = np.concatenate([IDS, tokens], axis=1)
    expected = logits_once(model, whole)
    np.testing.assert_array_equal(logits_once(loaded, whole), expected)
    np.testing.assert_array_equal(tokens, expected[:, 11:-1].argmax(-1))
    assert loaded.optimizer.multipliers == {"self_attn": 0.5}
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables):
        a, b = keras.ops.convert_to_numpy(a.value), keras.ops.convert_to_numpy(b.value)
        np.testing.assert_array_equal(a, b)
    ours = model.fit(IDS, verbose=0).history
    loaded.run_eagerly = False  # optimizer and metrics have all that a compiled step needs
    again = loaded.fit(IDS, verbose=0).history
    assert ours.keys() == again.keys()
    np.testing.assert_allclose(ours["loss"], again["loss"], rtol=1e-6)


@pytest.mark.skipif(OTHER is None, reason="jax and tensorflow load each other's files")
def test_a_file_from_the_other_backend_gives_the_same_outputs(tmp_path):
    script = SAVE_ELSEWHERE.format(layers=TWO_LAYERS, folder=str(tmp_path))
    environment = {**os.environ, "KERAS_BACKEND": OTHER}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        logits_once(loaded, IDS), np.load(tmp_path / "logits.npy"), atol=2e-5
    )
    assert loaded.optimizer.multipliers == {"experts": 0.5}
    for number, variable in enumerate(loaded.optimizer.variables):
        assert (keras.ops.convert_to_numpy(variable.value) == number).all()


def test_the_same_seed_gives_the_same_weights_everywhere():
    kernel = small(**TWO_LAYERS).backbone.decoder_layers[0].linear_attn.in_proj_qkvz.kernel
    total = float(keras.ops.sum(keras.ops.abs(kernel)))
    np.testing.assert_allclose(total, 544.8799438476562, rtol=1e-6)


def test_a_classifier_survives_its_file(tmp_path):
    model = small(Qwen3NextClassifier, num_labels=3, **LIGHT)
    model.compile("adamw")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.num_labels == 3
    np.testing.assert_array_equal(logits_once(loaded, IDS), logits_once(model, IDS))


def test_weights_alone_can_be_saved_and_loaded(tmp_path):
    model, other = small(**TWO_LAYERS), small(**TWO_LAYERS, initializer_range=0.1)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(weights(other), weights(model))


@pytest.mark.parametrize(
    "other",
    [
        TWO_LAYERS,
        {**ONE_LAYER, "tie_word_embeddings": True},
        {**ONE_LAYER, "mtp": MTPConfig(1, speculation_lookahead=1)},
    ],
)
def test_weights_of_another_model_are_refused_before_any_is_loaded(other, tmp_path):
    model, other = small(**ONE_LAYER), small(**other)
    before = weights(model)
    for file, a, b in (("a", model, other), ("b", other, model)):
        path = tmp_path / f"{file}.weights.h5"
        a.save_weights(path)
        with pytest.raises(ValueError, match=r"`filepath` must hold .*Received: filepath='.*h5'"):
            b.load_weights(path)
    assert_same_weights(weights(model), before)


def test_weights_load_into_a_model_with_lora_and_without_its_optimizer(tmp_path):
    model, other = (small(**ONE_LAYER, initializer_range=scale) for scale in (0.02, 0.1))
    model.compile("adamw", run_eagerly=True)
    model.train_on_batch(IDS)
    model.save_weights(tmp_path / "model.weights.h5")
    other.lm_head.enable_lora(2)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other.lm_head.kernel, model.lm_head.kernel)


def test_dtype_policy_and_options_survive_a_file(tmp_path):
    model = small(**TWO_LAYERS, dtype="mixed_bfloat16", gradient_checkpointing=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.dtype_policy.name == "mixed_bfloat16"
    assert loaded.gradient_checkpointing
    assert loaded.backbone.decoder_layers[0].gradient_checkpointing


def test_a_broken_file_is_an_error(tmp_path):
    path = tmp_path / "model.keras"
    small(**TWO_LAYERS).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"model\.keras"):
        keras.models.load_model(path)


@pytest.mark.parametrize("method, name", [("save", "m.keras"), ("save_weights", "m.weights.h5")])
def test_a_save_that_fails_leaves_the_old_file(method, name, tmp_path, monkeypatch):
    model = small(**LIGHT)
    getattr(model, method)(tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def half(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, method, half)
    with pytest.raises(OSError, match=rf"No space.*{name}"):
        getattr(model, method)(tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]
