"""The grouped matrix product tile by tile, and its backward pass."""

from keras import ops

from ..backend.loops import add_to_row, get_row
from .tiles import Tiles, read, write


def forward(rows, weights, group_sizes, sizes):
    """`rows (R, D)`, `weights (E, D, F)`, `group_sizes (E,)` -> `(R, F)`."""
    count = ops.shape(rows)[0]
    tiles = Tiles(count, group_sizes, sizes)
    rows = tiles.pad(rows)

    def body(tile, outputs):
        return write(outputs, tile, read(rows, tile) @ get_row(weights, tile.group))

    outputs = ops.zeros((ops.shape(rows)[0], weights.shape[2]), rows.dtype)
    return tiles.loop(body, outputs)[:count]


def backward(rows, weights, group_sizes, d_outputs, sizes):
    """Gradients of `rows` and `weights`; the latter accumulate in float32."""
    count = ops.shape(rows)[0]
    tiles = Tiles(count, group_sizes, sizes)
    rows, d_outputs = tiles.pad(rows), tiles.pad(d_outputs)

    def body(tile, carry):
        d_rows, d_weights = carry
        d_tile = read(d_outputs, tile)
        d_rows = write(d_rows, tile, d_tile @ ops.transpose(get_row(weights, tile.group)))
        d_weight = ops.transpose(read(rows, tile)) @ d_tile
        return d_rows, add_to_row(d_weights, tile.group, d_weight)

    carry = (ops.zeros_like(rows), ops.zeros(weights.shape, "float32"))
    d_rows, d_weights = tiles.loop(body, carry)
    return d_rows[:count], ops.cast(d_weights, weights.dtype)
