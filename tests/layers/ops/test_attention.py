import functools

import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops import attention
from qwen3_next.layers.ops.attention import api
from tests.support import oracles
from tests.support.running import BACKEND, assert_close, assert_slopes, gradients, run

TOLERANCE = 2e-6
BATCH, LENGTH, HEADS, GROUPS, DIM = 2, 21, 4, 2, 8
MASK = np.random.default_rng(5).random((BATCH, LENGTH)) < 0.7
SEGMENTS = np.array([[0] * 9 + [1] * 12, [0] * 2 + [1] * 14 + [2] * 5], "int32")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys, neither of which divides the length."""
    monkeypatch.setattr(api, "QUERIES", 8)
    monkeypatch.setattr(api, "KEYS", 8)


def inputs(length=LENGTH, keys=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (length, HEADS), (keys or length, GROUPS), (keys or length, GROUPS)
    return [rng.normal(size=(BATCH, *s, DIM)).astype("float32") for s in shapes]


def plain(query, key, value):
    return attention(query, key, value)


def masked(query, key, value, mask, segments):
    output = attention(
        query, key, value, key_mask=mask, query_segments=segments, key_segments=segments
    )
    return ops.where(mask[..., None, None], output, 0.0)


def limited(query, key, value, limits):
    return attention(query, key, value, limits=limits)


@pytest.mark.portable
def test_every_mode_matches_the_oracle(compiled):
    arrays = [*inputs(), MASK, SEGMENTS]
    assert_close(run(masked, *arrays, mode=compiled), oracles.causal_attention(*arrays), TOLERANCE)
    pull = inputs(seed=1)[0]
    grads = gradients(masked, arrays, pull, mode=compiled)
    assert_slopes(oracles.causal_attention, arrays, pull, grads)


@pytest.mark.parametrize("length", [1, 7, 8, 16, 21])
def test_any_length_matches_the_oracle(length):
    arrays = inputs(length)
    assert_close(run(plain, *arrays), oracles.causal_attention(*arrays), TOLERANCE)


def test_large_scores_do_not_overflow():
    query, key, value = inputs()
    arrays = [40 * query, 40 * key, value]
    assert_close(run(plain, *arrays), oracles.causal_attention(*arrays), TOLERANCE)


def test_limits_choose_the_keys_that_are_seen():
    query, key, value = inputs(length=3, keys=LENGTH)
    limits = np.array([[4, 17, 5], [0, 1, 20]], "int32")
    output = run(limited, query, key, value, limits)
    for row, token in np.ndindex(limits.shape):
        keys = limits[row, token] + 1
        # The last of as many queries as keys sees them all.
        alone = np.repeat(query[row : row + 1, token : token + 1], keys, axis=1)
        parts = (x[row : row + 1, :keys] for x in (key, value))
        expected = oracles.causal_attention(alone, *parts)[0, -1]
        assert_close(output[row, token], expected, TOLERANCE)


def test_keys_beyond_every_limit_are_never_read():
    query, key, value = inputs(length=3, keys=LENGTH)
    limits = np.array([[4, 6, 5], [0, 1, 2]], "int32")
    output = run(limited, query, key, value, limits)
    # The first block has 8 keys: no query needs another.
    key[:, 8:], value[:, 8:] = np.nan, np.nan
    assert np.array_equal(output, run(limited, query, key, value, limits))


def test_a_token_that_sees_nothing_yields_zero_and_no_gradient():
    arrays = [*inputs(), np.zeros_like(MASK), SEGMENTS]
    assert not run(masked, *arrays).any()
    assert not any(
        grad.any() for grad in gradients(masked, arrays, inputs()[0]) if grad is not None
    )


def test_a_one_percent_error_in_one_value_is_seen():
    query, key, value = inputs()
    wrong = value.copy()
    wrong[0, 3] *= 1.01
    with pytest.raises(AssertionError, match="off by"):
        output = run(plain, query, key, wrong)
        assert_close(output, oracles.causal_attention(query, key, value), TOLERANCE)


@functools.cache
def fused(implementation):
    return lambda *arrays: attention(*arrays, implementation=implementation)


def test_implementations_agree():
    arrays = inputs()
    assert_close(run(fused("fused"), *arrays), run(fused("chunked"), *arrays), TOLERANCE)


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


@pytest.mark.parametrize(
    "name, options",
    [
        ("key", {"key": np.zeros((2, 21, 2, 9), "float32")}),
        ("query", {"query": np.zeros((2, 21, 3, 8), "float32")}),
        ("limits", {"query": np.zeros((2, 5, 4, 8), "float32")}),
        ("key_segments", {"query_segments": SEGMENTS}),
        ("implementation", {"implementation": "quick"}),
        ("key_mask", {"implementation": "fused", "key_mask": MASK}),
    ],
)
def test_an_error_names_the_argument(name, options):
    arguments = dict(zip(("query", "key", "value"), inputs())) | options
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        attention(**arguments)
