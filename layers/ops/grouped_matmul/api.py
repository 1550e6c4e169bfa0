"""Matrix products of grouped rows: row r is multiplied with the matrix of its group.

    out[r] = rows[r] @ weights[e]      for the rows r of group e

The groups stand one behind the other in `rows`. Work and memory follow the rows: a group without
rows costs nothing, no row is dropped and no `(E, R, D)` tensor is formed.
"""

import functools

from keras import ops

from ..autodiff import custom_gradient
from ..checks import require_shape
from . import blocks


def grouped_matmul(rows, weights, group_sizes):
    """Multiplies every row with the weights of its group.

    Args:
        rows: `(R, D)`, sorted by group.
        weights: `(E, D, F)`.
        group_sizes: `(E,)` integers that sum to R at most; rows behind the last group yield 0.

    Returns:
        `(R, F)` in the dtype of `rows`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require_shape("rows", rows, (None, None))
    require_shape("weights", weights, (None, rows.shape[1], None))
    require_shape("group_sizes", group_sizes, (weights.shape[0],))
    weights = ops.cast(weights, rows.dtype)
    size = blocks.block_size(rows.shape[0], weights.shape[0])
    return _differentiable(size)(rows, weights, ops.cast(group_sizes, "int32"))


@functools.cache
def _differentiable(size):
    def forward(rows, weights, group_sizes):
        outputs = blocks.forward(rows, weights, group_sizes, size)
        return outputs, (rows, weights, group_sizes)

    def backward(residuals, d_outputs):
        return (*blocks.backward(*residuals, d_outputs, size), None)

    return custom_gradient(forward, backward)
