"""The grouped matrix product tile by tile, and its backward pass."""

from typing import Annotated

from keras import ops

from ..backend.loops import get_row, zeros_after
from ..tensor_types import Tensor
from .tiles import add_for_group, for_each_tile, pad_for_tiles, plan_tiles, read_tile, write_tile


def forward(
    rows: Annotated[Tensor, "R D"],
    weights: Annotated[Tensor, "E D F"],
    group_sizes: Annotated[Tensor, "E"],
    sizes: tuple[int, ...],
) -> Annotated[Tensor, "R F"]:
    """Every row times the weights of its group, in tiles of the given sizes."""
    count = ops.shape(rows)[0]
    plan = plan_tiles(count, group_sizes, sizes)
    rows = pad_for_tiles(rows, plan)

    def body(tile, outputs):
        product = read_tile(rows, tile) @ get_row(weights, tile.group)
        return write_tile(outputs, tile, product)

    outputs = zeros_after(rows, (ops.shape(rows)[0], weights.shape[2]), rows.dtype)
    return for_each_tile(plan, body, outputs)[:count]


def backward(
    rows: Annotated[Tensor, "R D"],
    weights: Annotated[Tensor, "E D F"],
    group_sizes: Annotated[Tensor, "E"],
    d_outputs: Annotated[Tensor, "R F"],
    sizes: tuple[int, ...],
) -> tuple[Annotated[Tensor, "R D"], Annotated[Tensor, "E D F"]]:
    """Gradients of `rows` and `weights`; the latter accumulate in float32."""
    count = ops.shape(rows)[0]
    plan = plan_tiles(count, group_sizes, sizes)
    rows, d_outputs = pad_for_tiles(rows, plan), pad_for_tiles(d_outputs, plan)

    def body(tile, carry):
        d_rows, d_weights = carry
        d_tile = read_tile(d_outputs, tile)
        d_rows = write_tile(d_rows, tile, d_tile @ ops.transpose(get_row(weights, tile.group)))
        d_weight = ops.transpose(read_tile(rows, tile)) @ d_tile
        return d_rows, add_for_group(d_weights, tile, d_weight)

    d_weights = zeros_after(d_outputs, weights.shape, "float32")
    carry = (zeros_after(d_outputs, ops.shape(rows), rows.dtype), d_weights)
    d_rows, d_weights = for_each_tile(plan, body, carry)
    return d_rows[:count], ops.cast(d_weights, weights.dtype)
