"""Stored logits are those of the teacher, and teach what it would teach."""

import functools
import json
import shutil

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next
from qwen3_next.transfer.distill.distillation import DistillationTrainer
from qwen3_next.transfer.distill.stored_logits import StoredLogits, store_teacher_logits
from tests.support.distillation_models import (
    DENSE,
    IDS,
    batch,
    linear_student,
    softmax_teacher,
)
from tests.support.distillation_oracles import kl_divergence, top_kl_divergence, top_of
from tests.support.routed_models import routed
from tests.support.running import CHEAPEST_STEPS, assert_close
from tests.support.small_models import ONE_LAYER, SMALL, logits_once

TOP, TEMPERATURE = 9, 2.0
FILES = ("teacher_ids.npy", "teacher_log_probs.npy", "teacher_checksums.npy", "stored_logits.json")


@functools.cache
def pair():
    """Two models for tests that change neither."""
    return softmax_teacher(), linear_student()


@functools.cache
def trainer():
    found = DistillationTrainer(None, pair()[1])
    found.compile("sgd", **CHEAPEST_STEPS)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logits")
    x, _ = batch("left")
    for name, top, rows in (("top", TOP, 3), ("all", SMALL["vocab_size"], 4)):
        options = {"batch_size": rows, "progress": False}
        store_teacher_logits(pair()[0], x, folder / name, top, **options)
    return folder


def outputs(model):
    x, _ = batch("left")
    return logits_once(model, x["token_ids"], x["padding_mask"])


def test_what_is_stored_is_the_top_of_the_teachers_logits(directory):
    stored = StoredLogits(directory / "top")
    real = batch("left")[0]["padding_mask"]
    ids, log_probs = top_of(outputs(pair()[0]), TOP, TEMPERATURE)
    np.testing.assert_array_equal(stored.ids[real], ids[real])
    assert_close(stored.log_probs[real], log_probs[real], 1e-5)
    assert (stored.ids.dtype, stored.log_probs.dtype) == ("int32", "float32")
    assert (stored.vocab_size, stored.top_n, stored.temperature) == (61, TOP, TEMPERATURE)
    assert sorted(p.name for p in (directory / "top").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("kept", ["top", "all"])
def test_a_student_learns_from_them_as_from_the_teacher(directory, kept):
    x, y = batch("left")
    stored = StoredLogits(directory / kept)
    found = trainer().evaluate(stored.dataset(x, y, 3), verbose=0, return_dict=True)
    counts = y.reshape(-1) != -100
    student, teacher = (outputs(model).reshape(-1, SMALL["vocab_size"]) for model in pair()[::-1])
    if kept == "all":
        divergence = kl_divergence(student, teacher, TEMPERATURE)
    else:
        top = top_of(teacher, TOP, TEMPERATURE)
        divergence = top_kl_divergence(student, *top, TEMPERATURE)
    assert_close(found["kd_loss"], divergence[counts].mean(), 1e-5)


def test_a_teacher_that_decides_from_prompts_says_what_it_says_live(tmp_path):
    x, y = batch("left")
    y = np.where(np.cumsum(x["padding_mask"], axis=1) > 3, y, -100)  # prompts of three tokens
    etd = {"n_think_layers": 1, "max_think_iterations": 2, "adaptive_depth": False}
    teacher = routed(Qwen3Next, **{**ONE_LAYER, **DENSE}, etd=etd)
    options = {"top_n": SMALL["vocab_size"], "batch_size": 4, "progress": False}
    stored = store_teacher_logits(teacher, x, tmp_path, y=y, **options)
    live = DistillationTrainer(teacher, pair()[1])
    live.compile("sgd", **CHEAPEST_STEPS)
    expected = live.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    found = trainer().evaluate(stored.dataset(x, y, 4), verbose=0, return_dict=True)
    assert_close(found["kd_loss"], expected["kd_loss"], 1e-5)
    with pytest.raises(ValueError, match=r"`y` must begin where.*Received: y=None"):
        stored.dataset(x)


def test_fit_on_stored_logits_learns(directory):
    x, y = batch("left")
    student = linear_student()
    learner = DistillationTrainer(None, student, alpha=1.0)
    learner.compile(keras.optimizers.Adam(0.01), **CHEAPEST_STEPS)
    dataset = StoredLogits(directory / "top").dataset(x, y, 2, shuffle=True)
    history = learner.fit(dataset, epochs=4, validation_data=dataset, verbose=0).history
    assert history["kd_loss"][-1] < history["kd_loss"][0]
    assert history["val_kd_loss"][-1] < history["kd_loss"][0]


def test_every_epoch_reads_every_row_once_with_what_belongs_to_it(directory):
    x, y = batch("left")
    weight = np.arange(4, dtype="float32")
    stored = StoredLogits(directory / "top")
    dataset = stored.dataset(x, y, 3, sample_weight=weight, shuffle=True, seed=1)
    assert dataset.num_batches == 2
    orders = []
    for _ in range(2):
        batches = [dataset[index] for index in range(2)]
        order = np.concatenate([w for _, _, w in batches]).astype(int)
        np.testing.assert_array_equal(np.concatenate([b[1] for b in batches]), y[order])
        for name, values in (*x.items(), ("teacher_ids", stored.ids)):
            found = np.concatenate([b[0][name] for b in batches])
            np.testing.assert_array_equal(found, values[order])
        orders.append(order.tolist())
        dataset.on_epoch_end()
    assert sorted(orders[0]) == sorted(orders[1]) == [0, 1, 2, 3]
    assert orders[0] != orders[1]


def test_half_precision_takes_less_and_says_nearly_the_same(directory, tmp_path):
    x, _ = batch("left")
    half = store_teacher_logits(
        pair()[0], x, tmp_path, TOP, batch_size=4, dtype="float16", progress=False
    )
    full = StoredLogits(directory / "top")
    assert half.log_probs.dtype == "float16"
    assert_close(half.log_probs, full.log_probs, 1e-3)
    half.dataset(x)[0]


def test_inputs_that_the_teacher_did_not_read_are_refused(directory):
    x, y = batch("left")
    stored = StoredLogits(directory / "top")
    other = {**x, "token_ids": (x["token_ids"] + 1) % 61}
    for name, wrong in (
        ("token_ids", other),
        ("token_ids", {name: value[:3] for name, value in x.items()}),
        ("padding_mask", x["token_ids"]),
    ):
        with pytest.raises(ValueError, match=f"`x`.*{name}"):
            stored.dataset(wrong)
    for options in (
        {"y": y[:3]},
        {"y": y[:, :3]},
        {"y": y[:, 0]},
        {"y": 5},
        {"sample_weight": np.ones(3)},
        {"sample_weight": np.ones((4, 9))},
        {"sample_weight": np.full(4, np.nan)},
        {"sample_weight": ["a"] * 4},
        {"sample_weight": 5},
        {"batch_size": 0},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`.*Received"):
            stored.dataset(x, **options)
    for wrong in (y + 61, y * 1.0):
        with pytest.raises(ValueError, match=r"Labels must be.*Received"):
            stored.dataset(x, wrong)


@pytest.mark.parametrize("rows", [[4], [-1], [0.5], [True], 0, "a", slice(0, 2), [[0]]])
def test_rows_that_are_not_there_are_refused(directory, rows):
    with pytest.raises(ValueError, match=r"`rows` must be.*Received"):
        StoredLogits(directory / "top").read(rows)


def test_a_trainer_refuses_what_does_not_fit_it(directory):
    x, _ = batch("left")
    dataset = StoredLogits(directory / "top").dataset(x)
    teacher, student = pair()
    for name, learner in (
        ("vocab_size", DistillationTrainer(None, linear_student(vocab_size=62))),
        ("temperature", DistillationTrainer(None, student, temperature=1.0)),
        ("teacher", DistillationTrainer(teacher, student)),
        ("layer_weight", DistillationTrainer(None, student, layer_weight=1.0)),
    ):
        learner.compile("sgd")
        for given in (dataset, (part for part in dataset)):
            with pytest.raises(ValueError, match=f"`{name}.*Received"):
                learner.evaluate(given, verbose=0)
        with pytest.raises(ValueError, match=f"`{name}.*Received"):
            learner.train_on_batch(*dataset[0])
    half = {name: value for name, value in dataset[0][0].items() if name != "teacher_ids"}
    with pytest.raises(ValueError, match=r"teacher_ids.*Received"):
        trainer().train_on_batch(half)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_refused_by_name(directory, tmp_path, name):
    copy = shutil.copytree(directory / "top", tmp_path / "copy")
    content = (copy / name).read_bytes()
    for damaged in (content[: len(content) // 2], content[:9], b""):
        (copy / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            StoredLogits(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=name):
        StoredLogits(copy)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_flipped_bit_is_found_where_it_is_read(directory, tmp_path, name):
    copy = shutil.copytree(directory / "top", tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 4
    (copy / name).write_bytes(content)
    dataset = StoredLogits(copy).dataset(batch("left")[0], batch_size=2)
    dataset[0]
    with pytest.raises(ValueError, match=r"\.npy is damaged.*row 3"):
        dataset[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 0), ("top_n", "9"), ("dtype", "int8"), ("format", 2), ("sha256", None)],
)
def test_a_wrong_description_is_refused_by_name(directory, tmp_path, field, value):
    copy = shutil.copytree(directory / "top", tmp_path / "copy")
    path = copy / "stored_logits.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=r"stored_logits\.json is damaged"):
        StoredLogits(copy)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"teacher": "Qwen"}, "teacher"),
        ({"x": np.full((1, 2), 61)}, "vocab_size"),
        ({"top_n": 62}, "top_n"),
        ({"temperature": 0}, "temperature"),
        ({"y": IDS + 61}, "Labels"),
        ({"y": IDS[:, :3]}, "y"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"progress": 1}, "progress"),
        ({"directory": 5}, "directory"),
    ],
)
def test_arguments_are_refused_before_anything_is_written(tmp_path, options, name):
    arguments = {"teacher": pair()[0], "x": IDS, "directory": tmp_path / "new", "top_n": TOP}
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        store_teacher_logits(**arguments | options)
    assert not (tmp_path / "new").exists()


def test_a_run_that_stops_leaves_nothing_and_no_checkpoint_is_lost(tmp_path, monkeypatch):
    def stops(*args, **kwargs):
        raise RuntimeError("stopped")

    monkeypatch.setattr(np, "save", stops)
    with pytest.raises(RuntimeError, match="stopped"):
        store_teacher_logits(pair()[0], IDS, tmp_path / "new", TOP, progress=False)
    assert not (tmp_path / "new").exists()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"`directory`.*model\.safetensors"):
        store_teacher_logits(pair()[0], IDS, tmp_path, TOP, progress=False)
    assert weights.exists()
