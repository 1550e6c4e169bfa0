"""Distillation against its definition, and what Keras offers: fit, save, resume."""

import functools
import zipfile

import h5py
import keras
import numpy as np
import pytest

from qwen3_next import ETDConfig
from qwen3_next.config import CrossArchTransferConfig
from qwen3_next.models.inputs import next_token_labels, unpack
from qwen3_next.transfer.distill.distillation import DistillationTrainer
from qwen3_next.transfer.distill.frozen_teacher import FrozenTeacher
from qwen3_next.transfer.distill.layer_streams import layer_outputs, layer_streams
from qwen3_next.transfer.named_weights import NamedWeights, rebuilt
from tests.support.distillation_models import (
    IDS,
    batch,
    linear_student,
    softmax_teacher,
    two_layers,
    values,
)
from tests.support.distillation_oracles import distillation_losses
from tests.support.running import BACKEND, CHEAPEST_STEPS, assert_close, to_numpy
from tests.support.small_models import logits_once

TEMPERATURE, ALPHA = 1.7, 0.3
NAMES = ("loss", "kd_loss", "task_loss")


@functools.cache
def pair():
    """Two models for tests that change neither."""
    return softmax_teacher(), linear_student()


@functools.cache
def evaluator():
    trainer = DistillationTrainer(*pair(), temperature=TEMPERATURE, alpha=ALPHA)
    trainer.compile("sgd", **CHEAPEST_STEPS)
    return trainer


def evaluated(x, y=None, trainer=None, **options):
    trainer = evaluator() if trainer is None else trainer
    found = trainer.evaluate(x, y, verbose=0, return_dict=True, **options)
    return np.array([found[name] for name in NAMES])


def expected(x, y, temperature=TEMPERATURE, alpha=ALPHA):
    teacher, student = (logits_once(m, x["token_ids"], x["padding_mask"]) for m in pair())
    flat = (a.reshape(-1, a.shape[-1]) for a in (student, teacher))
    return np.array(distillation_losses(*flat, y.reshape(-1), temperature, alpha))


def unshifted():
    """A batch with labels as a model takes them, and the same labels lined up with the logits."""
    x, y = batch()
    labels = np.roll(y, 1, axis=1)
    return (x, labels), to_numpy(next_token_labels(unpack(x), labels))


def test_labels_of_a_direct_call_are_unshifted():
    (x, labels), y = unshifted()
    direct = evaluator().compute_loss(x, labels)
    assert set(direct) == set(NAMES)
    assert_close([float(direct[name]) for name in NAMES], expected(x, y), 1e-5)
    named = evaluator().compute_loss(x, labels=labels)
    assert all(float(named[name]) == float(direct[name]) for name in NAMES)
    own = pair()[1](x, labels=labels).loss
    assert_close(float(direct["task_loss"]), float(own), 1e-5)
    with pytest.raises(ValueError, match="labels once"):
        evaluator().compute_loss(x, labels, labels=labels)


def test_the_losses_are_those_of_the_oracle():
    x, y = batch()
    found = evaluated(x, y)
    assert_close(found, expected(x, y), 1e-5)
    for wrong in ({"temperature": TEMPERATURE * 1.01}, {"alpha": ALPHA * 1.01}):
        with pytest.raises(AssertionError, match="off by"):
            assert_close(found, expected(x, y, **wrong), 1e-5)


def test_padding_batches_and_length_do_not_change_the_losses():
    whole = evaluated(*batch(), batch_size=4)
    assert_close(evaluated(*batch("left"), batch_size=4), whole, 1e-6)
    assert_close(evaluated(*batch("left", length=19), batch_size=2), whole, 1e-6)


def test_without_labels_the_next_tokens_are_learned():
    x, _ = batch()
    shifted = np.full(x["token_ids"].shape, -100, "int32")
    both = x["padding_mask"][:, :-1] & x["padding_mask"][:, 1:]
    shifted[:, :-1] = np.where(both, x["token_ids"][:, 1:], -100)
    assert_close(evaluated(x), expected(x, shifted), 1e-5)


def test_sample_weights_weigh_rows():
    x, y = batch()
    weight = np.array([0.0, 2.0, 0.0, 0.0], "float32")
    alone = np.where(weight[:, None] > 0, y, -100)
    share = (alone != -100).sum() / (y != -100).sum()
    found = evaluated(x, y, sample_weight=weight)
    assert_close(found, 2 * share * expected(x, alone), 1e-5)


def test_a_student_made_of_its_teacher_has_nothing_to_learn_and_leaves_it_alone():
    teacher = softmax_teacher()
    weights = NamedWeights(teacher)
    student = rebuilt(teacher, teacher.config, lambda row: weights[row.path])
    before = values(teacher)
    trainer = DistillationTrainer(teacher, student, alpha=0.0)
    trainer.compile(keras.optimizers.Adam(0.01), **CHEAPEST_STEPS)
    first = trainer.fit(*batch(), verbose=0).history
    assert abs(first["kd_loss"][0]) < 1e-6
    second = trainer.fit(*batch(), verbose=0).history
    assert second["kd_loss"][0] > 0.001
    assert second["task_loss"][0] < first["task_loss"][0]
    assert all((value == before[path]).all() for path, value in values(teacher).items())


class Run:
    """Two epochs of training, saved after the first."""

    def __init__(self, folder):
        self.path = folder / "trainer.keras"
        self.teacher, self.student = softmax_teacher(), linear_student()
        self.before = values(self.teacher)
        self.trainer = DistillationTrainer(self.teacher, self.student)
        self.trainer.compile(keras.optimizers.Adam(0.01), **CHEAPEST_STEPS)
        self.first = self.fit(self.trainer, [keras.callbacks.ModelCheckpoint(self.path)])
        self.second = self.fit(self.trainer)

    @staticmethod
    def fit(trainer, callbacks=()):
        options = {"batch_size": 2, "shuffle": False, "verbose": 0}
        return trainer.fit(IDS, callbacks=list(callbacks), **options).history


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def test_fit_learns_and_logs_every_loss(ran):
    assert list(ran.first) and set(ran.first) == {*NAMES, "accuracy"}
    for name in NAMES:
        assert ran.second[name][0] < ran.first[name][0]
    total = 0.5 * ran.first["kd_loss"][0] + 0.5 * ran.first["task_loss"][0]
    np.testing.assert_allclose(ran.first["loss"][0], total, rtol=1e-6)


def test_the_teacher_stays_as_it_was(ran):
    for path, value in values(ran.teacher).items():
        np.testing.assert_array_equal(value, ran.before[path], err_msg=path)
    assert ran.teacher.trainable_variables
    taught = {id(v) for v in ran.teacher.variables}
    trainer = ran.trainer
    assert taught <= {id(v) for v in trainer.non_trainable_variables}
    for others in (trainer.trainable_variables, trainer.weights, trainer.optimizer.variables):
        assert not taught & {id(v) for v in others}
    assert len(trainer.optimizer.variables) == 2 + 2 * len(ran.student.trainable_variables)


def test_a_saved_trainer_goes_on_to_the_bit(ran):
    again = keras.models.load_model(ran.path)
    assert again.teacher is None
    again.set_teacher(softmax_teacher())
    assert ran.fit(again) == ran.second
    for path, value in values(ran.student).items():
        np.testing.assert_array_equal(values(again.student)[path], value, err_msg=path)


def test_a_saved_trainer_has_no_weights_of_the_teacher(ran, tmp_path):
    zipfile.ZipFile(ran.path).extract("model.weights.h5", tmp_path)
    sizes = []

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            sizes.append(item.size)

    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(add)
    saved = [*ran.student.weights, *ran.trainer.optimizer.variables]
    assert sorted(sizes) == sorted(int(np.prod(v.shape)) for v in saved)


@pytest.mark.skipif(BACKEND != "jax", reason="reads the program of a step")
def test_the_teacher_is_no_constant_of_the_step_and_no_logits_are_held_whole():
    import jax

    wide = {"vocab_size": 8192, "max_position_embeddings": 512}
    trainer = DistillationTrainer(softmax_teacher(**wide), linear_student(**wide))
    trainer.compile("sgd")
    trainer.optimizer.build(trainer.trainable_variables)
    state = trainer._get_jax_state(True, True, True, True)
    step = (jax.ShapeDtypeStruct((64, 512), "int32"),)
    constants = jax.make_jaxpr(trainer.train_step)(state, step).consts
    assert sum(np.size(constant) for constant in constants) < 1000
    program = jax.jit(trainer.train_step, donate_argnums=0).lower(state, step).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 512 * 8192 * 4 / 2
    taught = sum(v.value.nbytes for v in trainer.teacher.variables)
    assert memory.alias_size_in_bytes > taught


def test_without_a_teachers_share_it_is_the_students_own_training():
    mtp = {"num_predict_tokens": 1, "speculation_lookahead": 1, "warmup_steps": 3}
    options = {
        "num_experts": 5,
        "mtp": {**mtp, "mtp_head_type": "shared_lm_head"},
        "etd": ETDConfig(0, 1, 0, max_think_iterations=1, ponder_cost=0.1),
    }
    models = [linear_student(**options) for _ in range(2)]
    trainer = DistillationTrainer(softmax_teacher(), models[0], alpha=0.0)
    histories = []
    for trained, options in ((trainer, {}), (models[1], CHEAPEST_STEPS)):
        trained.compile(keras.optimizers.SGD(0.1), **options)
        histories.append(trained.fit(IDS, verbose=0).history)
    own = histories[1]
    assert {"loss", "mtp_loss_k1", "expert_load_max", "think_iterations"} <= set(own)
    for name in own:
        np.testing.assert_allclose(histories[0][name], own[name], rtol=1e-5, err_msg=name)
    for first, second in zip(*(values(model).values() for model in models), strict=True):
        assert_close(first, second, 1e-6)
    assert int(models[0].mtp_steps) == 1


def relative(student, teacher, mask):
    student, teacher = np.float64(student), np.float64(teacher)
    student, teacher = student[mask], teacher[mask]
    return (((student - teacher) ** 2).sum(-1) / (teacher**2).sum(-1)).mean()


def test_alignment_trains_converted_mixers_alone_on_the_teachers_streams():
    teacher, student = two_layers()
    x, _ = batch("left")
    trainer = DistillationTrainer(teacher, student, stage="alignment")
    trainer.compile(keras.optimizers.Adam(0.01), **CHEAPEST_STEPS)
    stream = layer_streams(teacher, x)[1]
    layer = student.backbone.decoder_layers[1]
    own = layer.mixer(layer.input_layernorm(stream.hidden), padding_mask=x["padding_mask"])
    error = relative(to_numpy(own), to_numpy(stream.mixed), x["padding_mask"])
    direct = trainer.compute_loss(x)
    assert_close([float(direct[n]) for n in ("loss", "layer_1_loss")], [error, error], 1e-5)
    before, taught = values(student), values(teacher)
    history = trainer.fit(x, batch_size=2, epochs=3, shuffle=False, verbose=0).history
    assert set(history) == {"loss", "layer_1_loss"}
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    changed = {p for p, v in values(student).items() if (v != before[p]).any()}
    assert changed == {v.path for v in layer.mixer.trainable_variables}
    assert all((value == taught[path]).all() for path, value in values(teacher).items())
    assert student.trainable_variables == DistillationTrainer(teacher, student).trainable_variables


def test_alignment_may_train_other_layers_and_the_norms_before_them(monkeypatch):
    teacher, student = two_layers()
    passes, once = [], FrozenTeacher.streams
    monkeypatch.setattr(
        FrozenTeacher, "streams", lambda self, inputs: passes.append(1) or once(self, inputs)
    )
    trainer = DistillationTrainer(
        teacher, student, stage="alignment", layers=[1, 0], train_input_norms=True
    )
    layers = student.backbone.decoder_layers
    parts = [part for x in layers for part in (x.input_layernorm, x.mixer)]
    expected = [v.path for part in parts for v in part.trainable_variables]
    assert [v.path for v in trainer.trainable_variables] == expected
    losses = trainer.compute_loss(IDS)
    both = [float(losses[f"layer_{number}_loss"]) for number in (0, 1)]
    np.testing.assert_allclose(float(losses["loss"]), np.mean(both), rtol=1e-6)
    assert len(passes) == 1


def test_hidden_states_of_layers_are_compared_with_a_weight():
    teacher, student = two_layers()
    x, y = batch()
    plain = DistillationTrainer(teacher, student).compute_loss(x, y)
    found = DistillationTrainer(teacher, student, layer_weight=0.25).compute_loss(x, y)
    pairs = zip(*(to_numpy(layer_outputs(m, x).layers) for m in (student, teacher)))
    error = np.mean([relative(*pair, x["padding_mask"]) for pair in pairs])
    np.testing.assert_allclose(float(found["layer_loss"]), error, rtol=1e-5)
    np.testing.assert_allclose(float(found["loss"]), float(plain["loss"]) + error / 4, rtol=1e-5)


def test_the_loss_of_layers_is_a_mean_over_real_tokens_however_they_are_batched():
    teacher, student = two_layers()
    x, y = batch()
    y = np.where(np.arange(y.shape[1]) % (2 + np.arange(len(y)))[:, None], -100, y)
    trainer = DistillationTrainer(teacher, student, layer_weight=0.25)
    trainer.compile(**CHEAPEST_STEPS)
    whole, *parts = (
        trainer.evaluate(x, y, batch_size=size, verbose=0, return_dict=True) for size in (4, 3, 1)
    )
    expected = float(trainer.compute_loss(x)["layer_loss"])
    np.testing.assert_allclose(whole["layer_loss"], expected, rtol=1e-5)
    for found in parts:
        assert found == pytest.approx(whole, rel=1e-5)


def test_half_precision_distils_in_float32():
    student = linear_student(dtype="mixed_bfloat16")
    trainer = DistillationTrainer(pair()[0], student, temperature=TEMPERATURE, alpha=ALPHA)
    given, y = unshifted()
    found = trainer.compute_loss(*given)
    assert {keras.backend.standardize_dtype(value.dtype) for value in found.values()} == {"float32"}
    assert_close([float(found[name]) for name in NAMES], expected(given[0], y), 1e-2)


def test_a_configuration_gives_temperature_and_share():
    fields = {"distillation_temperature": TEMPERATURE, "distillation_alpha": ALPHA}
    config = CrossArchTransferConfig(**fields)
    given, y = unshifted()
    losses = DistillationTrainer(*pair(), config).compute_loss(*given)
    assert_close([float(losses[name]) for name in NAMES], expected(given[0], y), 1e-5)
    alone = DistillationTrainer(*pair(), CrossArchTransferConfig(use_distillation=False))
    losses = alone.compute_loss(*batch())
    assert float(losses["loss"]) == float(losses["task_loss"])
    with pytest.raises(ValueError, match=r"`config`.*Received"):
        DistillationTrainer(*pair(), {"distillation_alpha": 0.5})
    with pytest.raises(ValueError, match=r"`alpha`.*Received"):
        DistillationTrainer(*pair(), config, alpha=0.1)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere every step is compiled")
def test_a_step_with_xla_is_the_step_without_it(ran):
    trainer = DistillationTrainer(softmax_teacher(), linear_student())
    trainer.compile("sgd")
    assert not trainer.jit_compile
    trainer.compile(keras.optimizers.Adam(0.01), jit_compile=True)
    for name, value in ran.fit(trainer).items():
        np.testing.assert_allclose(value, ran.first[name], rtol=1e-5)


def test_prediction_is_the_students():
    _, student = pair()
    np.testing.assert_allclose(
        evaluator().predict(IDS, verbose=0), logits_once(student, IDS), atol=1e-5
    )
