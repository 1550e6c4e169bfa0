import functools

import keras
import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops import attention
from qwen3_next.layers.ops.attention import api
from tests.support import oracles
from tests.support.running import (
    BACKEND,
    DEFAULT,
    assert_close,
    assert_slopes,
    gradients,
    run,
    to_numpy,
)

TOLERANCE, RATE = 2e-6, 0.3
BATCH, LENGTH, HEADS, GROUPS, DIM = 2, 21, 4, 2, 8
MASK = np.random.default_rng(5).random((BATCH, LENGTH)) < 0.7
SEGMENTS = np.array([[0] * 9 + [1] * 12, [0] * 2 + [1] * 14 + [2] * 5], "int32")


# The largest block of keys, see `small_blocks`.
BLOCKS = {"chunked": 8, **({"pallas": 16} if BACKEND == "jax" else {})}
ON_JAX = pytest.mark.skipif(BACKEND != "jax", reason="the kernels are JAX's")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys, neither of which divides the length."""
    monkeypatch.setattr(api, "BLOCK_Q", 8)
    monkeypatch.setattr(api, "BLOCK_KV", 8)
    if BACKEND == "jax":
        from qwen3_next.layers.ops.attention import pallas_attention
        from qwen3_next.layers.ops.attention.pallas_attention import Blocks, Sizes

        sizes = Sizes(Blocks(8, 16, 4, 1), Blocks(16, 8, 4, 1), Blocks(8, 16, 4, 1))
        for table in ("HALF", "FLOAT32"):
            monkeypatch.setattr(pallas_attention, table, {1024: sizes})


def inputs(length=LENGTH, keys=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (length, HEADS), (keys or length, GROUPS), (keys or length, GROUPS)
    return [rng.normal(size=(BATCH, *s, DIM)).astype("float32") for s in shapes]


def plain(query, key, value):
    return attention(query, key, value)


@functools.cache
def masked(implementation=None):
    def apply(query, key, value, mask, segments):
        seen = {"key_mask": mask, "query_segments": segments, "key_segments": segments}
        output = attention(query, key, value, **seen, implementation=implementation)
        return ops.where(mask[..., None, None], output, 0.0)

    return apply


@functools.cache
def limited(implementation):
    def apply(query, key, value, limits):
        return attention(query, key, value, limits=limits, implementation=implementation)

    return apply


@functools.cache
def by(implementation):
    return lambda *arrays: attention(*arrays, implementation=implementation)


@pytest.mark.portable
def test_every_mode_matches_the_oracle(compiled):
    arrays = [*inputs(), MASK, SEGMENTS]
    output = run(masked(), *arrays, mode=compiled)
    assert_close(output, oracles.causal_attention(*arrays), TOLERANCE)
    cotangent = inputs(seed=1)[0]
    found = gradients(masked(), arrays, cotangent, mode=compiled)
    assert_slopes(oracles.causal_attention, arrays, cotangent, found)


@pytest.mark.parametrize("implementation", BLOCKS)
@pytest.mark.parametrize("length", [1, 7, 8, 16, 21])
def test_any_length_matches_the_oracle(implementation, length):
    arrays = inputs(length)
    output = run(by(implementation), *arrays)
    assert_close(output, oracles.causal_attention(*arrays), TOLERANCE)


@pytest.mark.parametrize("implementation", BLOCKS)
def test_large_scores_do_not_overflow(implementation):
    query, key, value = inputs()
    arrays = [40 * query, 40 * key, value]
    output = run(by(implementation), *arrays)
    assert_close(output, oracles.causal_attention(*arrays), TOLERANCE)


@pytest.mark.parametrize("implementation", BLOCKS)
def test_limits_choose_the_keys_that_are_seen(implementation):
    query, key, value = inputs(length=3, keys=LENGTH)
    limits = np.array([[4, 17, 5], [0, 1, 20]], "int32")
    output = run(limited(implementation), query, key, value, limits)
    for row, token in np.ndindex(limits.shape):
        keys = limits[row, token] + 1
        # The last of as many queries as keys sees them all.
        alone = np.repeat(query[row : row + 1, token : token + 1], keys, axis=1)
        parts = (x[row : row + 1, :keys] for x in (key, value))
        expected = oracles.causal_attention(alone, *parts)[0, -1]
        assert_close(output[row, token], expected, TOLERANCE)


@pytest.mark.parametrize("implementation", BLOCKS)
def test_keys_beyond_every_limit_are_never_read(implementation):
    query, key, value = inputs(length=3, keys=LENGTH)
    limits = np.array([[4, 6, 5], [0, 1, 2]], "int32")
    output = run(limited(implementation), query, key, value, limits)
    # No query needs another block than the first.
    size = BLOCKS[implementation]
    key[:, size:], value[:, size:] = np.nan, np.nan
    assert np.array_equal(output, run(limited(implementation), query, key, value, limits))


@pytest.mark.parametrize("implementation", BLOCKS)
def test_the_largest_limits_see_every_key(implementation):
    arrays = inputs(length=3, keys=LENGTH)
    last, beyond = (np.full((BATCH, 3), limit, "int32") for limit in (LENGTH - 1, 2**31 - 1))
    expected = run(limited(implementation), *arrays, last)
    assert np.array_equal(expected, run(limited(implementation), *arrays, beyond))


@pytest.mark.parametrize("implementation", BLOCKS)
def test_keys_of_segments_that_lie_apart_are_never_read(implementation):
    arrays = inputs(length=48)
    segments = np.repeat([[0, 1, 2], [7, 7, 3]], 16, axis=1).astype("int32")
    mask = np.ones_like(segments, bool)
    arrays, cotangent = [*arrays, mask, segments], inputs(length=48, seed=1)[0]
    cotangent[:, :32] = 0
    output = run(masked(implementation), *arrays)
    grads = gradients(masked(implementation), arrays, cotangent)
    for x in arrays[:3]:
        x[:, :32] = np.nan
    assert np.array_equal(output[:, 32:], run(masked(implementation), *arrays)[:, 32:])
    again = gradients(masked(implementation), arrays, cotangent)
    for grad, expected in zip(again[:3], grads):
        assert np.array_equal(grad[:, 32:], expected[:, 32:])


@pytest.mark.parametrize("implementation", BLOCKS)
def test_a_token_that_sees_nothing_yields_zero_and_no_gradient(implementation):
    arrays = [*inputs(), np.zeros_like(MASK), SEGMENTS]
    assert not run(masked(implementation), *arrays).any()
    grads = gradients(masked(implementation), arrays, inputs()[0])
    assert not any(grad.any() for grad in grads if grad is not None)


def test_a_one_percent_error_in_one_value_is_seen():
    query, key, value = inputs()
    wrong = value.copy()
    wrong[0, 3] *= 1.01
    with pytest.raises(AssertionError, match="off by"):
        output = run(plain, query, key, wrong)
        assert_close(output, oracles.causal_attention(query, key, value), TOLERANCE)


def test_implementations_agree():
    arrays = inputs()
    assert_close(run(by("fused"), *arrays), run(by("chunked"), *arrays), TOLERANCE)


@ON_JAX
@pytest.mark.parametrize("dim", [1, 24])
def test_kernels_take_heads_of_any_width(dim):
    arrays = [*(np.resize(x, (*x.shape[:3], dim)) for x in inputs()), MASK, SEGMENTS]
    expected = oracles.causal_attention(*arrays)
    assert_close(run(masked("pallas"), *arrays), expected, TOLERANCE)
    cotangent = np.resize(inputs(seed=1)[0], expected.shape)
    found = gradients(masked("pallas"), arrays, cotangent)
    assert_slopes(oracles.causal_attention, arrays, cotangent, found)


@pytest.mark.portable
@pytest.mark.parametrize("implementation", BLOCKS)
def test_half_precision_has_scores_in_float32(implementation):
    query, key, value = inputs()
    arrays = 8 * query, key, value  # scores of up to 39, which bfloat16 rounds to quarters
    arrays = [to_numpy(ops.cast(ops.cast(x, "bfloat16"), "float32")) for x in arrays]

    def half(*arrays):
        output = by(implementation)(*(ops.cast(x, "bfloat16") for x in arrays))
        assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
        return ops.cast(output, "float32")

    # Weights are rounded to 8 bits of mantissa, and outputs.
    assert_close(run(half, *arrays), oracles.causal_attention(*arrays), 2**-8)


@pytest.mark.skipif(BACKEND != "jax", reason="reads the memory plan of XLA")
def test_no_tensor_holds_all_queries_times_all_keys(monkeypatch):
    import jax

    monkeypatch.undo()
    length = 4096
    shapes = [(1, length, 2, 16), (1, length, 1, 16), (1, length, 1, 16)]
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]

    def loss(*arrays):
        return ops.sum(attention(*arrays))

    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * length * 4 / 8


def seed_of(number):
    return to_numpy(keras.random.SeedGenerator(number).next())


@functools.cache
def dropping(rate=RATE):
    def attend(query, key, value, seed, mask=None, segments=None):
        return attention(
            query,
            key,
            value,
            key_mask=mask,
            query_segments=segments,
            key_segments=segments,
            dropout=rate,
            dropout_seed=seed,
        )

    return attend


def kept_weights(seed, mode=DEFAULT):
    """Which weights `(B, H, T, S)` stay: keys with unit vectors as values, all scores equal."""
    query = np.zeros((BATCH, LENGTH, HEADS, LENGTH), "float32")
    key = np.zeros((BATCH, LENGTH, GROUPS, LENGTH), "float32")
    value = np.broadcast_to(np.eye(LENGTH, dtype="float32")[:, None], key.shape)
    return run(dropping(), query, key, value, seed, mode=mode).transpose(0, 2, 1, 3) > 0


def dense_attention(query, key, value, factor):
    """NumPy float64: softmax over all seen keys, then every weight times its factor."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, HEADS // GROUPS, axis=2) for x in (key, value))
    scores = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(DIM)
    scores = np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights * factor, value)


@pytest.mark.portable
def test_dropout_scales_the_weights_that_stay_and_the_gradient_knows_which(compiled):
    seed, cotangent = seed_of(1), inputs(seed=1)[0]
    factor = kept_weights(seed, compiled) / (1 - RATE)
    arrays = [*inputs(), seed]

    def dropped(query, key, value, seed):
        return dense_attention(query, key, value, factor)

    assert_close(run(dropping(), *arrays, mode=compiled), dropped(*arrays), TOLERANCE)
    found = gradients(dropping(), arrays, cotangent, mode=compiled)
    assert found[3] is None
    assert_slopes(dropped, arrays, cotangent, found)


def test_the_mean_over_many_seeds_is_the_undropped_output():
    arrays = inputs()
    outputs = [run(dropping(), *arrays, seed_of(number)) for number in range(400)]
    expected = oracles.causal_attention(*arrays)
    error = np.sqrt(np.mean((np.mean(outputs, axis=0) - expected) ** 2))
    assert np.std(outputs, axis=0).mean() > 0.2
    assert error < 1.3 * np.sqrt(np.mean(np.var(outputs, axis=0)) / len(outputs))


def test_every_weight_is_dropped_by_itself_with_the_probability_asked_for():
    kept = np.stack([kept_weights(seed_of(number)) for number in range(40)])
    kept = kept.transpose(3, 4, 0, 1, 2)[np.tri(LENGTH, dtype=bool)]  # (seen pairs, 40, B, H)
    assert abs(kept.mean() - (1 - RATE)) < 0.01
    # No two pairs of a token and a key, heads, rows or seeds have a mask in common.
    for axis in range(kept.ndim):
        masks = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1)
        assert len(np.unique(masks, axis=0)) == len(masks)


def test_the_same_seed_drops_the_same_weights_and_another_others():
    arrays = inputs()
    output = run(dropping(), *arrays, seed_of(1))
    assert np.array_equal(output, run(dropping(), *arrays, seed_of(1)))
    assert not np.allclose(output, run(dropping(), *arrays, seed_of(2)))
    next_seed = seed_of(1) + np.array([0, 1], seed_of(1).dtype)
    assert not np.allclose(output, run(dropping(), *arrays, next_seed))


def test_dropout_sees_no_more_than_attention_without_it():
    arrays = [*inputs(), seed_of(1), MASK, SEGMENTS]
    output = run(dropping(), *arrays)
    hidden = arrays[2].copy()
    hidden[~MASK] = 1e3
    assert np.array_equal(output, run(dropping(), *arrays[:2], hidden, *arrays[3:]))
    nothing = np.zeros_like(MASK)
    assert not run(dropping(), *inputs(), seed_of(1), nothing, SEGMENTS).any()


def test_almost_no_dropout_is_no_dropout():
    arrays = inputs()
    assert_close(run(dropping(1e-7), *arrays, seed_of(1)), run(plain, *arrays), TOLERANCE)


@pytest.mark.skipif(BACKEND != "jax", reason="reads the memory plan of XLA")
def test_dropout_holds_no_tensor_of_all_queries_times_all_keys(monkeypatch):
    import jax

    monkeypatch.undo()
    length = 4096
    shapes = [(1, length, 2, 16), (1, length, 1, 16), (1, length, 1, 16)]
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    seed = jax.ShapeDtypeStruct((2,), "uint32")

    def loss(*arrays):
        return ops.sum(dropping()(*arrays))

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, seed).compile()
    assert program.memory_analysis().temp_size_in_bytes < length * length * 4 / 8


@pytest.mark.parametrize(
    "name, options",
    [
        ("key", {"key": np.zeros((2, 21, 2, 9), "float32")}),
        ("query", {"query": np.zeros((2, 21, 3, 8), "float32")}),
        ("limits", {"query": np.zeros((2, 5, 4, 8), "float32")}),
        ("key_segments", {"query_segments": SEGMENTS}),
        ("implementation", {"implementation": "quick"}),
        ("key_mask", {"implementation": "fused", "key_mask": MASK}),
        ("dropout", {"dropout": 1.0, "dropout_seed": np.zeros(2, "int32")}),
        ("dropout", {"dropout": -0.1, "dropout_seed": np.zeros(2, "int32")}),
        ("dropout_seed", {"dropout": 0.1}),
        ("dropout_seed", {"dropout": 0.1, "dropout_seed": np.zeros(3, "int32")}),
        (
            "dropout",
            {"implementation": "fused", "dropout": 0.1, "dropout_seed": np.zeros(2, "int32")},
        ),
    ],
)
def test_an_error_names_the_argument(name, options):
    arguments = dict(zip(("query", "key", "value"), inputs())) | options
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        attention(**arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        *(({name: [[[[1]]]]}, f"`{name}` must be floats") for name in ("query", "key", "value")),
        ({"limits": np.ones((BATCH, LENGTH))}, "`limits` must be integers"),
        ({"limits": np.full((1, LENGTH), 2**40)}, "`limits` must fit in int32"),
        ({"query_segments": np.ones((BATCH, LENGTH))}, "`query_segments` must be integers"),
        ({"key_segments": np.ones((BATCH, LENGTH), bool)}, "`key_segments` must be integers"),
        ({"key_mask": np.full((BATCH, LENGTH), np.nan)}, "`key_mask` must not hold NaN"),
        ({"scale": np.nan}, "`scale` must be"),
        ({"scale": "a"}, "`scale` must be"),
    ],
)
def test_what_a_cast_would_change_is_refused(changes, message):
    arguments = dict(zip(("query", "key", "value"), inputs())) | changes
    with pytest.raises(ValueError, match=f"{message}.*Received"):
        attention(**arguments)


def test_limits_and_segments_may_be_of_any_integers():
    arrays, limits = inputs(), np.arange(LENGTH)[None]

    def wide(*arrays):
        segments = {"query_segments": SEGMENTS.astype("int64"), "key_segments": SEGMENTS}
        return attention(*arrays, limits=ops.convert_to_tensor(limits), **segments)

    def narrow(*arrays):
        return attention(*arrays, query_segments=SEGMENTS, key_segments=SEGMENTS)

    assert_close(run(wide, *arrays), run(narrow, *arrays), TOLERANCE)
