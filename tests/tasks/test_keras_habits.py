"""What users of Keras are used to: one number from `evaluate`, `losses` after a call, `export`."""

import threading

import keras
import numpy as np
import pytest

from qwen3_next import (
    DistillationTrainer,
    MTPConfig,
    Qwen3Next,
    Qwen3NextClassifier,
    merge_linear,
)
from tests.support.mtp_models import DENSE, LIGHT
from tests.support.running import BACKEND, CHEAPEST_STEPS
from tests.support.small_models import ONE_LAYER, logits_once, random_ids, small

IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def model():
    model = small(**{**ONE_LAYER, "layer_types": ("full_attention",)})
    model.compile("sgd", **CHEAPEST_STEPS)
    return model


def test_a_compiled_loss_alone_is_one_number(model):
    named = model.evaluate(IDS, verbose=0, return_dict=True)
    assert {"loss", "expert_load_max", "expert_load_unused"} == set(named)
    assert model.evaluate(IDS, verbose=0) == named["loss"]
    assert np.ndim(model.test_on_batch(IDS)) == 0
    assert np.ndim(model.train_on_batch(IDS)) == 0


def test_compiled_metrics_stand_behind_the_loss():
    model = small(**LIGHT, mtp=MTPConfig(num_predict_tokens=1, speculation_lookahead=1))
    model.compile("sgd", weighted_metrics=["sparse_categorical_accuracy"], **CHEAPEST_STEPS)
    named = model.evaluate(IDS, verbose=0, return_dict=True)
    assert len(named) == 4
    expected = [named["loss"], named["sparse_categorical_accuracy"]]
    assert model.evaluate(IDS, verbose=0) == expected


def test_metrics_stay_until_others_are_compiled():
    model = small(**LIGHT)
    labels = logits_once(model, IDS).argmax(-1)  # all of them are hit
    for metrics, names in ((["accuracy"], {"accuracy"}), (None, {"accuracy"}), ([], set())):
        model.compile("sgd", metrics=metrics, **CHEAPEST_STEPS)
        found = model.test_on_batch(IDS, labels, return_dict=True)
        assert {name: found[name] for name in found.keys() - {"loss"}} == dict.fromkeys(names, 1.0)


def test_a_call_in_training_leaves_the_load_balancing_loss(model):
    model(IDS)
    assert model.losses == []
    model(IDS, training=True)
    (loss,) = model.losses
    expected = model(IDS, labels=IDS, training=True).aux_loss * model.config.router_aux_loss_coef
    np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (loss, expected)), rtol=1e-6)
    assert model.losses == []


def test_a_training_step_counts_it_once(model):
    expected = keras.ops.convert_to_numpy(model(IDS, labels=IDS, training=True).loss)
    np.testing.assert_allclose(model.train_on_batch(IDS), expected, rtol=1e-5)


@pytest.mark.parametrize("kind, fields", [(Qwen3Next, LIGHT), (Qwen3NextClassifier, ONE_LAYER)])
def test_a_summary_shows_the_shape_of_every_layer(kind, fields):
    options = {"mtp": MTPConfig(1)} if kind is Qwen3Next else {"num_labels": 3}
    printed = []
    small(kind, **fields, **options).summary(print_fn=printed.append, expand_nested=True)
    without = [line for line in "".join(printed).splitlines() if "?" in line]
    # With a shape of its own, Keras would export a model in a model for floats.
    assert [line.split()[1:3] for line in without] == [["model", "(Qwen3NextBackbone)"]]


@pytest.mark.skipif(BACKEND != "jax", reason="JAX alone keeps values elsewhere during a run")
@pytest.mark.parametrize("call", ["call", "generate"])
def test_a_call_during_a_run_says_what_is_wrong(model, call):
    calls = {"call": lambda: model(IDS), "generate": lambda: model.generate(IDS, max_new_tokens=2)}
    errors = []

    def other_thread():
        try:
            calls[call]()
        except Exception as error:
            errors.append(error)

    class Elsewhere(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            thread = threading.Thread(target=other_thread)
            thread.start()
            thread.join()

    model.fit(IDS, verbose=0, callbacks=[Elsewhere()])
    assert [type(error) for error in errors] == [ValueError]
    assert "`fit`" in str(errors[0])
    calls[call]()


@pytest.mark.skipif(BACKEND != "jax", reason="JAX alone keeps values elsewhere during a run")
def test_what_reads_weights_during_a_run_says_what_is_wrong(model, tmp_path):
    trainer = DistillationTrainer(small(**LIGHT), model)
    reads = {
        "save": lambda: model.save(tmp_path / "model.keras"),
        "save_weights": lambda: model.save_weights(tmp_path / "model.weights.h5"),
        "save_to_preset": lambda: model.save_to_preset(tmp_path / "preset"),
        "export": lambda: model.export_to_transformers(tmp_path / "published"),
        "get_weights": model.get_weights,
        "merge": lambda: merge_linear([model, model], [0.5, 0.5]),
        "trainer": lambda: trainer.save(tmp_path / "trainer.keras"),
    }
    errors = {}

    def read(batch, logs):
        for name, function in reads.items():
            with pytest.raises(ValueError) as error:
                function()
            errors[name] = str(error.value)

    model.fit(IDS, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=read)])
    assert errors.keys() == reads.keys()
    for message in errors.values():
        assert "`fit`" in message and "Received: " in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(BACKEND == "torch", reason="checked where it is compiled")
def test_a_model_is_exported_without_a_signature(tmp_path):
    tf = pytest.importorskip("tensorflow")
    # On JAX a dense model: TensorFlow may be too old to read what a newer JAX writes for `top_k`.
    dense = DENSE if BACKEND == "jax" else {}
    model = small(**{**ONE_LAYER, **dense, "max_position_embeddings": 16})
    model.export(tmp_path / "artifact", verbose=False)
    artifact = tf.saved_model.load(tmp_path / "artifact")
    ids = random_ids(1, 16) if BACKEND == "jax" else random_ids(3, 7)
    found = artifact.serve(tf.constant(ids, "int32"))
    np.testing.assert_allclose(found, logits_once(model, ids), atol=1e-5)


@pytest.mark.portable
@pytest.mark.skipif(BACKEND != "torch", reason="the others export")
def test_export_is_refused_where_nothing_traces_the_model(tmp_path):
    for name in ("tf_saved_model", "onnx", "torch"):
        with pytest.raises(ValueError, match=f"`export`.*Received: format='{name}'"):
            small(**ONE_LAYER).export(tmp_path / "artifact", format=name)


@pytest.mark.skipif(BACKEND == "torch", reason="refused there")
def test_what_cannot_be_exported_is_refused_by_name(model, tmp_path):
    ids = keras.InputSpec(shape=(1, 8), dtype="int32")
    for signature in ([], "a", 3, ids, {"token_ids": ids}, [ids, ids], [IDS], [[1]]):
        with pytest.raises(ValueError, match=r"`input_signature` must be.*Received"):
            model.export(tmp_path / "artifact", input_signature=signature)
    for path in (None, 3, "", b"a"):
        with pytest.raises(ValueError, match=r"`filepath` must be a path. Received"):
            model.export(path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", str(tmp_path / "file" / "artifact")):
        with pytest.raises(ValueError, match=r"`filepath` must be a directory. Received"):
            model.export(path)
    with pytest.raises(ValueError, match=r"`export`.*LiteRT. Received: format='litert'"):
        model.export(tmp_path / "artifact.tflite", format="litert")
    if BACKEND == "jax":
        any_length = [keras.InputSpec(shape=(1, None), dtype="int32")]
        with pytest.raises(ValueError, match=r"`input_signature` must fix.*Received"):
            model.export(tmp_path / "artifact", input_signature=any_length)
