import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops.padding import from_blocks, pad_end, pad_to_multiple, to_blocks
from tests.support.running import BACKEND, run

X = np.arange(24, dtype="float32").reshape(2, 6, 2)


@pytest.mark.portable
@pytest.mark.parametrize("size, length", [(1, 6), (3, 6), (4, 8), (16, 16)])
def test_padding_reaches_the_next_multiple(size, length):
    padded = run(lambda x: pad_to_multiple(x, size, axis=1, fill=-1), X)
    assert padded.shape == (2, length, 2)
    assert np.array_equal(padded[:, :6], X)
    assert (padded[:, 6:] == -1).all()


def test_what_fills_up_may_be_a_tensor():
    padded = run(lambda x: pad_end(x, 3, axis=1, fill=x[:, -1:]), X)
    assert np.array_equal(padded[:, 6:], np.repeat(X[:, -1:], 3, axis=1))


@pytest.mark.parametrize("dtype", ["bool", "int32", "bfloat16"])
def test_padding_keeps_the_dtype(dtype):
    x = ops.cast(ops.convert_to_tensor(X), dtype)
    assert pad_end(x, 1, fill=1).dtype == x.dtype


@pytest.mark.portable
@pytest.mark.parametrize("size", [1, 4, 6, 7])
def test_blocks_come_back_as_the_tokens_they_were_cut_from(size):
    blocks = run(lambda x: to_blocks(x, size), X)
    assert blocks.shape == (-(-6 // size), 2, size, 2)
    assert np.array_equal(blocks[0, :, :6], X[:, :size])
    assert np.array_equal(run(lambda x: from_blocks(x, 6), blocks), X)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others know every length beforehand")
@pytest.mark.parametrize("size", [4, 6])
def test_a_length_that_is_not_known_beforehand_is_padded_as_well(size):
    import tensorflow as tf

    signature = [tf.TensorSpec((None, None, 2), "float32")]
    cut = tf.function(lambda x: to_blocks(x, size), input_signature=signature, autograph=False)
    assert np.array_equal(cut(X), run(lambda x: to_blocks(x, size), X))
