"""The inverse of a unit lower triangular matrix, by doubling blocks.

The inverse of [[a, 0], [l, b]] is [[a', 0], [-b' l a', b']]. Only products of exact inverses are
formed, never powers of the matrix: a Neumann product overflows float32 on correlated keys, where
its entries are near 1.
"""

from typing import Annotated

from keras import ops

from ..tensor_types import Tensor

MIN_BLOCK = 16


def unit_lower_inverse(
    strictly_lower: Annotated[Tensor, "... C C"],
) -> Annotated[Tensor, "... C C"]:
    """`(I + A)^-1` for a strictly lower triangular A, C a power of two."""
    size = strictly_lower.shape[-1]
    block = min(size, MIN_BLOCK)
    inverse = _ladder(_diagonal_blocks(strictly_lower, block, 0), block)  # (..., C/b, b, b)
    while block < size:
        lower = _diagonal_blocks(strictly_lower, 2 * block, block)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -(second @ (lower @ first))
        upper = ops.concatenate([first, ops.zeros_like(first)], axis=-1)
        inverse = ops.concatenate([upper, ops.concatenate([corner, second], axis=-1)], axis=-2)
        block *= 2
    return inverse[..., 0, :, :]


def _diagonal_blocks(matrix: Tensor, step: int, offset: int) -> Tensor:
    """Stacks `matrix[s + offset : s + step, s : s + step - offset]` for s = 0, step, 2 step, ..."""
    starts = range(0, matrix.shape[-1], step)
    blocks = [matrix[..., s + offset : s + step, s : s + step - offset] for s in starts]
    return ops.stack(blocks, axis=-3)


def _ladder(strictly_lower: Tensor, size: int) -> Tensor:
    """The same doubling on whole matrices, X <- X - X L X, for blocks too small to cut up."""
    rows = ops.arange(size)
    inverse = ops.broadcast_to(ops.eye(size), ops.shape(strictly_lower))
    width = 1
    while width < size:
        pair = rows // width
        in_corner = (pair[:, None] == pair[None, :] + 1) & (pair[:, None] % 2 == 1)
        corner = ops.where(in_corner, strictly_lower, 0.0)
        inverse = inverse - inverse @ (corner @ inverse)
        width *= 2
    return inverse
