"""Sums for the CPU's compiler, which computes all that leads to a plain sum once more within it.

It does so slowly, with copies of what is sliced or broadcast. Products with ones end what may be
merged. Elsewhere sums are plain: products may round their factors there.

    row_sums       over the last axis
    column_sums    over all others
    scaled         columns times weights, whose gradient is such a sum
"""

import functools
from collections.abc import Callable
from typing import Annotated

from keras import ops

from .backend.autodiff import custom_gradient
from .backend.platform import BACKEND, platform
from .backend.sharding import devices
from .row_product import sum_of_blocks
from .tensor_types import Tensor


def row_sums(x: Annotated[Tensor, "... N"]) -> Annotated[Tensor, "..."]:
    """Sums over the last axis, in the dtype of `x`."""
    if platform() != "cpu":
        return ops.sum(x, axis=-1)
    return (x @ ops.ones((x.shape[-1], 1), x.dtype))[..., 0]


def column_sums(x: Annotated[Tensor, "... N"]) -> Annotated[Tensor, "N"]:
    """Sums over all axes but the last, float32."""
    rows = ops.reshape(ops.cast(x, "float32"), (1, -1, x.shape[-1]))
    return sum_of_blocks(rows)[0] if platform() == "cpu" else ops.sum(rows[0], axis=0)


def scaled(
    x: Annotated[Tensor, "... N"], weight: Annotated[Tensor, "N"]
) -> Annotated[Tensor, "... N"]:
    """`x * weight`, both float32; where JAX compiles for one CPU, with a gradient of its own.

    Several devices would gather the rows, of which the sum makes a single axis.
    """
    if BACKEND == "jax" and platform() == "cpu" and devices() is None:
        return _scaled()(x, weight)
    return x * weight


@functools.cache
def _scaled() -> Callable[..., Tensor]:
    def forward(x, weight):
        return x * weight, (x, weight)

    def backward(residuals, d_output):
        x, weight = residuals
        return d_output * weight, column_sums(d_output * x)

    return custom_gradient(forward, backward)
