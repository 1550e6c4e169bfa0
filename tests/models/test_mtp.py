"""Multi-token prediction: the module, its losses, training it, and its weights on disk."""

import functools
import json

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file

from qwen3_next import (
    MTPConfig,
    Qwen3Next,
    Qwen3NextBackbone,
    Qwen3NextClassifier,
    Qwen3NextConfig,
    pack,
    pad,
    self_distillation_data,
    wrap_model_with_mtp,
)
from qwen3_next.checkpoints.safetensors_files import SINGLE
from qwen3_next.layers.ops.cross_entropy import api
from qwen3_next.models.inputs import Inputs, next_token_labels
from qwen3_next.models.mtp import step_losses
from tests.support import oracles
from tests.support.published import FIXTURES, load, published, save, weights
from tests.support.running import BACKEND, assert_close, gradients, run, weight_arrays, with_weights
from tests.support.small_models import SMALL, random_ids, small

MODE = "jit" if BACKEND == "jax" else "xla"
DENSE = {"num_experts": 0, "mlp_only_layers": (), "shared_expert_intermediate_size": 0}
# The backbone makes no difference to most of this: one small layer compiles soonest.
LIGHT = {**DENSE, "num_layers": 1, "layer_types": ("full_attention",)}
ROWS = [random_ids(n, seed=n) for n in (9, 14)]


@functools.cache
def program(model, *keys):
    def call(*values):
        output = model(dict(zip(keys, values)), labels=values[0])
        return output.loss, output.mtp_loss, *output.mtp_step_losses.values()

    return with_weights(model, call)


def outputs(model, inputs):
    """Scalars of a call with labels, compiled."""
    keys = sorted(inputs, reverse=True)  # token_ids first
    arrays = [inputs[key] for key in keys]
    return run(program(model, *keys), *weight_arrays(model), *arrays, mode=MODE)


@pytest.fixture(scope="module")
def model():
    """Two steps, a transformer module."""
    return small(**LIGHT, mtp=MTPConfig(num_predict_tokens=2, speculation_lookahead=2))


@pytest.fixture(scope="module")
def alone(model):
    return [outputs(model, {"token_ids": row[None]})[2:] for row in ROWS]


def test_the_module_matches_the_oracle():
    model = small(**DENSE, mtp=MTPConfig())
    module = model.mtp_modules[0]
    named = {
        v.path.removeprefix("mtp/").rsplit("/", 1)[0]: ops.convert_to_numpy(v.value)
        for v in module.trainable_variables
    }
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 2, 11, SMALL["hidden_size"])).astype("float32")
    call = with_weights(module, lambda e, h: module(e, h).hidden)
    found = run(call, *weight_arrays(module), *x, mode=MODE)
    heads = SMALL["num_attention_heads"], SMALL["num_key_value_heads"]
    rotary = SMALL["rope_theta"], SMALL["partial_rotary_factor"]
    expected = oracles.multi_token_prediction(*x, named, *heads, *rotary, 1e-6)
    assert_close(found, expected, 1e-5)
    named["fc"] = named["fc"] * 1.01
    wrong = oracles.multi_token_prediction(*x, named, *heads, *rotary, 1e-6)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(found, wrong, 1e-5)


def step_logits(model, token_ids):
    """Logits of both steps over a whole row, by the model's own road to its losses."""
    hidden = model.mtp_input(model.backbone(token_ids, full_output=True))
    embedded = model.backbone.embed_tokens(token_ids)
    for step in (1, 2):
        rest = token_ids.shape[1] - step
        hidden = model.mtp_module(step)(embedded[:, step:], hidden[:, :rest]).hidden
        yield model.logits(hidden)


def check_against_published(model):
    fixture = np.load(FIXTURES / "next_mtp.npz")
    ids = fixture["case/mtp/input_ids"]
    for step, logits in enumerate(step_logits(model, ops.convert_to_tensor(ids)), start=1):
        logits = ops.convert_to_numpy(logits)
        np.testing.assert_allclose(logits, fixture[f"case/mtp/logits_k{step}"], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mtp"), *published("next_mtp"))


def test_published_modules_give_published_logits(checkpoint):
    model = load(checkpoint, mtp=MTPConfig())
    assert any(path.startswith("mtp/") for path in model.coverage_report.copied)
    assert not model.coverage_report.unused
    check_against_published(model)


def test_reading_the_wrong_hidden_state_is_seen(checkpoint):
    with pytest.raises(AssertionError):
        check_against_published(load(checkpoint, mtp=MTPConfig(hidden_state="before_norm")))


def test_the_other_order_of_the_halves_is_seen(checkpoint):
    model = load(checkpoint, mtp=MTPConfig())
    kernel = model.mtp_modules[0].fc.kernel
    kernel.assign(ops.roll(kernel, kernel.shape[0] // 2, axis=0))
    with pytest.raises(AssertionError):
        check_against_published(model)


def test_modules_are_exported_as_they_were_published(checkpoint, tmp_path):
    load(checkpoint, mtp=MTPConfig()).export_to_transformers(tmp_path)
    tensors = published("next_mtp")[1]
    exported = load_file(tmp_path / SINGLE)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)
    assert "mtp" not in json.loads((tmp_path / "config.json").read_text())


def test_incomplete_modules_are_refused_by_name(tmp_path):
    config, tensors = published("next_mtp")
    del tensors["mtp.fc.weight"]
    with pytest.raises(ValueError, match=r"missing.*mtp\.fc\.weight"):
        load(save(tmp_path, config, tensors), mtp=MTPConfig())


@pytest.mark.parametrize(
    "fields", [{"mtp_head_type": "mlp"}, {"share_weights_across_steps": False}]
)
def test_modules_without_a_published_layout_are_not_exported(fields, tmp_path):
    with pytest.raises(ValueError, match="mtp"):
        small(mlp_only_layers=(), mtp=MTPConfig(**fields)).export_to_transformers(tmp_path)


def test_the_loss_is_the_main_loss_and_the_weighted_steps(model):
    inputs = {"token_ids": random_ids(2, 12)}
    loss, mtp_loss, *steps = outputs(model, inputs)
    plain = small(**LIGHT)
    call = with_weights(plain, lambda ids: plain(ids, labels=ids).loss)
    main = run(call, *weight_arrays(plain), inputs["token_ids"], mode=MODE)
    assert_close(loss - mtp_loss, main, 1e-6)
    assert_close(mtp_loss, 0.5 * (2 / 3 * steps[0] + 1 / 3 * steps[1]), 1e-6)


def test_a_step_has_the_token_after_the_next_for_its_label(model):
    ids = ROWS[0][None]
    found = outputs(model, {"token_ids": ids})[2:]
    for step, (loss, logits) in enumerate(
        zip(found, step_logits(model, ops.convert_to_tensor(ids))), 1
    ):
        # The last step + 1 tokens have no label.
        logits = ops.convert_to_numpy(logits)[0, :-1]
        assert_close(loss, oracles.cross_entropy(logits, ids[0, step + 1 :]).mean(), 1e-5)


@pytest.mark.parametrize("how", ["left", "right", "packed"])
def test_padded_and_packed_rows_have_the_loss_of_separate_ones(how, model, alone):
    if how == "packed":
        inputs = pack(ROWS, length=24)
    else:
        inputs = pad(ROWS, side=how)
    found = outputs(model, inputs)[2:]
    for step in (1, 2):
        counts = np.array([len(row) - step - 1 for row in ROWS])
        each = np.array([losses[step - 1] for losses in alone])
        assert_close(found[step - 1], (counts * each).sum() / counts.sum(), 2e-5)


def steps_alone(sequential, **changes):
    """The losses of all steps from the backbone's hidden states, and what they are computed with."""
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
    for sequential in (True, False):
        call, arrays = steps_alone(sequential)
        found.append(gradients(call, [*arrays, *inputs], np.float32(1.0)))
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


def test_fit_logs_every_step_and_a_frozen_trunk_stays():
    mtp = MTPConfig(num_predict_tokens=2, speculation_lookahead=2)
    model = wrap_model_with_mtp(small(**LIGHT), mtp, freeze_backbone=True)
    before = weights(model)
    model.compile(keras.optimizers.Adam(1e-2))
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


def test_wrapping_shares_the_trunk():
    base = small()
    model = wrap_model_with_mtp(base)
    assert model.backbone is base.backbone and model.lm_head is base.lm_head
    with pytest.raises(ValueError, match="already"):
        wrap_model_with_mtp(model)


@pytest.mark.parametrize("kind", [Qwen3NextBackbone, Qwen3NextClassifier])
def test_only_language_models_have_modules(kind):
    labels = {"num_labels": 2} if kind is Qwen3NextClassifier else {}
    with pytest.raises(ValueError, match="multi-token prediction"):
        kind(Qwen3NextConfig(**SMALL, mtp=MTPConfig()), **labels)
    with pytest.raises(ValueError, match="language model"):
        wrap_model_with_mtp(kind(Qwen3NextConfig(**SMALL), **labels))


def test_a_saved_model_keeps_its_modules(model, tmp_path):
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.config == model.config
    tokens = model.generate([[1, 2, 3]], 6).tokens[0]
    np.testing.assert_array_equal(loaded.generate([[1, 2, 3]], 6).tokens[0], tokens)
    model.save_to_preset(tmp_path / "preset")
    again = Qwen3Next.from_preset(tmp_path / "preset", progress=False)
    np.testing.assert_array_equal(weights(again)["mtp/fc/kernel"], weights(model)["mtp/fc/kernel"])


def test_self_distillation_continues_every_prompt(model):
    data = self_distillation_data(model, ROWS, 5, batch_size=2, progress=False)
    tokens, _ = model.generate(ROWS, 5)
    for prompt, new, row, mask in zip(ROWS, tokens, data["token_ids"], data["padding_mask"]):
        np.testing.assert_array_equal(row[mask], np.concatenate([prompt, new]))


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_predict_tokens", 0),
        ("mtp_head_type", "medusa"),
        ("loss_weight_decay", 0.0),
        ("mtp_loss_weight", -1.0),
        ("speculation_lookahead", 5),
        ("hidden_state", "middle"),
        ("sequential_forward", 1),
        ("warmup_steps", -1),
        ("share_weights_across_steps", None),
    ],
)
def test_every_field_is_checked(field, value):
    with pytest.raises(ValueError, match=f"{field}.*Received"):
        MTPConfig(**{field: value})


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="main_loss_weight"):
        Qwen3NextConfig(mtp={"main_loss_weight": 1.0})
