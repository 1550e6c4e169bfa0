"""Bias-free projections of the residual stream, and between it and heads."""

import math

import keras
from keras import ops

from .initializers import Normal
from .ops import row_product
from .ops.tensor_types import Tensor
from .shapes import Shape


@keras.saving.register_keras_serializable(package="qwen3_next")
class RowDense(keras.layers.Dense):
    """A dense layer that takes `(..., D)` as rows of D.

    TensorFlow under XLA has no gradient of Keras' product of more than two dims within a loop,
    unless all of them are known.
    """

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        if _is_product(self) and row_product.pays(inputs.shape[:-1], self.kernel):
            flat = row_product.multiply_row(rows, ops.convert_to_tensor(self.kernel))
        else:
            flat = super().call(rows, training=training)
        return ops.reshape(flat, (*ops.shape(inputs)[:-1], flat.shape[-1]))


@keras.saving.register_keras_serializable(package="qwen3_next")
class HeadDense(keras.layers.EinsumDense):
    """A projection to heads or from them: its kernel has an axis for the heads, to shard by."""

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if not (_is_product(self) and row_product.pays(inputs.shape[:2], self.kernel)):
            return super().call(inputs, training=training)
        inner = math.prod(inputs.shape[2:])
        kernel = ops.reshape(ops.convert_to_tensor(self.kernel), (inner, -1))
        flat = row_product.multiply_row(ops.reshape(inputs, (1, inner)), kernel)
        return ops.reshape(flat, (1, 1, *self.compute_output_shape(inputs.shape)[2:]))


def _is_product(layer: keras.layers.Layer) -> bool:
    """Whether it does nothing but multiply."""
    plain = layer.bias is None and layer.activation is keras.activations.linear
    return plain and layer.quantization_mode is None


def dense(units: int, initializer_range: float, name: str, dtype: object) -> keras.layers.Dense:
    """`(..., D) -> (..., units)`, kernel `(D, units)`."""
    return RowDense(
        units,
        use_bias=False,
        kernel_initializer=Normal(initializer_range),
        name=name,
        dtype=dtype,
    )


def to_heads(heads: int, dim: int, initializer_range: float, name: str, dtype: object) -> HeadDense:
    """`(B, T, D) -> (B, T, heads, dim)`, kernel `(D, heads, dim)`."""
    return _project("btd,dhk->bthk", (None, heads, dim), initializer_range, name, dtype)


def from_heads(width: int, initializer_range: float, name: str, dtype: object) -> HeadDense:
    """`(B, T, heads, dim) -> (B, T, width)`, kernel `(heads, dim, width)`."""
    return _project("bthk,hkd->btd", (None, width), initializer_range, name, dtype)


def _project(
    equation: str,
    output_shape: Shape,
    initializer_range: float,
    name: str,
    dtype: object,
) -> HeadDense:
    return HeadDense(
        equation,
        output_shape=output_shape,
        kernel_initializer=Normal(initializer_range),
        name=name,
        dtype=dtype,
    )
