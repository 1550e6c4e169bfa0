"""Losses of multi-token prediction: what they are, what they cost, and training with them."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import MTPConfig, pack, pad, wrap_model_with_mtp
from qwen3_next.layers.ops.cross_entropy import api
from qwen3_next.models.inputs import Inputs, next_token_labels
from qwen3_next.training.mtp_losses import step_losses
from tests.support import oracles
from tests.support.mtp_models import LIGHT, ROWS, step_logits, two_steps
from tests.support.published import weights
from tests.support.running import (
    BACKEND,
    CHEAPEST,
    CHEAPEST_STEPS,
    DEFAULT,
    assert_close,
    gradients,
    run,
    weight_arrays,
    with_weights,
)
from tests.support.small_models import SMALL, random_ids, small


@functools.cache
def program(model, *keys):
    def call(*values):
        output = model(dict(zip(keys, values)), labels=values[0])
        return output.loss, output.mtp_loss, *output.mtp_step_losses.values()

    return with_weights(model, call)


def outputs(model, inputs, mode=CHEAPEST):
    """Scalars of a call with labels."""
    keys = sorted(inputs, reverse=True)  # token_ids first
    arrays = [inputs[key] for key in keys]
    return run(program(model, *keys), *weight_arrays(model), *arrays, mode=mode)


@pytest.fixture(scope="module")
def alone():
    return [outputs(two_steps(), {"token_ids": row[None]})[2:] for row in ROWS]


def test_the_loss_is_the_main_loss_and_the_weighted_steps():
    inputs = {"token_ids": random_ids(2, 12)}
    loss, mtp_loss, *steps = outputs(two_steps(), inputs, DEFAULT)
    plain = small(**LIGHT)
    call = with_weights(plain, lambda ids: plain(ids, labels=ids).loss)
    main = run(call, *weight_arrays(plain), inputs["token_ids"], mode=CHEAPEST)
    assert_close(loss - mtp_loss, main, 1e-6)
    assert_close(mtp_loss, 0.5 * (2 / 3 * steps[0] + 1 / 3 * steps[1]), 1e-6)


def test_a_step_has_the_token_after_the_next_for_its_label():
    ids = ROWS[0][None]
    found = outputs(two_steps(), {"token_ids": ids})[2:]
    steps = run(lambda ids: tuple(step_logits(two_steps(), ids)), ids, mode=CHEAPEST)
    for step, (loss, logits) in enumerate(zip(found, steps, strict=True), 1):
        # The last step + 1 tokens have no label.
        expected = oracles.cross_entropy(logits[0, :-1], ids[0, step + 1 :]).mean()
        assert_close(loss, expected, 1e-5)


@pytest.mark.parametrize("how", ["left", "right", "packed"])
def test_padded_and_packed_rows_have_the_loss_of_separate_ones(how, alone):
    if how == "packed":
        inputs = pack(ROWS, length=24)
    else:
        inputs = pad(ROWS, side=how)
    found = outputs(two_steps(), inputs)[2:]
    for step in (1, 2):
        counts = np.array([len(row) - step - 1 for row in ROWS])
        each = np.array([losses[step - 1] for losses in alone])
        assert_close(found[step - 1], (counts * each).sum() / counts.sum(), 2e-5)


def steps_alone(sequential, **changes):
    """All steps' losses as a function of the backbone's hidden states, and the weights it takes."""
    mtp = MTPConfig(sequential_forward=sequential, mtp_head_type="shared_lm_head")
    model = small(**LIGHT, mtp=mtp, **changes)

    def call(hidden, ids):
        inputs = Inputs(ids, None, None)
        return sum(step_losses(model, hidden, inputs, next_token_labels(inputs)).losses)

    return with_weights(model, call), weight_arrays(model)


def test_sequential_steps_have_the_gradient_of_joint_ones():
    hidden = np.random.default_rng(0).normal(size=(2, 16, SMALL["hidden_size"]))
    inputs = [hidden.astype("float32"), random_ids(2, 16)]
    found = []
    for sequential, mode in ((True, DEFAULT), (False, CHEAPEST)):
        call, arrays = steps_alone(sequential)
        found.append(gradients(call, [*arrays, *inputs], np.float32(1.0), mode))
    used = 0
    for one, other in zip(*found, strict=True):
        if one is not None:
            assert_close(one, other, 1e-5)
            used += 1
    assert used


@pytest.mark.skipif(BACKEND != "jax", reason="reads the memory plan of XLA")
def test_sequential_steps_hold_the_logits_of_one_chunk(monkeypatch):
    import jax

    vocab_size, tokens, memory = 8192, 512, {}
    monkeypatch.setattr(api, "CHUNK_LOGITS", 32 * vocab_size)
    for sequential in (True, False):
        call, arrays = steps_alone(sequential, vocab_size=vocab_size)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        hidden = jax.ShapeDtypeStruct((1, tokens, SMALL["hidden_size"]), "float32")
        ids = jax.ShapeDtypeStruct((1, tokens), "int32")
        program = jax.jit(jax.grad(call, tuple(range(len(arrays))))).lower(*shapes, hidden, ids)
        memory[sequential] = program.compile().memory_analysis().temp_size_in_bytes
    assert memory[True] < tokens * vocab_size * 4  # not even the logits of one step
    assert memory[False] > 4 * tokens * vocab_size * 4 / 2


def test_fit_logs_every_step_and_a_frozen_backbone_stays():
    mtp = MTPConfig(num_predict_tokens=2, speculation_lookahead=2)
    model = wrap_model_with_mtp(small(**LIGHT), mtp, freeze_backbone=True)
    before = weights(model)
    model.compile(keras.optimizers.Adam(1e-2), **CHEAPEST_STEPS)
    ids = random_ids(4, 16)
    history = model.fit(ids, epochs=3, verbose=0).history
    assert history["mtp_loss_k1"][-1] < history["mtp_loss_k1"][0]
    assert {"mtp_loss_k2", "mtp_accuracy_k1", "mtp_accuracy_k2"} <= set(history)
    after = weights(model)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed and all(path.startswith("mtp/") for path in changed)
    assert {v.path for v in model.trainable_variables} >= changed
    results = model.evaluate(ids, verbose=0, return_dict=True)
    assert "mtp_accuracy_k1" in results


def test_the_weight_of_the_steps_warms_up():
    mtp = MTPConfig(warmup_steps=4, num_predict_tokens=1, speculation_lookahead=1)
    model = small(**LIGHT, mtp=mtp)
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=False)
    losses = []
    for _ in range(6):
        results = model.train_on_batch(random_ids(2, 8), return_dict=True)
        losses.append(float(results["loss"]))
        model.reset_metrics()
    rises = np.diff(losses)
    assert (rises[:3] > 0.01).all()
    assert_close(rises[:3], [rises[0]] * 3, 1e-3)
    assert_close(rises[3:], [0.0, 0.0], 1e-3)
