"""`compile` takes every spelling of a loss alike, and fuses only what is exactly the fused loss."""

import functools

import keras
import numpy as np
import pytest

from tests.support.mtp_models import LIGHT
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import logits_once, random_ids, small

IDS = random_ids(2, 10)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy


@functools.cache
def model():
    return small(**LIGHT)


def loss_of(loss, **options):
    model().compile("sgd", loss=loss, **options, **CHEAPEST_STEPS)
    return model().evaluate(IDS, IDS, verbose=0, return_dict=True)["loss"]


@functools.cache
def expected():
    values = logits_once(model(), IDS).astype("float64")
    log_sum = np.log(np.exp(values).sum(-1))
    return log_sum - np.take_along_axis(values, IDS[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        "SparseCategoricalCrossentropy",
        ["sparse_categorical_crossentropy"],
        keras.losses.sparse_categorical_crossentropy,
        CROSS_ENTROPY(from_logits=True),
    ],
    ids=["name", "class name", "list", "function", "instance"],
)
def test_every_spelling_means_from_logits(loss):
    np.testing.assert_allclose(loss_of(loss), expected().mean(), rtol=1e-5)


class Doubled(CROSS_ENTROPY):
    def call(self, y_true, y_pred):
        return 2.0 * super().call(y_true, y_pred)


def test_a_subclass_of_the_fused_loss_is_not_replaced():
    np.testing.assert_allclose(loss_of(Doubled(from_logits=True)), 2 * expected().mean(), rtol=1e-5)


def test_an_ignored_class_is_ignored():
    ignored = int(IDS[0, 0])
    loss = loss_of(CROSS_ENTROPY(from_logits=True, ignore_class=ignored))
    kept = np.where(ignored == IDS, 0.0, expected())
    assert min(abs(loss - kept.mean()), abs(loss - kept.sum() / (ignored != IDS).sum())) < 1e-4
    assert abs(loss - expected().mean()) > 1e-3


def test_the_weight_of_a_loss_is_not_dropped():
    name = "sparse_categorical_crossentropy"
    np.testing.assert_allclose(loss_of(name, loss_weights=0.5), 0.5 * expected().mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "loss", [CROSS_ENTROPY(), keras.losses.BinaryFocalCrossentropy(), ["mse", "mse"], {"a": "mse"}]
)
def test_losses_on_probabilities_and_several_losses_are_refused(loss):
    with pytest.raises(ValueError, match=r"Received: loss="):
        model().compile(loss=loss)
