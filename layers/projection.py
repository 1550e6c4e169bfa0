"""Bias-free projections of the residual stream, and between it and heads."""

import keras
from keras import ops

from .initializers import Normal
from .ops.tensor_types import Tensor
from .shapes import Shape


@keras.saving.register_keras_serializable(package="qwen3_next")
class RowDense(keras.layers.Dense):
    """A dense layer that takes `(..., D)` as rows of D.

    TensorFlow under XLA has no gradient of Keras' product of more than two dims within a loop,
    unless all of them are known.
    """

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        flat = super().call(ops.reshape(inputs, (-1, inputs.shape[-1])), training=training)
        return ops.reshape(flat, (*ops.shape(inputs)[:-1], flat.shape[-1]))


def dense(units: int, initializer_range: float, name: str, dtype: object) -> keras.layers.Dense:
    """`(..., D) -> (..., units)`, kernel `(D, units)`."""
    return RowDense(
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
