"""Bias-free projections of the residual stream, and between it and heads."""

import keras

from .initializers import Normal
from .shapes import Shape


def dense(units: int, initializer_range: float, name: str, dtype: object) -> keras.layers.Dense:
    """`(..., D) -> (..., units)`, kernel `(D, units)`."""
    return keras.layers.Dense(
        units,
        use_bias=False,
        kernel_initializer=Normal(initializer_range),
        name=name,
        dtype=dtype,
    )


def to_heads(
    heads: int, dim: int, initializer_range: float, name: str, dtype: object
) -> keras.layers.EinsumDense:
    """`(B, T, D) -> (B, T, heads, dim)`, kernel `(D, heads, dim)`."""
    return _project("btd,dhk->bthk", (None, heads, dim), initializer_range, name, dtype)


def from_heads(
    width: int, initializer_range: float, name: str, dtype: object
) -> keras.layers.EinsumDense:
    """`(B, T, heads, dim) -> (B, T, width)`, kernel `(heads, dim, width)`."""
    return _project("bthk,hkd->btd", (None, width), initializer_range, name, dtype)


def _project(
    equation: str,
    output_shape: Shape,
    initializer_range: float,
    name: str,
    dtype: object,
) -> keras.layers.EinsumDense:
    # A kernel with its heads on an axis of their own shards by head.
    return keras.layers.EinsumDense(
        equation,
        output_shape=output_shape,
        kernel_initializer=Normal(initializer_range),
        name=name,
        dtype=dtype,
    )
