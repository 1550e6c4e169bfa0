"""Bias-free projections between the residual stream and heads."""

import keras

from .initializers import Normal


def to_heads(heads, dim, initializer_range, name, dtype):
    """`(B, T, D) -> (B, T, heads, dim)`, kernel `(D, heads, dim)`."""
    return _project("btd,dhk->bthk", (None, heads, dim), initializer_range, name, dtype)


def from_heads(width, initializer_range, name, dtype):
    """`(B, T, heads, dim) -> (B, T, width)`, kernel `(heads, dim, width)`."""
    return _project("bthk,hkd->btd", (None, width), initializer_range, name, dtype)


def _project(equation, output_shape, initializer_range, name, dtype):
    # A kernel with its heads on an axis of their own shards by head.
    return keras.layers.EinsumDense(
        equation,
        output_shape=output_shape,
        kernel_initializer=Normal(initializer_range),
        name=name,
        dtype=dtype,
    )
