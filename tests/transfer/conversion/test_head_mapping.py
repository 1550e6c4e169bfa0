"""Heads of attention as heads of a Gated DeltaNet."""

import keras
import numpy as np
import pytest

from qwen3_next.layers import GatedAttention
from qwen3_next.transfer.conversion.head_mapping import (
    HeadCounts,
    by_key_head,
    check_heads,
    expand_heads,
    reduce_heads,
    sum_heads,
)

WIDTH, HEADS, GROUPS, DIM = 24, 4, 2, 8


def drawn(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


def attention_with_all_heads(grouped, expand):
    """The attention of a grouped one, with as many key and value heads as query heads."""
    layer = GatedAttention(HEADS, HEADS, DIM, output_gate=False, initializer_range=0.3)
    layer.build((None, None, WIDTH))
    for new, old in zip(layer.weights, grouped.weights, strict=True):
        values = keras.ops.convert_to_numpy(old.value)
        expanded = old.path.split("/")[-2] in ("k_proj", "v_proj")
        new.assign(expand(values) if expanded else values)
    return layer


def by_rows(kernel):
    """The other way to repeat, which mixes up heads: every row of (heads, dim) on its own."""
    flat = kernel.reshape(WIDTH, GROUPS * DIM)
    return np.repeat(flat, HEADS // GROUPS, axis=1).reshape(WIDTH, HEADS, DIM)


def test_expanded_heads_attend_as_groups_do_and_repeated_rows_do_not():
    grouped = GatedAttention(HEADS, GROUPS, DIM, output_gate=False, initializer_range=0.3)
    x = drawn(2, 7, WIDTH)
    expected = keras.ops.convert_to_numpy(grouped(x))

    def difference(expand):
        found = attention_with_all_heads(grouped, expand)(x)
        return np.abs(keras.ops.convert_to_numpy(found) - expected).max()

    assert difference(lambda kernel: expand_heads(kernel, HEADS)) < 1e-5
    assert difference(by_rows) > 0.1


def test_fewer_heads_are_means_and_their_outputs_sums():
    kernel = drawn(WIDTH, HEADS, DIM)
    for heads in (1, 2, 4):
        share = HEADS // heads
        blocks = [kernel[:, i * share : (i + 1) * share] for i in range(heads)]
        mean = np.stack([block.mean(1) for block in blocks], axis=1)
        np.testing.assert_allclose(reduce_heads(kernel, heads), mean, rtol=1e-6)
        first = np.stack([block[:, 0] for block in blocks], axis=1)
        np.testing.assert_array_equal(reduce_heads(kernel, heads, "first"), first)
        total = np.stack([block.sum(1) for block in blocks]).transpose(0, 2, 1)
        np.testing.assert_allclose(
            sum_heads(kernel.transpose(1, 2, 0), heads), total, rtol=1e-5, atol=1e-6
        )


def test_what_belongs_to_a_key_head_stands_together():
    query, value = drawn(WIDTH, 2, DIM), drawn(WIDTH, 4, DIM)
    kernel = by_key_head([query, query, value, value], key_heads=2)
    assert kernel.shape == (WIDTH, 2, 6 * DIM)
    np.testing.assert_array_equal(kernel[:, 1, :DIM], query[:, 1])
    np.testing.assert_array_equal(
        kernel[:, 1, 2 * DIM : 4 * DIM].reshape(WIDTH, 2, DIM), value[:, 2:]
    )


@pytest.mark.parametrize("counts", [(4, 2, 4, 4), (4, 2, 2, 4), (4, 2, 1, 2), (4, 2, 2, 2)])
def test_counts_that_can_be_mapped(counts):
    check_heads(HeadCounts(*counts))


@pytest.mark.parametrize(
    ("counts", "name"),
    [((4, 2, 4, 8), "n_heads"), ((4, 2, 1, 1), "n_heads"), ((6, 2, 3, 6), "n_kv_heads")],
)
def test_counts_that_cannot_be_mapped_are_named(counts, name):
    with pytest.raises(ValueError, match=f"`{name}` must .*Received: {name}="):
        check_heads(HeadCounts(*counts))
