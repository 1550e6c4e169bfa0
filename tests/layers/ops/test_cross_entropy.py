import functools

import numpy as np
import pytest
from keras import ops
from keras.backend import standardize_dtype

from qwen3_next.layers.ops.cross_entropy import IGNORE, cross_entropy, linear_cross_entropy
from tests.support import oracles
from tests.support.running import BACKEND, assert_close, assert_slopes, gradients, run, to_numpy

TOLERANCE = 2e-6
ROWS, DIM, VOCAB = 37, 12, 50
COTANGENT = np.random.default_rng(1).normal(size=ROWS).astype("float32")


@functools.cache
def linear(chunk_rows=None):
    def apply(hidden, kernel, labels):
        return linear_cross_entropy(hidden, kernel, labels, chunk_rows=chunk_rows)

    return apply


def as_oracle(hidden, kernel, labels):
    return oracles.cross_entropy(np.float64(hidden) @ np.float64(kernel), labels)


def inputs(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    hidden, kernel = rng.normal(size=(rows, DIM)), rng.normal(size=(DIM, VOCAB))
    labels = rng.integers(0, VOCAB, rows).astype("int32")
    labels[1::6] = IGNORE
    return [hidden.astype("float32"), kernel.astype("float32"), labels]


@pytest.mark.portable
def test_every_mode_matches_the_oracle(compiled):
    arrays = inputs()
    losses = run(linear(8), *arrays, mode=compiled)
    assert_close(losses, as_oracle(*arrays), TOLERANCE)
    grads = gradients(linear(8), arrays, COTANGENT, mode=compiled)
    assert_slopes(as_oracle, arrays, COTANGENT, grads)


# Logits that are kept; backward all words at once, one by one, and 9 of them, which does not
# divide 50.
@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 37, 64])
def test_any_chunk_gives_the_same(chunk_rows):
    arrays = inputs()
    assert_close(run(linear(chunk_rows), *arrays), as_oracle(*arrays), TOLERANCE)
    grads = gradients(linear(chunk_rows), arrays, COTANGENT)
    assert_slopes(as_oracle, arrays, COTANGENT, grads)


@pytest.mark.portable
def test_loss_of_logits_matches_the_oracle():
    hidden, kernel, labels = inputs()
    logits = hidden @ kernel
    losses = run(cross_entropy, logits, labels)
    assert_close(losses, oracles.cross_entropy(logits, labels), TOLERANCE)
    grads = gradients(cross_entropy, (logits, labels), COTANGENT)
    assert_slopes(oracles.cross_entropy, (logits, labels), COTANGENT, grads)


@pytest.mark.parametrize("words", [2048, 2053, 2058])  # in 16 parts, in one, in 14
def test_loss_of_many_words_matches_the_oracle(words, compiled):
    rng = np.random.default_rng(words)
    logits = (5 * rng.normal(size=(5, words))).astype("float32")
    logits[1, 7], logits[2] = -np.inf, 1000 + logits[2]
    labels = rng.integers(8, words, 5).astype("int32")
    losses = run(cross_entropy, logits, labels, mode=compiled)
    assert_close(losses, oracles.cross_entropy(logits, labels), TOLERANCE)


def test_loss_of_logits_takes_any_leading_axes():
    hidden, kernel, labels = inputs(36)
    logits = hidden @ kernel
    losses = run(cross_entropy, logits.reshape(3, 12, VOCAB), labels.reshape(3, 12))
    assert_close(losses.reshape(-1), oracles.cross_entropy(logits, labels), TOLERANCE)


def test_an_ignored_label_has_no_loss_and_no_gradient():
    hidden, kernel, labels = inputs()
    ignored = labels == IGNORE
    assert not run(linear(8), hidden, kernel, labels)[ignored].any()
    cotangent = np.where(ignored, 1e3, 0.0).astype("float32")
    d_hidden, d_kernel, _ = gradients(linear(8), (hidden, kernel, labels), cotangent)
    assert not d_hidden.any()
    assert not d_kernel.any()
    (d_logits, _) = gradients(cross_entropy, (hidden @ kernel, labels), cotangent)
    assert not d_logits.any()


@pytest.mark.parametrize("chunk_rows", [None, 8])
def test_no_rows_have_no_loss_and_no_gradient(chunk_rows, compiled):
    arrays = inputs(0)
    assert run(linear(chunk_rows), *arrays, mode=compiled).shape == (0,)
    d_hidden, d_kernel, _ = gradients(linear(chunk_rows), arrays, COTANGENT[:0], mode=compiled)
    assert d_hidden.shape == (0, DIM) and not d_kernel.any()


def test_all_labels_ignored_is_a_zero_loss():
    hidden, kernel, labels = inputs()
    labels = np.full_like(labels, IGNORE)
    assert not run(linear(8), hidden, kernel, labels).any()


@pytest.mark.parametrize("wrong", [VOCAB, VOCAB + 1000, -1, -99])
def test_a_label_that_is_no_class_has_no_finite_loss(wrong, compiled):
    hidden, kernel, labels = inputs()
    labels[3] = wrong
    for losses in (
        run(linear(8), hidden, kernel, labels, mode=compiled),
        run(cross_entropy, hidden @ kernel, labels, mode=compiled),
    ):
        assert np.isnan(losses[3])
        assert np.isfinite(np.delete(losses, 3)).all()


def test_large_logits_do_not_overflow():
    hidden, kernel, labels = inputs()
    arrays = [hidden * 100, kernel * 10, labels]
    assert_close(run(linear(8), *arrays), as_oracle(*arrays), 1e-6)
    assert all(np.isfinite(g).all() for g in gradients(linear(8), arrays, COTANGENT)[:2])


def test_half_precision_logits_give_a_float32_loss():
    hidden, kernel, labels = inputs()
    half = [ops.cast(x, "bfloat16") for x in (hidden, kernel)]
    for losses in (
        linear_cross_entropy(*half, ops.convert_to_tensor(labels), chunk_rows=8),
        cross_entropy(half[0] @ half[1], ops.convert_to_tensor(labels)),
    ):
        assert standardize_dtype(losses.dtype) == "float32"
        assert_close(to_numpy(losses), as_oracle(*to_numpy(half), labels), 1e-2)


def compiled_loss(rows, dim, vocab, backward, **options):
    import jax

    shapes = [((rows, dim), "float32"), ((dim, vocab), "float32"), ((rows,), "int32")]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(hidden, kernel, labels):
        return ops.sum(linear_cross_entropy(hidden, kernel, labels, **options))

    function = jax.grad(loss, argnums=(0, 1)) if backward else loss
    return jax.jit(function).lower(*shapes).compile()


@pytest.mark.skipif(BACKEND != "jax", reason="reads the memory plan of XLA")
@pytest.mark.parametrize("rows, options", [(4096, {"chunk_rows": 256}), (8192, {})])
@pytest.mark.parametrize("backward", [False, True])
def test_many_logits_are_never_held_whole(rows, options, backward):
    memory = compiled_loss(rows, 16, 20000, backward, **options).memory_analysis()
    assert memory.temp_size_in_bytes < rows * 20000 * 4 / 3


@pytest.mark.skipif(BACKEND != "jax", reason="reads what XLA counts")
@pytest.mark.parametrize("options", [{}, {"chunk_rows": 16, "keep_logits": True}])
def test_few_logits_are_computed_once(options):
    rows, dim, vocab = 64, 256, 1000
    count = compiled_loss(rows, dim, vocab, True, **options).cost_analysis()["flops"]
    product = 2 * rows * dim * vocab
    assert 3 * product <= count < 3.5 * product


@pytest.mark.parametrize("place", [0, 1])
def test_a_one_percent_error_is_seen(place):
    arrays = inputs()
    wrong = list(arrays)
    wrong[place] = arrays[place] * 1.01
    with pytest.raises(AssertionError, match="off by"):
        assert_close(run(linear(8), *wrong), as_oracle(*arrays), TOLERANCE)


@pytest.mark.parametrize(
    "name, place, shape",
    [("kernel", 0, (37, 11)), ("kernel", 1, (12,)), ("labels", 2, (37, 1)), ("labels", 2, (36,))],
)
def test_an_error_names_the_argument(name, place, shape):
    arrays = inputs()
    arrays[place] = np.zeros(shape, arrays[place].dtype)
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        linear_cross_entropy(*arrays)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("chunk_rows", [0, -3, True, 2.5, float("nan")]),
        ("keep_logits", ["no", 1, []]),
        ("return_correct", ["no", 1, None]),
    ],
)
def test_an_option_out_of_range_is_refused(name, wrong):
    arrays = inputs()
    for value in wrong:
        with pytest.raises(ValueError, match=f"`{name}` must be .*{name}="):
            linear_cross_entropy(*arrays, **{name: value})


def test_labels_are_integers_and_one_per_row():
    hidden, kernel, labels = inputs()
    for wrong in (labels + 0.5, labels > 0):
        with pytest.raises(ValueError, match=r"`labels` must be integers.*Received"):
            linear_cross_entropy(hidden, kernel, wrong)
        with pytest.raises(ValueError, match=r"`labels` must be integers.*Received"):
            cross_entropy(hidden @ kernel, wrong)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(37\)"):
        cross_entropy(hidden @ kernel, labels[:1])
