"""Where the real tokens of a padded row are, and where its packed segments begin.

Padding may stand anywhere in a row: on the left, on the right, on both sides or between tokens.

    valid_lengths        number of real tokens in each row
    token_ranks          rank of every token among the real ones
    compaction           the permutation that moves the real tokens to the front
    segment_index        the packed segments of a row, numbered
    segment_positions    position of every token in its segment
    running_mean         mean over the real tokens of a segment up to each
"""

from typing import Annotated

from keras import ops

from .checks import exact_int32
from .tensor_types import Tensor


def valid_lengths(padding_mask: Annotated[Tensor, "B T"]) -> Annotated[Tensor, "B"]:
    """Number of real tokens in each row. `(B, T)` bool -> `(B,)` int32."""
    return ops.sum(ops.cast(padding_mask, "int32"), axis=-1)


def token_ranks(padding_mask: Annotated[Tensor, "B T"]) -> Annotated[Tensor, "B T"]:
    """0-based rank of every token among the real tokens of its row, counted up to and including it.

    A padded token has the rank of the last real one before it (-1 where there is none).
    """
    return ops.cumsum(ops.cast(padding_mask, "int32"), axis=-1) - 1


def compaction(
    padding_mask: Annotated[Tensor, "B T"],
) -> tuple[Annotated[Tensor, "B T"], Annotated[Tensor, "B T"]]:
    """The permutation that moves the real tokens of every row to its front, in order.

    Returns:
        `(sort_indices, inverse_sort)`, both `(B, T)` int32 and inverse to each other:
        `compact[b, s] = x[b, sort_indices[b, s]]` and `x[b, t] = compact[b, inverse_sort[b, t]]`.
    """
    mask = ops.cast(padding_mask, "int32")
    padded_ranks = ops.cumsum(1 - mask, axis=-1) - 1
    real = ops.sum(mask, axis=-1, keepdims=True)
    inverse_sort = ops.where(padding_mask, token_ranks(padding_mask), real + padded_ranks)
    return ops.cast(ops.argsort(inverse_sort, axis=-1), "int32"), inverse_sort


def segment_index(
    segment_ids: Annotated[Tensor, "B T"], padding_mask: Annotated[Tensor, "B T"] | None = None
) -> Annotated[Tensor, "B T"]:
    """Numbers the runs of equal segment ids in a row 0, 1, 2, ...; padding belongs to no run.

    Two real tokens with no other real token between them share a run when their ids are equal.
    A padded token takes the number of the last real token before it, so that padding never starts
    a segment.

    Args:
        segment_ids: `(B, T)` integers, any values.
        padding_mask: `(B, T)` bool, true at real tokens, or `None`.

    Returns:
        `(B, T)` int32, non-decreasing along T and 0 at the first real token.

    Raises:
        ValueError: ids of another dtype, or known ones that int32 cannot hold.
    """
    ids = exact_int32("segment_ids", segment_ids)
    if padding_mask is not None:
        sort_indices, _ = compaction(padding_mask)
        ids = ops.take_along_axis(ids, sort_indices, axis=-1)
    changed = ops.cast(ids[:, 1:] != ids[:, :-1], "int32")
    index = ops.cumsum(ops.pad(changed, [[0, 0], [1, 0]]), axis=-1)
    if padding_mask is not None:
        index = ops.take_along_axis(index, ops.maximum(token_ranks(padding_mask), 0), axis=-1)
    return index


def segment_positions(
    index: Annotated[Tensor, "B T"] | None, padding_mask: Annotated[Tensor, "B T"] | None = None
) -> Annotated[Tensor, "B T"]:
    """0-based position of every token in its segment, counting real tokens only.

    Args:
        index: `(B, T)` int32 from `segment_index`, or `None` for one segment per row.
        padding_mask: `(B, T)` bool or `None`.

    Returns:
        `(B, T)` int32; a padded token repeats the position before it.
    """
    if index is None:
        return ops.maximum(token_ranks(padding_mask), 0)
    ranks = token_ranks(ops.ones_like(index) if padding_mask is None else padding_mask)
    return ops.maximum(ranks - ops.maximum(_at_start(ranks, index), 0), 0)


def running_mean(
    values: Annotated[Tensor, "B T"],
    padding_mask: Annotated[Tensor, "B T"] | None = None,
    segment_ids: Annotated[Tensor, "B T"] | None = None,
    start: tuple[Annotated[Tensor, "B"], Annotated[Tensor, "B"]] | None = None,
) -> tuple[Annotated[Tensor, "B T"], Annotated[Tensor, "B T"]]:
    """Mean of the values of the real tokens of a segment up to and including each token.

    Args:
        values: `(B, T)` float32.
        padding_mask: `(B, T)` bool or `None`.
        segment_ids: `(B, T)` integers or `None`; one segment per row with a `start`.
        start: Sum and number `(B,)` of the values of earlier tokens, or `None`.

    Returns:
        `(means, sums)`, both `(B, T)` float32.
    """
    if padding_mask is not None:
        values = ops.where(padding_mask, values, 0.0)
    index = None if segment_ids is None else segment_index(segment_ids, padding_mask)
    sums = ops.cumsum(values, axis=-1)
    if index is not None:
        sums = sums - _at_start(sums - values, index)
    if index is None and padding_mask is None:
        positions = ops.broadcast_to(ops.arange(ops.shape(values)[1]), ops.shape(values))
    else:
        positions = segment_positions(index, padding_mask)
    counts = ops.cast(positions, "float32") + 1.0
    if start is not None:
        before, number = (ops.cast(x, "float32")[:, None] for x in start)
        sums, counts = sums + before, counts + number
    return sums / counts, sums


def _at_start(x: Tensor, index: Tensor) -> Tensor:
    """`x (B, T)` at the first place of every token's segment, whose number `index` holds."""
    batch, length = ops.shape(index)
    # Offset row by row, the numbers of the whole batch are one sorted sequence, in which the
    # first place of an equal number is where its segment begins.
    rows = ops.expand_dims(ops.arange(batch, dtype="int32"), -1)
    keys = ops.reshape(index + rows * (length + 1), (-1,))
    first = ops.searchsorted(keys, keys, side="left")
    first = ops.reshape(ops.cast(first, "int32"), (batch, length)) - rows * length
    return ops.take_along_axis(x, first, axis=-1)
