"""Files of version 0.1 load, give what they gave, and are what is written now.

`fixtures/earlier` holds two small models after one training step on `token_ids`, saved on JAX
before the package had rooms: a language model with two steps of multi-token prediction, compiled
with `GroupedAdamW(1e-2, {"experts": 0.5})`, and a classifier with three labels, compiled with
`"adamw"`; `expected.npz` holds what they returned then.
"""

import io
import zipfile

import h5py
import keras
import numpy as np
import pytest

from qwen3_next import GroupedAdamW, Qwen3Next, Qwen3NextClassifier
from tests.support.paths import FIXTURES
from tests.support.published import assert_same_weights, weights
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import logits_once

EARLIER = FIXTURES / "earlier"
MODELS = {"language": Qwen3Next, "classifier": Qwen3NextClassifier}


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(EARLIER / "expected.npz"))


def datasets(path):
    """Names and shapes of all arrays in a `.keras` file."""
    found = {}

    def collect(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item.shape

    weights = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    with h5py.File(weights) as file:
        file.visititems(collect)
    return found


def loaded(name):
    model = keras.saving.load_model(EARLIER / f"{name}.keras")
    assert type(model) is MODELS[name]
    return model


def test_a_classifier_gives_the_logits_it_gave(expected):
    found = logits_once(loaded("classifier"), expected["token_ids"])
    np.testing.assert_allclose(found, expected["classifier/logits"], atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_is_the_model_of_the_file(name):
    model, file = MODELS[name].from_preset(EARLIER / name, progress=False), loaded(name)
    assert type(model) is MODELS[name]
    assert model.config == file.config
    assert_same_weights(weights(model), weights(file))


def test_a_language_model_gives_what_it_gave_and_goes_on_where_it_stopped(expected):
    ids = expected["token_ids"]
    model = loaded("language")
    found = logits_once(model, ids)
    np.testing.assert_allclose(found, expected["language/logits"], atol=2e-5)
    # No draft changes a greedy token; the modules have a part in the loss.
    tokens, _ = model.generate(ids, 6, use_speculative=False)
    np.testing.assert_array_equal(tokens, expected["language/tokens"])
    assert isinstance(model.optimizer, GroupedAdamW)
    assert model.optimizer.multipliers == {"experts": 0.5}
    assert int(model.optimizer.iterations) == 1
    model.run_eagerly = CHEAPEST_STEPS["run_eagerly"]
    history = model.fit(ids, verbose=0).history
    assert "accuracy" in history
    np.testing.assert_allclose(history["loss"], [expected["language/next_loss"]], rtol=1e-5)
    after = logits_once(model, ids)
    np.testing.assert_allclose(after, expected["language/logits_after"], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_written_now_holds_the_same_arrays(name, tmp_path):
    model = loaded(name)
    fresh = MODELS[name].from_config(model.get_config())
    fresh.compile(
        type(model.optimizer).from_config(model.optimizer.get_config()), metrics=["accuracy"]
    )
    fresh.optimizer.build(fresh.trainable_variables)
    for saved in (model, fresh):
        saved.save(tmp_path / "model.keras")
        assert datasets(tmp_path / "model.keras") == datasets(EARLIER / f"{name}.keras")
