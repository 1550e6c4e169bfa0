"""Gathering rows with a backward pass that gathers too.

Autodiff turns a gather into a scatter-add, which XLA runs one element at a time on the CPU. Where
the inverse of the index is known, the gradient is a gather and a small sum.
"""

import functools

from keras import ops

from .backend.autodiff import custom_gradient


def take_rows(rows, index, inverse):
    """`rows[index]`, where every row is taken exactly K times.

    Args:
        rows: `(N, ...)`.
        index: `(N K,)` integers.
        inverse: `(N, K)` integers, the places in `index` where row n stands.

    Returns:
        `(N K, ...)`.
    """
    return _differentiable()(rows, index, inverse)


def permute_tokens(x, order, inverse):
    """`y[b, s] = x[b, order[b, s]]` for `x (B, T, ...)` and permutations `(B, T)` of 0..T-1."""
    batch, length = ops.shape(order)
    offsets = ops.expand_dims(ops.arange(batch, dtype="int32") * length, -1)
    rows = ops.reshape(x, (-1, *x.shape[2:]))
    index = ops.reshape(ops.cast(order, "int32") + offsets, (-1,))
    inverse = ops.reshape(ops.cast(inverse, "int32") + offsets, (-1, 1))
    return ops.reshape(take_rows(rows, index, inverse), (batch, length, *x.shape[2:]))


@functools.cache
def _differentiable():
    def forward(rows, index, inverse):
        return ops.take(rows, index, axis=0), inverse

    def backward(inverse, cotangent):
        return ops.sum(ops.take(cotangent, inverse, axis=0), axis=1), None, None

    return custom_gradient(forward, backward)
