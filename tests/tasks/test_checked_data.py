"""Ids and labels that a model has no row for are refused, however the data comes."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3NextClassifier
from tests.support.mtp_models import LIGHT
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import random_ids, small

IDS = random_ids(6, 12)
BAD_IDS = np.where(np.arange(6)[:, None] == 4, 61, IDS)
BAD_LABELS = np.where(np.arange(6)[:, None] == 4, -5, IDS)


class Pairs(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(2 * index, 2 * index + 2)
        return self.x[rows], self.y[rows]


def generator(x, y):
    data = Pairs(x, y)
    return (data[index] for index in range(len(data)))


def dataset(x, y):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(2)


def loader(x, y):
    data = pytest.importorskip("torch.utils.data")
    return data.DataLoader(list(zip(x, y)), batch_size=2)


SOURCES = {
    "arrays": None,
    "generator": generator,
    "PyDataset": Pairs,
    "tf.data": dataset,
    "torch": loader,
}


@functools.cache
def model():
    """Trained by every test: what it learns does not matter."""
    model = small(**LIGHT)
    model.compile("sgd", **CHEAPEST_STEPS)
    return model


def run(method, source, x, y):
    if source is None:
        return getattr(model(), method)(x, y, batch_size=2, verbose=0)
    return getattr(model(), method)(source(x, y), verbose=0)


@pytest.mark.parametrize("method", ["fit", "evaluate"])
@pytest.mark.parametrize("source", SOURCES)
def test_bad_ids_and_labels_stop_a_run_and_the_model_survives(method, source):
    for x, y, message in ((BAD_IDS, IDS, "vocab_size=61"), (IDS, BAD_LABELS, "-5")):
        with pytest.raises(Exception, match=message):
            run(method, SOURCES[source], x, y)
    run(method, SOURCES[source], IDS, IDS)
    assert np.isfinite(keras.ops.convert_to_numpy(model().head_kernel())).all()


@pytest.mark.parametrize("source", SOURCES)
def test_checked_data_gives_the_loss_of_arrays(source):
    expected = model().evaluate(IDS, IDS, batch_size=2, verbose=0, return_dict=True)["loss"]
    data = (IDS, IDS) if SOURCES[source] is None else (SOURCES[source](IDS, IDS),)
    batch_size = 2 if source == "arrays" else None
    found = model().evaluate(*data, batch_size=batch_size, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["train_on_batch", "test_on_batch", "predict_on_batch"])
def test_batches_by_hand_are_checked(method):
    for wrong in (BAD_IDS, IDS.astype("int64") + 2**32):
        with pytest.raises(ValueError, match="vocab_size=61"):
            getattr(model(), method)(wrong)


def test_predict_and_validation_data_are_checked():
    with pytest.raises(ValueError, match="vocab_size=61"):
        model().predict(BAD_IDS, verbose=0)
    for validation in ((IDS, BAD_LABELS), Pairs(IDS, BAD_LABELS)):
        with pytest.raises(Exception, match="-5"):  # within a data set TensorFlow raises its own
            model().fit(IDS, IDS, validation_data=validation, verbose=0)


@pytest.mark.parametrize("labels", [IDS.astype("float32"), np.full(IDS.shape, np.nan), BAD_LABELS])
def test_labels_are_token_ids_or_ignored(labels):
    with pytest.raises(ValueError, match="abels must be"):
        model().fit(IDS, labels, verbose=0)
    with pytest.raises(ValueError, match="abels must be"):
        model()(IDS, labels=labels)


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_weights_need_labels(method):
    run = getattr(model(), method)
    with pytest.raises(ValueError, match=r"`sample_weight` needs labels.*Received"):
        run(IDS, sample_weight=np.ones(6), verbose=0)
    run((batch for batch in [(IDS[:2], None, np.ones(2))]), verbose=0)
    with pytest.raises(ValueError, match=r"`class_weight` needs labels.*Received"):
        model().fit(IDS, class_weight={1: 2.0}, verbose=0)
    with pytest.raises(ValueError, match=r"`sample_weight` needs labels.*Received"):
        model().fit(IDS, validation_data=(IDS, None, np.ones(6)), verbose=0)


def test_weights_of_classes_are_for_rows_with_one_label():
    with pytest.raises(ValueError, match=r"`class_weight` is for rows .*Received: class_weight="):
        model().fit(IDS, IDS, class_weight={1: 2.0}, verbose=0)
    with pytest.raises(ValueError, match=r"`class_weight` is for rows .*Received: class_weight="):
        model().fit(Pairs(IDS, IDS), class_weight={1: 2.0}, verbose=0)
    with pytest.raises(ValueError, match=r"`class_weight` is for rows .*Received: class_weight="):
        model().train_on_batch(IDS, IDS, None, {1: 2.0})


@pytest.mark.parametrize(
    "weight",
    [
        np.ones((6, 11)),
        np.ones((6, 12, 1)),
        np.ones(5),
        np.full(6, np.nan),
        -np.ones(6),
        np.array(list("abcdef")),
        "abcdef",
        [1.0] * 6,
    ],
    ids=["tokens", "dims", "rows", "NaN", "negative", "strings", "string", "list"],
)
def test_weights_are_numbers_of_rows_or_of_labels(weight):
    for run in (model().fit, model().evaluate):
        with pytest.raises(ValueError, match=r"`sample_weight` must .*Received: sample_weight"):
            run(IDS, IDS, sample_weight=weight, verbose=0)
    with pytest.raises(ValueError, match=r"`sample_weight` must .*Received: sample_weight"):
        model().train_on_batch(IDS, IDS, weight)


def test_arguments_of_fit_stand_where_those_of_keras_do():
    history = model().fit(IDS, None, 2, 1, 0, None, 0.0, (IDS,)).history
    assert "val_loss" in history
    with pytest.raises(TypeError, match=r"Received: \['epochs'\] twice"):
        model().fit(IDS, None, 2, 1, epochs=1)
    for often in (0, "a", 1.5):
        with pytest.raises(ValueError, match=r"`validation_freq` must be .*Received: validation_"):
            model().fit(IDS, validation_data=(IDS,), validation_freq=often, verbose=0)


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_data_sets_without_batches_are_refused(method, monkeypatch):
    monkeypatch.setattr(Pairs, "__len__", lambda self: 0)
    with pytest.raises(ValueError, match=r"`x` must hold at least one batch.*Received"):
        getattr(model(), method)(Pairs(IDS, IDS), verbose=0)


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_no_rows_are_refused(method):
    for x in (IDS[:0], {"token_ids": IDS[:0]}):
        with pytest.raises(ValueError, match=r"at least one row.*Received"):
            getattr(model(), method)(x, verbose=0)


def test_validation_data_without_rows_is_named(monkeypatch):
    monkeypatch.setattr(Pairs, "__len__", lambda self: 0)
    for held_out in ((IDS[:0], IDS[:0]), Pairs(IDS, IDS)):
        with pytest.raises(ValueError, match=r"`validation_data` must hold at least one"):
            model().fit(IDS, validation_data=held_out, verbose=0)


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_a_run_needs_data_and_batches_of_some_size(method):
    with pytest.raises(ValueError, match=r"`x` must be.*Received: x=None"):
        getattr(model(), method)(None, verbose=0)
    for size in (0, "a", 2.0, True):
        with pytest.raises(ValueError, match=r"`batch_size` must be.*Received"):
            getattr(model(), method)(IDS, batch_size=size, verbose=0)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tensors of TensorFlow alone")
def test_ragged_rows_are_refused():
    tf = pytest.importorskip("tensorflow")
    rows = tf.ragged.constant([[1, 2, 3], [4, 5]], dtype="int32")
    batches = tf.data.Dataset.from_tensor_slices(rows).batch(2)
    with pytest.raises(ValueError, match=r"`token_ids` must be an array.*pad"):
        model()(rows)
    for x, message in ((rows, "`token_ids` must be"), (batches, "`x` must yield arrays.*pad")):
        for method in ("fit", "predict"):
            with pytest.raises(ValueError, match=message):
                getattr(model(), method)(x, verbose=0)


def test_a_list_around_the_token_ids_is_refused():
    compiled = small(**LIGHT)
    compiled.compile("sgd")
    with pytest.raises(ValueError, match=r"must be an array.*Received"):
        compiled.fit([IDS], IDS, verbose=0)


def test_labels_have_the_shape_of_the_token_ids():
    for labels in (IDS[:, :3], IDS[..., None]):
        with pytest.raises(ValueError, match=r"`y` must have shape .*12.*Received: y.shape="):
            model().fit(IDS, labels, verbose=0)
    with pytest.raises(ValueError, match=r"`y` must be an array of labels.*Received: y="):
        model().fit(IDS, {"a": IDS}, verbose=0)


def test_rows_of_one_token_are_learned_from_with_labels_alone():
    one = IDS[:, :1]
    for run in (model().fit, model().evaluate, model().test_on_batch):
        with pytest.raises(ValueError, match=r"`token_ids` must hold at least two.*y=None"):
            run({"token_ids": one})
    assert model().test_on_batch(one, one) > 0


@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_of_a_classifier_are_classes(label):
    classifier = small(Qwen3NextClassifier, num_labels=3, **LIGHT)
    classifier.compile("sgd")
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        classifier.fit(IDS, np.array([0, 1, 2, 0, 1, label]), verbose=0)


@pytest.mark.parametrize("loss", ["binary_crossentropy", "mse"])
def test_several_labels_of_a_row_are_one_per_logit_and_weigh_as_one(loss):
    classifier = small(Qwen3NextClassifier, num_labels=3, **LIGHT)
    classifier.compile("sgd", loss, **CHEAPEST_STEPS)
    labels = np.arange(18).reshape(6, 3) % 2
    for wrong in (labels[:, 0], labels[:, :1], labels[:, :2]):
        with pytest.raises(ValueError, match=r"`y` must have shape .*3\).*Received: y.shape="):
            classifier.fit(IDS, wrong, verbose=0)
    with pytest.raises(ValueError, match="`class_weight` is for rows with one label"):
        classifier.fit(IDS, labels, class_weight={0: 2.0}, verbose=0)
    with pytest.raises(ValueError, match=r"`sample_weight` must have one weight per row.*3\)"):
        classifier.evaluate(IDS, labels, sample_weight=np.ones((6, 3)), verbose=0)
    first = classifier.evaluate(IDS[:2], labels[:2], verbose=0)
    weight = np.array([3.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    found = classifier.evaluate(IDS, labels, sample_weight=weight, verbose=0)
    np.testing.assert_allclose(found, first, rtol=1e-5)


def test_a_classifier_learns_from_labels():
    classifier = small(Qwen3NextClassifier, num_labels=3, **LIGHT)
    classifier.compile("sgd")
    for run in (classifier.fit, classifier.evaluate, classifier.train_on_batch):
        with pytest.raises(ValueError, match=r"`y`. Received: y=None"):
            run(IDS)
    classifier.fit(IDS, np.arange(6) % 3, class_weight={1: 2.0}, verbose=0)


def test_weights_of_classes_are_numbers_by_class():
    classifier = small(Qwen3NextClassifier, **LIGHT, num_labels=3)
    classifier.compile("sgd", **CHEAPEST_STEPS)
    for weights in ([1.0, 2.0], {3: 1.0}, {"a": 1.0}, {0: -1.0}, {0: np.nan}):
        for run in (classifier.fit, classifier.train_on_batch):
            with pytest.raises(ValueError, match=r"`class_weight` must be .*Received: class_weig"):
                run(IDS, np.arange(6) % 3, class_weight=weights)


@pytest.mark.parametrize("steps", [-1, 0, 2.5, "a", "auto", True])
def test_steps_at_once_are_counted(steps):
    with pytest.raises(ValueError, match=r"`steps_per_execution` must be .*Received: steps_per_"):
        small(**LIGHT).compile("sgd", steps_per_execution=steps)
