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
from tests.support.small_models import logits

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


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_logits_it_gave(name, expected):
    model = keras.saving.load_model(EARLIER / f"{name}.keras")
    assert type(model) is MODELS[name]
    found = logits(model, expected["token_ids"])
    np.testing.assert_allclose(found, expected[f"{name}/logits"], atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_gives_the_logits_it_gave(name, expected):
    model = MODELS[name].from_preset(EARLIER / name, progress=False)
    found = logits(model, expected["token_ids"])
    np.testing.assert_allclose(found, expected[f"{name}/logits"], atol=2e-5)


def test_a_file_goes_on_where_it_stopped(expected):
    ids = expected["token_ids"]
    model = keras.saving.load_model(EARLIER / "language.keras")
    np.testing.assert_array_equal(model.generate(ids, 6).tokens, expected["language/tokens"])
    assert isinstance(model.optimizer, GroupedAdamW)
    assert model.optimizer.multipliers == {"experts": 0.5}
    assert int(model.optimizer.iterations) == 1
    history = model.fit(ids, verbose=0).history
    assert "accuracy" in history
    np.testing.assert_allclose(history["loss"], [expected["language/next_loss"]], rtol=1e-5)
    after = logits(model, ids)
    np.testing.assert_allclose(after, expected["language/logits_after"], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_written_now_holds_the_same_arrays(name, tmp_path):
    model = keras.saving.load_model(EARLIER / f"{name}.keras")
    fresh = MODELS[name].from_config(model.get_config())
    fresh.compile(
        type(model.optimizer).from_config(model.optimizer.get_config()), metrics=["accuracy"]
    )
    fresh.optimizer.build(fresh.trainable_variables)
    for saved in (model, fresh):
        saved.save(tmp_path / "model.keras")
        assert datasets(tmp_path / "model.keras") == datasets(EARLIER / f"{name}.keras")
