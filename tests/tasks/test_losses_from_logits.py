"""`compile` takes every spelling of a loss alike, and fuses only what is exactly the fused loss."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3NextClassifier
from qwen3_next.tasks.losses_from_logits import loss_from_logits
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
        CROSS_ENTROPY,
        CROSS_ENTROPY(from_logits=True),
    ],
    ids=["name", "class name", "list", "function", "class", "instance"],
)
def test_every_spelling_means_from_logits(loss):
    np.testing.assert_allclose(loss_of(loss), expected().mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", ["bce", "BCE", keras.losses.BinaryCrossentropy])
def test_a_short_name_or_a_class_means_from_logits(loss):
    assert loss_from_logits(loss).get_config()["from_logits"]


@pytest.mark.parametrize("loss", ["mse", "MeanSquaredError", keras.losses.MeanSquaredError])
def test_a_loss_without_logits_is_as_keras_takes_it(loss):
    found, labels = keras.losses.get(loss_from_logits(loss)), np.array([[1.0, 2.0]])
    np.testing.assert_allclose(found(labels, labels + 3.0), 9.0)


class Doubled(CROSS_ENTROPY):
    def call(self, y_true, y_pred):
        return 2.0 * super().call(y_true, y_pred)


def test_a_subclass_of_the_fused_loss_is_not_replaced():
    np.testing.assert_allclose(loss_of(Doubled(from_logits=True)), 2 * expected().mean(), rtol=1e-5)


def test_an_ignored_class_is_ignored():
    ignored = int(IDS[0, 0])
    loss = loss_of(CROSS_ENTROPY(from_logits=True, ignore_class=ignored))
    np.testing.assert_allclose(loss, expected()[ignored != IDS].mean(), rtol=1e-5)
    assert abs(loss - expected().mean()) > 1e-3


def own_loss(labels, logits):
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


@pytest.mark.parametrize(
    "loss",
    [
        CROSS_ENTROPY(from_logits=True, ignore_class=-100),
        CROSS_ENTROPY(from_logits=True, ignore_class=0),
        CROSS_ENTROPY(from_logits=True, ignore_class=int(IDS[0, 0])),
        *(
            Doubled(from_logits=True, reduction=reduction)
            for reduction in ("sum_over_batch_size", "sum", "mean_with_sample_weight")
        ),
        own_loss,
    ],
)
def test_a_loss_is_that_of_the_labels_that_count(loss):
    padding = [[0, 0], [0, 7]]
    labels, mask = IDS.copy(), np.ones_like(IDS)
    labels[:, 3] = -100
    padded = {"token_ids": np.pad(IDS, padding), "padding_mask": np.pad(mask, padding)}
    model().compile("sgd", loss=loss, **CHEAPEST_STEPS)
    options = {"sample_weight": np.array([0.5, 2.0]), "verbose": 0, "return_dict": True}
    found = model().evaluate(IDS, labels, **options)["loss"]
    more = np.pad(labels, padding, constant_values=-100)
    np.testing.assert_allclose(model().evaluate(padded, more, **options)["loss"], found, rtol=1e-5)
    counts = (labels != -100) & (labels != getattr(loss, "ignore_class", -100))
    weights = counts * np.array([[0.5], [2.0]])
    divisors = {"sum": 1.0, "mean_with_sample_weight": weights.sum()}
    kind = getattr(loss, "reduction", "mean")
    factor = (2.0 if isinstance(loss, Doubled) else 1.0) / divisors.get(kind, counts.sum())
    np.testing.assert_allclose(found, factor * (weights * expected()).sum(), rtol=1e-5)


def test_metrics_are_those_of_the_labels_that_count():
    ids, counts = random_ids(3, 10), np.arange(10) < np.array([[10], [2], [5]])
    hits = logits_once(model(), ids).argmax(-1)
    labels = np.where(np.arange(30).reshape(3, 10) % 3 == 0, hits, ids)
    names = {"metrics": ["accuracy"], "weighted_metrics": ["sparse_categorical_accuracy"]}
    model().compile("sgd", **names, **CHEAPEST_STEPS)
    row_weights = np.array([0.5, 2.0, 1.0])
    options = {"sample_weight": row_weights, "verbose": 0, "return_dict": True}
    found = model().evaluate({"token_ids": ids, "padding_mask": counts}, labels, **options)
    right, weights = counts & (hits == labels), counts * row_weights[:, None]
    np.testing.assert_allclose(found["accuracy"], right.sum() / counts.sum(), rtol=1e-5)
    weighted = (right * weights).sum() / weights.sum()
    np.testing.assert_allclose(found["sparse_categorical_accuracy"], weighted, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_a_loss_over_batches_is_that_of_all_labels(reduction):
    ids, lengths, row_weights = random_ids(3, 10), np.array([10, 2, 5]), np.array([0.5, 2.0, 1.0])
    counts = np.arange(10) < lengths[:, None]
    weights = counts * row_weights[:, None]
    values = logits_once(model(), ids).astype("float64")
    chosen = np.take_along_axis(values, ids[..., None], axis=-1)[..., 0]
    losses = np.log(np.exp(values).sum(-1)) - chosen
    loss = CROSS_ENTROPY(from_logits=True, reduction=reduction)
    model().compile(keras.optimizers.SGD(0.0), loss=loss, **CHEAPEST_STEPS)
    data = {"token_ids": ids, "padding_mask": counts}, ids
    options = {"sample_weight": row_weights, "batch_size": 2, "verbose": 0}
    found = model().evaluate(*data, **options, return_dict=True)["loss"]
    divisor = counts.sum() if reduction == "sum_over_batch_size" else weights.sum()
    np.testing.assert_allclose(found, (weights * losses).sum() / divisor, rtol=1e-5)
    trained = model().fit(*data, **options, shuffle=False).history["loss"]
    np.testing.assert_allclose(trained, found, rtol=1e-5)


def test_the_weight_of_a_loss_is_not_dropped():
    name = "sparse_categorical_crossentropy"
    np.testing.assert_allclose(loss_of(name, loss_weights=0.5), 0.5 * expected().mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        CROSS_ENTROPY(),
        keras.losses.BinaryFocalCrossentropy(),
        "kld",
        keras.losses.Dice,
        keras.losses.tversky,
        keras.losses.CategoricalGeneralizedCrossEntropy(),
        ["mse", "mse"],
        {"a": "mse"},
    ],
    ids=["instance", "focal", "short name", "class", "function", "no logits", "list", "dict"],
)
def test_losses_on_probabilities_and_several_losses_are_refused(loss):
    classifier = small(Qwen3NextClassifier, num_labels=3, **LIGHT)
    with pytest.raises(ValueError, match=r"(returns logits|has one loss).*Received: loss="):
        classifier.compile(loss=loss)


@pytest.mark.parametrize("loss", ["mse", "bce", keras.losses.CategoricalCrossentropy(True)])
def test_a_loss_that_compares_indices_with_logits_is_refused(loss):
    with pytest.raises(ValueError, match=r"indices.*Received: loss="):
        model().compile(loss=loss)


@pytest.mark.parametrize(
    "metric",
    [
        "sparse_categorical_crossentropy",
        "SparseCategoricalCrossentropy",
        keras.metrics.sparse_categorical_crossentropy,
        keras.metrics.SparseCategoricalCrossentropy,
        keras.metrics.SparseCategoricalCrossentropy(from_logits=True),
    ],
    ids=["name", "class name", "function", "class", "instance"],
)
def test_a_cross_entropy_is_a_metric_of_logits(metric):
    model().compile("sgd", metrics=[metric], **CHEAPEST_STEPS)
    found = model().evaluate(IDS, IDS, verbose=0, return_dict=True)
    name = metric if isinstance(metric, str) else "sparse_categorical_crossentropy"
    np.testing.assert_allclose(found[name], expected().mean(), rtol=1e-5)


def test_one_logit_is_positive_above_zero():
    classifier = small(Qwen3NextClassifier, num_labels=1, **LIGHT)
    ids = random_ids(8, 10)
    values = logits_once(classifier, ids)[:, 0]
    kernel = keras.ops.convert_to_numpy(classifier.score.kernel)
    classifier.score.kernel.assign(0.2 / np.abs(values).max() * kernel)
    labels = (values[:, None] > 0).astype("int32")
    names = ["accuracy", "binary_accuracy", "Precision", "Recall"]
    metrics = [*names, "binary_crossentropy"]
    classifier.compile("sgd", "binary_crossentropy", metrics=metrics, **CHEAPEST_STEPS)
    found = classifier.evaluate(ids, labels, verbose=0, return_dict=True)
    assert 0 < labels.sum() < 8
    assert [found[name] for name in names] == [1, 1, 1, 1]
    np.testing.assert_allclose(found["binary_crossentropy"], found["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "metric",
    [
        keras.metrics.SparseCategoricalCrossentropy(),
        keras.metrics.BinaryAccuracy(),
        keras.metrics.Precision(),
        keras.metrics.AUC(),
        "kl_divergence",
    ],
    ids=lambda metric: getattr(metric, "name", metric),
)
def test_metrics_of_probabilities_are_refused(metric):
    classifier = small(Qwen3NextClassifier, num_labels=1, **LIGHT)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    for where in ("metrics", "weighted_metrics"):
        with pytest.raises(ValueError, match=r"metrics must take these.*Received: metrics="):
            classifier.compile("sgd", loss, **{where: [metric]})
    classifier.compile("sgd", metrics=["accuracy", keras.metrics.BinaryAccuracy(threshold=0.0)])
