"""The embedding: rows of a table, with one dense gradient."""

import keras
import numpy as np
import pytest

from qwen3_next.layers import TokenEmbedding
from tests.support.running import BACKEND, assert_close, gradients, run, weight_arrays, with_weights

IDS = np.array([[1, 2, 1, 1], [0, 4, 4, 2]], "int32")


def test_a_row_read_often_adds_up_its_gradients(compiled):
    layer = TokenEmbedding(6, 3)
    layer.build()
    (table,) = weight_arrays(layer)
    assert np.array_equal(run(with_weights(layer), table, IDS, mode=compiled), table[IDS])
    cotangent = np.random.default_rng(0).normal(size=(*IDS.shape, 3)).astype("float32")
    found, _ = gradients(with_weights(layer), [table, IDS], cotangent, mode=compiled)
    expected = np.zeros_like(table)
    np.add.at(expected, IDS, cotangent)
    assert_close(found, expected, 1e-6)


WRONG = [-1, -6, 6, 7, 2**31 - 1, -(2**31)]
# JAX has no such integers unless it is told to.
WIDE = [2**31, 2**32 + 1, 2**40, -(2**32) + 1] if BACKEND == "tensorflow" else []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_id_without_a_row_gives_nan_and_no_other_tokens_row(compiled, dtype):
    layer = TokenEmbedding(6, 3, dtype=dtype)
    layer.build()
    (table,) = weight_arrays(layer)
    ids = np.array([[1, 5, *WRONG, *WIDE, 0]], "int64" if WIDE else "int32")
    rows = run(with_weights(layer), table, ids, mode=compiled)
    known = (ids >= 0) & (ids < 6)
    assert np.isnan(rows[~known].astype("float32")).all()
    assert np.array_equal(rows[known], table[ids[known]].astype(rows.dtype))


def test_an_id_without_a_row_leaves_the_gradients_of_the_others(compiled):
    layer = TokenEmbedding(6, 3)
    layer.build()
    (table,) = weight_arrays(layer)
    cotangent = np.ones((1, 3, 3), "float32")
    ids = np.array([[1, 6, -1]], "int32")
    found, _ = gradients(with_weights(layer), [table, ids], cotangent, mode=compiled)
    expected = np.zeros_like(table)
    expected[1] = 1.0
    assert_close(found, expected, 1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere gradients are always dense")
def test_the_gradient_is_a_tensor_and_no_list_of_slices():
    import tensorflow as tf

    layer = TokenEmbedding(6, 3)
    with tf.GradientTape() as tape:
        total = keras.ops.sum(layer(IDS))
    gradient = tape.gradient(total, layer.embeddings.value)
    assert isinstance(gradient, tf.Tensor)
