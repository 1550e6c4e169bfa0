"""Divergences from hidden states against their definition over whole logits."""

import functools

import numpy as np
import pytest
from keras import ops
from keras.backend import standardize_dtype

from qwen3_next.layers.ops import (
    linear_kl_divergence,
    linear_top_kl_divergence,
    linear_top_log_probs,
)
from tests.support.distillation_oracles import kl_divergence, top_kl_divergence, top_of
from tests.support.running import BACKEND, assert_close, assert_slopes, gradients, run, to_numpy

TOLERANCE = 2e-6
ROWS, DIM, TEACHER_DIM, VOCAB, TOP = 29, 12, 9, 50, 7
COTANGENT = np.random.default_rng(1).normal(size=ROWS).astype("float32")
MASK = np.arange(ROWS) % 5 != 2


@functools.cache
def full(temperature=2.0, chunk_rows=8):
    def apply(hidden, kernel, teacher_hidden, teacher_kernel, mask):
        teacher = ops.cast(teacher_hidden, "float32"), ops.cast(teacher_kernel, "float32")
        return linear_kl_divergence(
            hidden, kernel, *teacher, temperature, mask, chunk_rows=chunk_rows
        )

    return apply


@functools.cache
def top(temperature=2.0, chunk_rows=8):
    def apply(hidden, kernel, ids, log_probs, mask):
        return linear_top_kl_divergence(
            hidden, kernel, ids, log_probs, temperature, mask, chunk_rows=chunk_rows
        )

    return apply


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (ROWS, DIM), (DIM, VOCAB), (ROWS, TEACHER_DIM), (TEACHER_DIM, VOCAB)
    return [*(rng.normal(size=shape).astype("float32") for shape in shapes), MASK]


def top_inputs(count=TOP, temperature=2.0):
    hidden, kernel, teacher_hidden, teacher_kernel, mask = inputs()
    logits = np.float64(teacher_hidden) @ np.float64(teacher_kernel)
    return [hidden, kernel, *top_of(logits, count, temperature), mask]


def full_oracle(temperature=2.0):
    def apply(hidden, kernel, teacher_hidden, teacher_kernel, mask):
        logits = np.float64(hidden) @ np.float64(kernel)
        teacher_logits = np.float64(teacher_hidden) @ np.float64(teacher_kernel)
        return kl_divergence(logits, teacher_logits, temperature, mask)

    return apply


def top_oracle(temperature=2.0):
    def apply(hidden, kernel, ids, log_probs, mask):
        logits = np.float64(hidden) @ np.float64(kernel)
        return top_kl_divergence(logits, ids, log_probs, temperature, mask)

    return apply


def assert_student_slopes(function, oracle, arrays, mode=None):
    """Slopes of the student's arguments, and none of the teacher's."""
    options = {} if mode is None else {"mode": mode}
    hidden, kernel, *others = gradients(function, arrays, COTANGENT, **options)
    assert all(grad is None or not grad.any() for grad in others)
    assert_slopes(oracle, arrays, COTANGENT, [hidden, kernel, None, None, None])


@pytest.mark.portable
@pytest.mark.parametrize(
    ("function", "oracle", "make"), [(full, full_oracle, inputs), (top, top_oracle, top_inputs)]
)
def test_every_mode_matches_the_oracle(function, oracle, make, compiled):
    arrays = make()
    assert_close(run(function(), *arrays, mode=compiled), oracle()(*arrays), TOLERANCE)
    if BACKEND == "torch":
        return  # refuses gradients of what has none
    assert_student_slopes(function(), oracle(), arrays, compiled)


@pytest.mark.parametrize("chunk_rows", [None, 1, 64])
def test_any_chunk_of_rows_gives_the_same(chunk_rows):
    arrays = inputs()
    assert_close(run(full(2.0, chunk_rows), *arrays), full_oracle()(*arrays), TOLERANCE)
    assert_student_slopes(full(2.0, chunk_rows), full_oracle(), arrays)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4])
def test_any_temperature_matches_the_oracle(temperature):
    arrays = inputs()
    assert_close(run(full(temperature), *arrays), full_oracle(temperature)(*arrays), 5e-6)
    assert_student_slopes(full(temperature), full_oracle(temperature), arrays)
    arrays = top_inputs(temperature=temperature)
    assert_close(run(top(temperature), *arrays), top_oracle(temperature)(*arrays), 5e-6)
    assert_student_slopes(top(temperature), top_oracle(temperature), arrays)


def test_the_top_of_the_whole_vocabulary_is_the_full_divergence():
    arrays, whole = top_inputs(VOCAB), inputs()
    assert_close(run(top(), *arrays), full_oracle()(*whole), TOLERANCE)
    found = gradients(top(), arrays, COTANGENT)[:2]
    for part, expected in zip(found, gradients(full(), whole, COTANGENT)[:2]):
        assert_close(part, expected, 1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="shapes are known elsewhere")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_rows_and_tops_of_unknown_number_give_the_same(jit_compile):
    import tensorflow as tf

    specs = [(None, DIM), (DIM, VOCAB), (None, None), (None, None), (None,)]
    dtypes = ("float32", "float32", "int32", "float32", "bool")
    specs = [tf.TensorSpec(*pair) for pair in zip(specs, dtypes)]

    @tf.function(input_signature=specs, jit_compile=jit_compile, autograph=False)
    def loss_and_slopes(*arrays):
        with tf.GradientTape() as tape:
            tape.watch(arrays[:2])
            losses = top(2.0, None)(*arrays)
            loss = ops.sum(losses * COTANGENT)
        return losses, tape.gradient(loss, arrays[:2])

    for arrays in (top_inputs(), top_inputs(VOCAB)):
        losses, slopes = to_numpy(loss_and_slopes(*(tf.constant(x) for x in arrays)))
        assert_close(losses, top_oracle()(*arrays), TOLERANCE)
        assert_slopes(top_oracle(), arrays, COTANGENT, [*slopes, None, None, None])


def test_the_top_never_says_more_than_the_whole():
    whole = run(full(), *inputs())[MASK]
    for count in (1, TOP, VOCAB - 1):
        part = run(top(), *top_inputs(count))[MASK]
        assert (part <= whole + 1e-5).all()
        assert (part >= 0).all()


def _top_of_rows(hidden, kernel):
    return linear_top_log_probs(hidden, kernel, TOP, 2.0, chunk_rows=8)


@pytest.mark.portable
def test_the_largest_log_probabilities_are_those_of_the_oracle(compiled):
    _, _, hidden, kernel, _ = inputs()
    expected_ids, expected = top_of(np.float64(hidden) @ np.float64(kernel), TOP, 2.0)
    ids, log_probs = run(_top_of_rows, hidden, kernel, mode=compiled)
    np.testing.assert_array_equal(ids, expected_ids)
    assert_close(log_probs, expected, TOLERANCE)


def test_rows_that_do_not_count_give_nothing_whatever_they_hold():
    for function, arrays in ((full(), inputs()), (top(), top_inputs())):
        expected = run(function, *arrays), gradients(function, arrays, COTANGENT)[:2]
        arrays = [x.copy() for x in arrays]
        arrays[0][~MASK] = np.nan
        arrays[2][~MASK] = 3
        losses, (d_hidden, d_kernel) = (
            run(function, *arrays),
            gradients(function, arrays, COTANGENT)[:2],
        )
        assert not losses[~MASK].any()
        assert not d_hidden[~MASK].any()
        np.testing.assert_array_equal(losses, expected[0])
        np.testing.assert_array_equal(d_kernel, expected[1][1])


@pytest.mark.parametrize(("function", "make"), [(full, inputs), (top, top_inputs)])
def test_no_rows_lack_nothing(function, make, compiled):
    no_rows = [x[:0] if len(x) == ROWS else x for x in make()]
    assert run(function(), *no_rows, mode=compiled).shape == (0,)
    d_hidden, d_kernel, *_ = gradients(function(), no_rows, COTANGENT[:0], mode=compiled)
    assert d_hidden.shape == (0, DIM) and not d_kernel.any()
    ids, log_probs = run(_top_of_rows, *no_rows[:2], mode=compiled)
    assert ids.shape == log_probs.shape == (0, TOP)


def test_a_student_that_is_its_teacher_lacks_nothing():
    hidden, kernel, *_ = inputs()
    arrays = [hidden, kernel, hidden, kernel, MASK]
    assert not run(full(), *arrays).any()
    assert max(np.abs(g).max() for g in gradients(full(), arrays, COTANGENT)[:2]) < 1e-6


def test_large_logits_do_not_overflow():
    hidden, kernel, teacher_hidden, teacher_kernel, mask = inputs()
    arrays = [hidden * 100, kernel * 10, teacher_hidden * 100, teacher_kernel * 10, mask]
    assert_close(run(full(), *arrays), full_oracle()(*arrays), 1e-6)
    assert all(np.isfinite(g).all() for g in gradients(full(), arrays, COTANGENT)[:2])


def test_half_precision_gives_a_float32_loss():
    arrays = inputs()
    half = [ops.cast(x, "bfloat16") for x in arrays[:4]]
    losses = linear_kl_divergence(*half, 2.0, ops.convert_to_tensor(MASK), chunk_rows=8)
    assert standardize_dtype(losses.dtype) == "float32"
    assert_close(to_numpy(losses), full_oracle()(*to_numpy(half), MASK), 1e-2)


@pytest.mark.skipif(BACKEND != "jax", reason="reads the memory plan of XLA")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_no_logits_are_ever_held_whole(backward, stored):
    import jax

    rows, dim, vocab = 4096, 16, 8192
    teacher = [(rows, dim), (dim, vocab)] if not stored else [(rows, TOP), (rows, TOP)]
    dtypes = ["float32"] * 2 + (["int32", "float32"] if stored else ["float32"] * 2) + ["bool"]
    shapes = [(rows, dim), (dim, vocab), *teacher, (rows,)]
    shapes = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes)]
    divergence = (top if stored else full)(2.0, 256)

    def loss(*arrays):
        return ops.sum(divergence(*arrays))

    function = jax.grad(loss, argnums=(0, 1)) if backward else loss
    memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * vocab * 4 / 2


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_one_percent_error_is_seen(place):
    for function, oracle, arrays in (
        (full(), full_oracle(), inputs()),
        (top(), top_oracle(), top_inputs()),
    ):
        if arrays[place].dtype != "float32":
            continue
        wrong = list(arrays)
        wrong[place] = arrays[place] * np.float32(1.01)
        with pytest.raises(AssertionError, match="off by"):
            assert_close(run(function, *wrong), oracle(*arrays), TOLERANCE)


@pytest.mark.parametrize(
    ("name", "place", "shape"),
    [
        ("kernel", 1, (11, VOCAB)),
        ("teacher_hidden", 2, (ROWS + 1, TEACHER_DIM)),
        ("teacher_kernel", 3, (TEACHER_DIM, VOCAB + 1)),
        ("mask", 4, (ROWS, 1)),
    ],
)
def test_an_error_names_the_argument(name, place, shape):
    arrays = inputs()
    arrays[place] = np.zeros(shape, arrays[place].dtype)
    with pytest.raises(ValueError, match=f"`{name}`.*Received"):
        linear_kl_divergence(*arrays[:4], 2.0, arrays[4])


def test_an_error_names_the_argument_of_the_top():
    hidden, kernel, ids, log_probs, mask = top_inputs()
    for name, teacher in (
        ("teacher_ids", (ids[1:], log_probs)),
        ("teacher_log_probs", (ids, log_probs[:, 1:])),
    ):
        with pytest.raises(ValueError, match=f"`{name}`.*Received"):
            linear_top_kl_divergence(hidden, kernel, *teacher, 2.0, mask)
    with pytest.raises(ValueError, match=r"`teacher_ids` must be integers.*Received"):
        linear_top_kl_divergence(hidden, kernel, ids + 0.5, log_probs, 2.0, mask)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("temperature", [0.0, -1, True, "a", None, float("nan"), 10**400, 1e-45, 1e30]),
        ("chunk_rows", [0, -1, 2.5, True, "a"]),
    ],
)
def test_an_option_out_of_range_is_refused(name, wrong):
    hidden, kernel, ids, log_probs, _ = top_inputs()
    for value in wrong:
        for function, arguments in (
            (linear_kl_divergence, (hidden, kernel, hidden, kernel)),
            (linear_top_kl_divergence, (hidden, kernel, ids, log_probs)),
            (linear_top_log_probs, (hidden, kernel, 2)),
        ):
            with pytest.raises(ValueError, match=f"`{name}` must be .*{name}="):
                function(*arguments, **{name: value})


@pytest.mark.parametrize("count", [0, True, 2.0, "a", VOCAB + 1])
def test_a_count_out_of_range_is_refused(count):
    hidden, kernel, *_ = top_inputs()
    with pytest.raises(ValueError, match=r"`count` must be .*count="):
        linear_top_log_probs(hidden, kernel, count)


@pytest.mark.parametrize("unknown", [-1, VOCAB, 2**32 + 1])
def test_an_id_that_is_no_token_gives_nan_where_the_row_counts(unknown):
    hidden, kernel, ids, log_probs, _ = top_inputs()
    rows = np.arange(len(ids))
    arrays = hidden, kernel, np.where(rows[:, None] < 2, np.int64(unknown), ids), log_probs
    found = to_numpy(linear_top_kl_divergence(*arrays, mask=rows > 0))
    assert np.array_equal(np.isnan(found), rows == 1)
    assert found[0] == 0
