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


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere gradients are always dense")
def test_the_gradient_is_a_tensor_and_no_list_of_slices():
    import tensorflow as tf

    layer = TokenEmbedding(6, 3)
    with tf.GradientTape() as tape:
        total = keras.ops.sum(layer(IDS))
    gradient = tape.gradient(total, layer.embeddings.value)
    assert isinstance(gradient, tf.Tensor)
