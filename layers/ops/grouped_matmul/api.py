"""Matrix products of grouped rows: row r is multiplied with the matrix of its group.

    out[r] = rows[r] @ weights[e]      for the rows r of group e

The groups stand one behind the other in `rows`. Work and memory follow the rows: a group without
rows costs nothing, no row is dropped and no `(E, R, D)` tensor is formed.

Public: `grouped_matmul`. Other ops that group rows use `pick`.
"""

import functools
from collections.abc import Callable
from typing import Annotated

from keras import ops

from ..backend.autodiff import custom_gradient
from ..backend.platform import BACKEND, choose, has_pallas, platform, require_pallas
from ..backend.sharding import devices
from ..checks import as_floats, exact_int32, known_values, require_shape
from ..tensor_types import Tensor
from . import tiled_matmul
from .tiles import tile_sizes

IMPLEMENTATIONS = ("tiled", "ragged_dot", "pallas")


def grouped_matmul(
    rows: Annotated[Tensor, "R D"],
    weights: Annotated[Tensor, "E D F"],
    group_sizes: Annotated[Tensor, "E"],
    *,
    implementation: str | None = None,
) -> Annotated[Tensor, "R F"]:
    """Multiplies every row with the weights of its group.

    Args:
        rows: `(R, D)`, sorted by group.
        weights: `(E, D, F)`.
        group_sizes: `(E,)` integers that sum to R at most; rows behind the last group yield 0.
        implementation: `"tiled"` (a loop over tiles of rows, on every backend), `"ragged_dot"`
            (JAX's own operation: a kernel on TPU, elsewhere all groups for every row), `"pallas"`
            (kernels for a GPU, with JAX, for a known number of rows; on a CPU they are
            interpreted), or `None` for `"pallas"` on GPU with JAX, `"ragged_dot"` on TPU and
            `"tiled"` elsewhere and on the devices of a `keras.distribution`.

    Returns:
        `(R, F)` in the dtype of `rows`.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes, dtypes or known sizes that do not fit together, or an implementation
            that is unknown or cannot run here.
    """
    rows, weights = as_floats("rows", rows), as_floats("weights", weights)
    require_shape("rows", rows, (None, None))
    require_shape("weights", weights, (None, rows.shape[1], None))
    group_sizes = exact_int32("group_sizes", group_sizes)
    require_shape("group_sizes", group_sizes, (weights.shape[0],))
    sizes, count = known_values(group_sizes), rows.shape[0]
    if sizes is not None and (
        (sizes < 0).any() or (count is not None and sizes.sum(dtype="int64") > count)
    ):
        raise ValueError(
            "`group_sizes` must be at least 0 and sum to the number of rows at most. "
            f"Received: group_sizes={sizes}, rows.shape={tuple(rows.shape)}"
        )
    weights = ops.cast(weights, rows.dtype)
    implementation = pick(implementation, ops.shape(rows)[0])
    if implementation == "ragged_dot":
        import jax

        return jax.lax.ragged_dot(rows, weights, group_sizes)
    if implementation == "pallas":
        return _by_kernels()(rows, weights, group_sizes)
    tiles = tile_sizes(rows.shape[0], weights.shape[0])
    return _differentiable(tiles)(rows, weights, group_sizes)


def pick(implementation: str | None, rows: int | Tensor | None) -> str:
    """The implementation to run for the one asked for and a number of rows, if it is known."""
    known = isinstance(rows, int)
    default = "ragged_dot" if BACKEND == "jax" and platform() == "tpu" else "tiled"
    if platform() == "gpu" and has_pallas() and known and devices() is None:
        default = "pallas"
    implementation = choose(implementation, IMPLEMENTATIONS, default)
    if implementation == "ragged_dot" and BACKEND != "jax":
        raise ValueError(
            f"implementation='ragged_dot' needs the JAX backend. Received: backend={BACKEND!r}"
        )
    if implementation == "pallas":
        require_pallas(implementation)
        if not known:
            raise ValueError(
                "implementation='pallas' needs a known number of rows. Received: an unknown one"
            )
    return implementation


@functools.cache
def _by_kernels() -> Callable[..., Tensor]:
    from . import pallas_matmul

    def forward(*inputs):
        return pallas_matmul.forward(*inputs), inputs

    def backward(inputs, d_outputs):
        rows, weights, group_sizes = inputs
        return (*pallas_matmul.backward(rows, weights, group_sizes, d_outputs), None)

    return custom_gradient(forward, backward)


@functools.cache
def _differentiable(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    def forward(rows, weights, group_sizes):
        outputs = tiled_matmul.forward(rows, weights, group_sizes, sizes)
        return outputs, (rows, weights, group_sizes)

    def backward(residuals, d_outputs):
        rows, weights, group_sizes = residuals
        gradients = tiled_matmul.backward(rows, weights, group_sizes, d_outputs, sizes)
        return (*gradients, None)

    return custom_gradient(forward, backward)
