"""Training: losses and gradients are the published ones, and what Keras offers works."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next, Qwen3NextConfig, pack, pad
from qwen3_next.checkpoints.hugging_face_config import config_from_hugging_face
from qwen3_next.models.weight_table import weight_table
from tests.support import oracles
from tests.support.mtp_models import LIGHT
from tests.support.published import FIXTURES, published
from tests.support.running import BACKEND, CHEAPEST, CHEAPEST_STEPS, DEFAULT, run_to_tensors
from tests.support.small_models import ONE_LAYER, SMALL, TWO_LAYERS, logits_once, random_ids, small

IDS = random_ids(4, 20)
ROWS = [random_ids(13, seed=1), random_ids(7, seed=2)]
# Without a loss over all rows of a batch.
FREE = {**TWO_LAYERS, "router_aux_loss_coef": 0.0}
# One layer, for what does not depend on layers.
EXPERTS = {**ONE_LAYER, "layer_types": ("full_attention",)}


def from_fixture(name):
    fields, tensors = published(name)
    model = Qwen3Next(Qwen3NextConfig(**config_from_hugging_face(fields)))
    variables = {v.path: v for v in model.variables}
    for row in weight_table(model.config):
        variables[row.path].assign(row.layout.load([tensors[t] for t in row.tensors]))
    return model


def loss_and_gradients(model, inputs, labels, mode=DEFAULT):
    """`(loss, aux_loss, {path: gradient})` of a training step, compiled unless asked otherwise."""
    weights = model.trainable_variables
    inputs = {k: keras.ops.convert_to_tensor(v) for k, v in inputs.items()}
    labels = keras.ops.convert_to_tensor(labels)
    if BACKEND == "jax":
        import jax

        others = [v.value for v in model.non_trainable_variables]

        def loss(values):
            output, _ = model.stateless_call(values, others, inputs, labels=labels, training=True)
            return output.loss, output.aux_loss

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, aux), grads = step([v.value for v in weights])
    else:
        import tensorflow as tf

        def step():
            with tf.GradientTape() as tape:
                output = model(inputs, labels=labels, training=True)
            wanted = [v.value for v in weights]
            return output.loss, output.aux_loss, tape.gradient(output.loss, wanted)

        compiled = tf.function(step, jit_compile=True) if mode == "xla" else step
        value, aux, grads = compiled()
    grads = {v.path: keras.ops.convert_to_numpy(g) for v, g in zip(weights, grads)}
    return float(value), None if aux is None else float(aux), grads


@pytest.mark.parametrize("name", ["next_grads", "qwen3_dense", "qwen3_moe"])
def test_loss_and_all_gradients_are_those_of_transformers(name):
    fixture = np.load(FIXTURES / f"{name}.npz")
    model = from_fixture(name)
    case = {
        key: fixture[f"case/train/{key}"]
        for key in ("input_ids", "attention_mask", "labels", "loss")
    }
    inputs = {"token_ids": case["input_ids"], "padding_mask": case["attention_mask"] > 0}
    mode = DEFAULT if name == "next_grads" else CHEAPEST  # it has the layers of all
    loss, aux, grads = loss_and_gradients(model, inputs, case["labels"], mode)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-6)
    if aux is not None:
        np.testing.assert_allclose(aux, fixture["case/train/aux_loss"], rtol=1e-6)
    for row in weight_table(model.config):
        expected = row.layout.load([fixture[f"grad/{t}"] for t in row.tensors])
        error = np.abs(grads[row.path] - expected).max() / np.abs(expected).max()
        assert error < 1e-4, (row.path, error)


def test_packed_gradients_are_the_sum_of_separate_ones_checkpointed_or_not():
    # Both batches have two rows, so that operations share their programs.
    batch = {key: np.pad(x, ((0, 1), (0, 0))) for key, x in pack(ROWS, length=20).items()}
    _, _, packed = loss_and_gradients(small(**FREE), batch, batch["token_ids"], CHEAPEST)
    batch = pad(ROWS, length=20)
    labels = np.where(batch["padding_mask"], batch["token_ids"], -100)
    model = small(**FREE, gradient_checkpointing=True)
    _, _, separate = loss_and_gradients(model, batch, labels, CHEAPEST)
    for path, grad in packed.items():
        scale = np.abs(separate[path]).max()
        np.testing.assert_allclose(grad, separate[path], atol=5e-5 * scale, err_msg=path)


@functools.cache
def model():
    """Compiled anew by every test, and trained by none."""
    return small(**LIGHT)


@functools.cache
def logits_of_rows():
    return logits_once(model(), IDS)


def evaluated(*data, sample_weight=None, **options):
    """Results of one layer over a data set, compiled with some options."""
    model().compile("sgd", **options, **CHEAPEST_STEPS)
    return model().evaluate(*data, sample_weight=sample_weight, verbose=0, return_dict=True)


def test_fit_learns_and_reports_expert_load():
    model = small(**TWO_LAYERS)
    model.compile(keras.optimizers.Adam(0.01))
    history = model.fit(IDS, epochs=6, batch_size=2, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] - 0.5
    assert all(1.0 <= value <= 5.0 for value in history["expert_load_max"])
    assert set(history) == {"loss", "expert_load_max", "expert_load_unused"}
    with pytest.raises(ValueError, match="vocab_size=61"):
        model.fit(np.full((2, 8), SMALL["vocab_size"]), verbose=0)


def test_fit_on_tokens_alone_is_fit_on_shifted_labels():
    batch = pad([row[:n] for row, n in zip(IDS, (20, 9, 15, 2))], side="left")
    shifted = np.full((4, 20), -100)
    both = batch["padding_mask"][:, :-1] & batch["padding_mask"][:, 1:]
    shifted[:, :-1] = np.where(both, batch["token_ids"][:, 1:], -100)
    model = small(**EXPERTS)
    model.compile("sgd", **CHEAPEST_STEPS)
    data = (batch,), (batch, shifted)
    a, b = (model.evaluate(*each, verbose=0, return_dict=True)["loss"] for each in data)
    output = run_to_tensors(lambda x: model(x, labels=x["token_ids"]), batch, mode=CHEAPEST)
    c = float(output.loss) - 0.01 * float(output.aux_loss)  # `evaluate` leaves that out
    np.testing.assert_allclose([a, c], [b, b], rtol=1e-6)


def test_a_metric_sees_logits_and_leaves_the_loss_alone():
    metrics = {"metrics": ["accuracy"], "weighted_metrics": ["accuracy"]}
    found = evaluated(IDS, **metrics)
    labels = IDS[:, 1:]
    flat = logits_of_rows()[:, :-1].reshape(labels.size, -1)
    loss = oracles.cross_entropy(flat, labels.ravel()).mean()
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-6)
    expected = (logits_of_rows().argmax(-1)[:, :-1] == labels).mean()
    for name in ("accuracy", "weighted_accuracy"):
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_a_custom_loss_gets_logits():
    def smoothed(labels, logits):
        return -keras.ops.mean(keras.ops.log_softmax(logits), axis=-1)

    logits = logits_of_rows().astype("float64")
    log_sum = np.log(np.exp(logits).sum(-1))
    loss = evaluated(IDS, IDS, loss=smoothed)["loss"]
    np.testing.assert_allclose(loss, (log_sum - logits.mean(-1)).mean(), rtol=1e-5)


def test_sample_weights_weigh_rows():
    weight = np.array([0.0, 1.0, 0.0, 0.0], "float32")
    labels = random_ids(4, 20, seed=8)
    weighted = evaluated(IDS, labels, sample_weight=weight)["loss"]
    alone = oracles.cross_entropy(logits_of_rows()[1], labels[1]).mean()
    np.testing.assert_allclose(4 * weighted, alone, rtol=1e-5)


def test_gradients_accumulate_to_those_of_the_whole_batch():
    start, whole, halves = (small(**LIGHT) for _ in range(3))
    whole.compile(keras.optimizers.SGD(0.1), **CHEAPEST_STEPS)
    halves.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    whole.fit(IDS, batch_size=4, shuffle=False, verbose=0)
    halves.fit(IDS, batch_size=2, shuffle=False, verbose=0)
    for first, *others in zip(*(m.trainable_variables for m in (start, whole, halves))):
        a, b = (keras.ops.convert_to_numpy(v - first) for v in others)
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max(), err_msg=first.path)


def test_mixed_precision_trains_with_checkpointing_and_dropout():
    options = {"gradient_checkpointing": True, "dropout": 0.1, "attention_dropout": 0.1}
    model = small(**TWO_LAYERS, **options, dtype="mixed_bfloat16")
    model.compile(keras.optimizers.Adam(0.01))
    history = model.fit(IDS, epochs=5, batch_size=2, verbose=0).history["loss"]
    assert history[-1] < history[0] - 0.3
    assert {v.dtype for v in model.trainable_variables} == {"float32"}


def test_losses_on_probabilities_are_refused():
    with pytest.raises(ValueError, match="from_logits"):
        model().compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=False))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a property of TensorFlow's graphs")
def test_rows_of_different_lengths_share_one_graph():
    import tensorflow as tf

    rows = [IDS[:2, :9], IDS[:1, :14]]
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(rows), output_signature=tf.TensorSpec((None, None), tf.int32)
    )
    model, losses = small(**TWO_LAYERS), []
    expected = float(model(rows[0], labels=rows[0], training=True).loss)
    model.compile(keras.optimizers.SGD(0.1))
    noted = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(logs["loss"])
    )
    history = model.fit(dataset, epochs=3, verbose=0, callbacks=[noted]).history["loss"]
    assert history[-1] < history[0]
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a property of TensorFlow's XLA bridge")
def test_new_values_do_not_compile_anew():
    import tensorflow as tf

    model = small(**ONE_LAYER)

    @tf.function(jit_compile=True)
    def step(ids):
        with tf.GradientTape() as tape:
            loss = model({"token_ids": ids}, labels=ids, training=True).loss
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    # A value that is taken for a constant stands in the program.
    batches = [tf.constant(random_ids(2, 16, seed=seed)) for seed in range(2)]
    programs = [step.experimental_get_compiler_ir(batch)(stage="hlo") for batch in batches]
    assert "while" in programs[0]
    assert programs[0] == programs[1]
