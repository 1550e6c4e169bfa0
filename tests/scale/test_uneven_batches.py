"""Batches that do not divide over the devices give what one device gives."""

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next, Qwen3NextClassifier
from tests.support.devices import distribution_of, eight_devices
from tests.support.small_models import ONE_LAYER, random_ids, small

pytestmark = eight_devices

ROWS = random_ids(7, 8)
SIZES = {**ONE_LAYER, "num_experts": 4}


def generated(*arrays):
    for start in range(0, len(arrays[0]), 4):
        yield tuple(array[start : start + 4] for array in arrays)


def language_model():
    """Losses and predictions: it learns from seven rows, four at a time."""
    model = small(Qwen3Next, **SIZES)
    model.compile(keras.optimizers.Adam(1e-3))
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    few = ROWS[4:]
    history = model.fit(ROWS, validation_data=(few,), **options).history
    evaluated = model.evaluate(generated(few), verbose=0)
    losses = [*history["loss"], *history["val_loss"], evaluated]
    return np.array(losses), model.predict(few, batch_size=4, verbose=0)


def classifier():
    """Those of single batches with a label for each row."""
    model = small(Qwen3NextClassifier, num_labels=3, **SIZES)
    model.compile(keras.optimizers.Adam(1e-3))
    few = ROWS[:3], np.arange(3)
    losses = [model.train_on_batch(*few), model.test_on_batch(*few)]
    return np.array(losses), model.predict_on_batch(few[0])


@pytest.mark.parametrize("found", [language_model, classifier])
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_uneven_batches_give_what_one_device_gives(found):
    with distribution_of("data=4,expert=2"):
        over_devices = found()
    for one, eight in zip(found(), over_devices, strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-5)


def test_rows_that_divide_are_spread():
    with distribution_of("data=4,expert=2"):
        model = small(**SIZES)
        model.make_predict_function()
        state = model._get_jax_state(trainable_variables=True, non_trainable_variables=True)
        outputs, _ = model.predict_function(state, iter([(ROWS[:4],)]))
    assert outputs.addressable_shards[0].data.shape == (1, 8, model.config.vocab_size)


@pytest.mark.parametrize(
    "run, given",
    [
        ("fit", {"batch_size": 3}),
        ("evaluate", {"batch_size": 3}),
        ("predict", {"batch_size": 3}),
        ("evaluate", (None, None, 0, None, 3)),  # three steps
        ("predict", (None, 0, 3)),
    ],
)
def test_a_batch_size_that_does_not_divide_is_refused_before_a_step(run, given):
    with distribution_of("data=4,expert=2"):
        model = small(**SIZES)
        model.compile("sgd")
        message = "multiple of the 4 devices along the axis 'data', such as 4.*batch_size=3.*7 rows"
        method = getattr(model, run)
        with pytest.raises(ValueError, match=message):
            method(ROWS, **given) if isinstance(given, dict) else method(ROWS, *given)
