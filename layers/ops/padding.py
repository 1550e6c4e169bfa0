"""Filling tensors up to a multiple of a size, and cutting them into blocks of that size.

Lengths may be static or, on TensorFlow, known only when the program runs.
"""

from typing import Annotated

from keras import ops

from .tensor_types import Tensor


def pad_end(x: Tensor, count: int | Tensor, axis: int = 0, fill: int | Tensor = 0) -> Tensor:
    """`x` with `count` entries of `fill` behind its last along `axis`.

    `fill` is a number or a tensor that broadcasts to the new entries.
    """
    if isinstance(count, int) and count == 0:
        return x
    shape = list(ops.shape(x))
    shape[axis] = count
    return ops.concatenate([x, ops.broadcast_to(ops.cast(fill, x.dtype), shape)], axis=axis)


def pad_to_multiple(x: Tensor, size: int, axis: int = 0, fill: int | Tensor = 0) -> Tensor:
    """`x` filled up at its end along `axis` to the next multiple of `size`."""
    return pad_end(x, -ops.shape(x)[axis] % size, axis, fill)


def to_chunks_of_rows(
    x: Annotated[Tensor, "N ..."], size: int, fill: int | Tensor = 0
) -> Annotated[Tensor, "C size ..."]:
    """Cuts the rows into chunks of `size`, the last one filled up with `fill`.

    No rows are a chunk, too, as in a replica without data: a loop of TensorFlow under XLA cannot
    write what it finds into a tensor of none.
    """
    count, *rest = ops.shape(x)
    some = max(count, 1) if isinstance(count, int) else ops.maximum(count, 1)
    x = pad_end(x, some - count + -some % size, fill=fill)
    return ops.reshape(x, (-1, size, *rest))


def to_blocks(
    x: Annotated[Tensor, "B T ..."], size: int, fill: int | Tensor = 0
) -> Annotated[Tensor, "N B size ..."]:
    """Cuts the tokens into blocks of `size`, the last one filled up with `fill`."""
    x = pad_to_multiple(x, size, axis=1, fill=fill)
    batch, length, *rest = ops.shape(x)
    return ops.moveaxis(ops.reshape(x, (batch, length // size, size, *rest)), 1, 0)


def from_blocks(
    x: Annotated[Tensor, "N B size ..."], length: int | Tensor
) -> Annotated[Tensor, "B T ..."]:
    """The inverse of `to_blocks`: the first `length` tokens of all blocks in a row."""
    blocks, batch, size, *rest = ops.shape(x)
    return ops.reshape(ops.moveaxis(x, 0, 1), (batch, blocks * size, *rest))[:, :length]
