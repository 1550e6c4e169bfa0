"""What distillation refuses: models that do not fit, options, data."""

import functools

import numpy as np
import pytest

from qwen3_next import DistillationTrainer, ETDConfig, Qwen3NextClassifier
from tests.support.distillation_models import (
    IDS,
    TEACHER_TYPES,
    TWO,
    linear_student,
    softmax_teacher,
    two_layers,
    values,
)

ROWS = np.ones(len(IDS), "float32")


@functools.cache
def pair():
    return softmax_teacher(), linear_student()


@functools.cache
def aligning():
    trainer = DistillationTrainer(*two_layers(), stage="alignment")
    trainer.compile("sgd")
    return trainer


def shares_a_head():
    teacher = linear_student()
    return teacher, linear_student(lm_head=teacher.lm_head)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ("Qwen", linear_student()), "teacher"),
        (
            lambda: (linear_student(model=Qwen3NextClassifier, num_labels=2), linear_student()),
            "teacher",
        ),
        (lambda: (softmax_teacher(), None), "student"),
        (lambda: (softmax_teacher(vocab_size=62), linear_student()), "vocab_size"),
        (lambda: (linear_student(),) * 2, "share"),
        (shares_a_head, "share"),
    ],
)
def test_models_that_do_not_fit_are_refused(make, name):
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        DistillationTrainer(*make())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"layer_weight": -1.0}, "layer_weight"),
        ({"layer_weight": 1.0}, "hidden_size"),
        ({"stage": "alignment"}, "hidden_size"),
        ({"stage": "long_context"}, "stage"),
        ({"layers": [0]}, "layers"),
        ({"layers": 0}, "layers"),
        ({"layers": np.array([0, 1])}, "layers"),
        ({"layer_weight": ""}, "layer_weight"),
        ({"train_input_norms": 0}, "train_input_norms"),
        ({"stage": "alignment", "temperature": 0, "layers": [0]}, "temperature"),
        ({"train_input_norms": True}, "train_input_norms"),
        ({"stage": "alignment", "alpha": 0.5, "layers": [0]}, "alpha"),
        ({"stage": "alignment", "layers": [1]}, "layers"),
        ({"stage": "alignment", "layers": []}, "layers"),
        ({"config": "config"}, "config"),
    ],
)
def test_options_out_of_range_or_of_another_stage_are_refused(options, name):
    with pytest.raises(ValueError, match=f"`{name}`.*Received"):
        DistillationTrainer(*pair(), **options)


def test_layers_cannot_be_compared_with_a_think_loop():
    teacher, student = two_layers()
    etd = ETDConfig(0, 1, 1, max_think_iterations=1, adaptive_depth=False)
    looped = softmax_teacher(**TWO, layer_types=TEACHER_TYPES, etd=etd)
    with pytest.raises(ValueError, match=r"`teacher`.*etd"):
        DistillationTrainer(looped, student, stage="alignment")
    with pytest.raises(ValueError, match=r"`layer_weight`.*etd"):
        DistillationTrainer(teacher, looped, layer_weight=1.0)


def test_what_cannot_be_learned_from_is_refused():
    student = linear_student()
    without = DistillationTrainer(None, student)
    without.compile("sgd")
    with pytest.raises(ValueError, match="no use for labels"):
        aligning().fit(IDS, IDS, verbose=0)
    with pytest.raises(ValueError, match=r"`teacher`.*Received"):
        without.fit(IDS, verbose=0)
    with pytest.raises(ValueError, match="vocab_size=61"):
        without.fit(IDS + 61, verbose=0)
    with pytest.raises(ValueError, match="vocab_size=61"):
        without.predict(IDS + 61, verbose=0)
    with pytest.raises(ValueError, match="Labels"):
        without.train_on_batch(IDS, IDS + 61)
    with pytest.raises(ValueError, match=r"`y` must have shape"):
        without.train_on_batch(IDS, IDS[:, 1:])
    with pytest.raises(ValueError, match=r"at least two tokens per row.*Received"):
        without.train_on_batch(IDS[:, :1])
    with pytest.raises(ValueError, match=r"`class_weight` is for rows .*Received"):
        without.train_on_batch(IDS, IDS, class_weight={1: 2.0})
    for name in ("loss", "metrics"):
        with pytest.raises(ValueError, match=f"`{name}`.*Received"):
            without.compile("sgd", **{name: ["accuracy"]})
    assert all(np.isfinite(value).all() for value in values(student).values())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda trainer: trainer.fit(IDS, IDS.tolist()), "`y` must be None"),
        (lambda trainer: trainer.fit(IDS, validation_data=[]), "`validation_data` must be"),
        (
            lambda trainer: trainer.fit(IDS, validation_data=(IDS[:0],)),
            "`validation_data` must hold at least one row",
        ),
        (lambda trainer: trainer.fit(IDS[:0]), "`x` must hold at least one row"),
        (lambda trainer: trainer.predict({"token_ids": IDS[:0]}), "`x` must hold at least one row"),
        (lambda trainer: trainer.fit(IDS, sample_weight=ROWS), "`sample_weight` needs labels"),
        (lambda trainer: trainer.evaluate(IDS, sample_weight=ROWS), "`sample_weight` needs labels"),
        (
            lambda trainer: trainer.fit(IDS, validation_data=(IDS, None, ROWS)),
            "`sample_weight` needs labels",
        ),
        (lambda trainer: trainer.fit(IDS, class_weight={1: 2.0}), "`class_weight` needs labels"),
    ],
)
def test_data_that_would_be_dropped_or_holds_nothing_is_refused(call, name):
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        call(aligning())
