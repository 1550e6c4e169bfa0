"""Gathering rows with a backward pass that gathers too.

Autodiff turns a gather into a scatter-add, which XLA runs one element at a time on the CPU. Where
the inverse of the index is known, the gradient is a gather and a small sum.

    take_rows         rows by an index that takes every row K times
    permute_tokens    the tokens of every row of a batch in another order
"""

import functools
from collections.abc import Callable
from typing import Annotated

from keras import ops

from .backend.autodiff import custom_gradient
from .backend.sharding import devices
from .tensor_types import Tensor


def take_rows(
    rows: Annotated[Tensor, "N ..."],
    index: Annotated[Tensor, "N*K"],
    inverse: Annotated[Tensor, "N K"],
) -> Annotated[Tensor, "N*K ..."]:
    """`rows[index]`, where every row is taken exactly K times.

    Args:
        rows: `(N, ...)`.
        index: `(N K,)` integers.
        inverse: `(N, K)` integers, the places in `index` where row n stands.

    Returns:
        `(N K, ...)`.
    """
    return _differentiable()(rows, index, inverse)


def permute_tokens(
    x: Annotated[Tensor, "B T ..."],
    order: Annotated[Tensor, "B T"],
    inverse: Annotated[Tensor, "B T"],
) -> Annotated[Tensor, "B T ..."]:
    """`y[b, s] = x[b, order[b, s]]` for permutations of 0..T-1 that are inverse to each other."""
    if devices() is not None:
        return _along_tokens()(x, order, inverse)
    batch, length = ops.shape(order)
    offsets = ops.expand_dims(ops.arange(batch, dtype="int32") * length, -1)
    rows = ops.reshape(x, (-1, *x.shape[2:]))
    index = ops.reshape(ops.cast(order, "int32") + offsets, (-1,))
    inverse = ops.reshape(ops.cast(inverse, "int32") + offsets, (-1, 1))
    return ops.reshape(take_rows(rows, index, inverse), (batch, length, *x.shape[2:]))


@functools.cache
def _along_tokens() -> Callable[..., Tensor]:
    """The same in a form that the compiler splits by row and by channel, where several devices
    have them; on one it is slower than that of flat rows."""

    def take(x, index):
        index = ops.reshape(index, (*index.shape, *(1 for _ in x.shape[2:])))
        return ops.take_along_axis(x, index, axis=1)

    def forward(x, order, inverse):
        return take(x, order), inverse

    def backward(inverse, d_taken):
        return take(d_taken, inverse), None, None

    return custom_gradient(forward, backward)


@functools.cache
def _differentiable() -> Callable[..., Tensor]:
    def forward(rows, index, inverse):
        return ops.take(rows, index, axis=0), inverse

    def backward(inverse, d_taken):
        return ops.sum(ops.take(d_taken, inverse, axis=0), axis=1), None, None

    return custom_gradient(forward, backward)
