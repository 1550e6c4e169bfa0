"""Attention in blocks of queries and keys with a running softmax, and its backward pass.

For a block of queries the keys are read block by block, from the first to the last block that they
meet (see `meetings`). m is the running row max of the scores z, l the running row sum of
exponentials:

    m' = max(m, max_s z_s)    l' = e^{m - m'} l + sum_s e^{z_s - m'}    o' = e^{m - m'} o + ...

The backward pass keeps the outputs and the log-sum-exp L = m + log l, and recomputes the weights
p_s = e^{z_s - L}:

    dV = P^T dO    dZ = P * (dO V^T - rowsum(dO * O))    dQ = scale dZ K    dK = scale dZ^T Q

With dropout, M is 0 at a dropped weight and 1 / (1 - rate) elsewhere; l sums undropped weights:

    O = (P * M) V    dV = (P * M)^T dO    dZ = P * ((dO V^T) * M - rowsum(dO * O))

Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.

Shapes: B batch, G key heads, R query heads per key head, C queries of a block (`block_q`), N blocks
of queries, S keys.

    forward     outputs and log-sum-exp of all blocks
    backward    gradients of queries, keys and values
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from keras import ops

from ..backend.loops import get_rows, scan, set_rows
from ..backend.platform import platform
from ..tensor_types import Tensor
from .attention_blocks import (
    FAR,
    Keys,
    Queries,
    by_head,
    by_token,
    meetings,
    product,
    scores_of,
    span,
    tile_of,
)
from .tile_dropout import keep_factor


class BlockOptions(NamedTuple):
    """What is known before the program runs.

    Attributes:
        block_kv: int, keys of a block.
        scale: float, factor on the scores.
        dropout: float, probability to drop a weight.
    """

    block_kv: int
    scale: float
    dropout: float


def forward(
    queries: Queries, keys: Keys, options: BlockOptions
) -> tuple[Annotated[Tensor, "N B C G R D"], Annotated[Tensor, "N B G R*C"]]:
    """Outputs of all blocks and the log-sum-exp of their scores."""

    def block(carry, xs):
        first, end, *own = xs
        own = Queries(*own)
        query = by_head(own.query)  # (B, G, R C, D)

        def step(number, running):
            row_max, row_sum, output = running
            tile = tile_of(own, keys, number, options.block_kv)
            scores = scores_of(query, tile, options.scale)
            new_max = ops.maximum(row_max, ops.max(scores, axis=-1))
            weights = ops.where(tile.seen, ops.exp(scores - new_max[..., None]), 0.0)
            shrink = ops.exp(row_max - new_max)
            row_sum = shrink * row_sum + ops.sum(weights, axis=-1)
            if options.dropout:
                shape = ops.shape(weights)
                weights = weights * keep_factor(shape, own.seed, number, options.dropout)
            read = product(ops.cast(weights, tile.value.dtype), tile.value)
            return new_max, row_sum, shrink[..., None] * output + read

        zeros = ops.zeros(ops.shape(query)[:-1], "float32")
        running = (zeros + FAR, zeros, ops.zeros(ops.shape(query), "float32"))
        row_max, row_sum, output = _over_keys(keys, options, (first, end), step, running)
        output = output / ops.maximum(row_sum, 1e-30)[..., None]
        lse = row_max + ops.log(ops.maximum(row_sum, 1e-30))
        output = ops.cast(by_token(output, ops.shape(own.query)), own.query.dtype)
        return carry, (output, lse)

    count, batch, block_q, groups, repeats, _ = ops.shape(queries.query)
    into = (
        ops.zeros_like(queries.query),
        ops.zeros((count, batch, groups, repeats * block_q), "float32"),
    )
    xs = *_spans(queries, keys, options.block_kv), *_present(queries)
    _, (output, lse) = scan(block, (), xs, into)
    return output, lse


def backward(
    queries: Queries,
    keys: Keys,
    output: Annotated[Tensor, "N B C G R D"],
    lse: Annotated[Tensor, "N B G R*C"],
    d_output: Annotated[Tensor, "N B C G R D"],
    options: BlockOptions,
) -> tuple[
    Annotated[Tensor, "N B C G R D"], Annotated[Tensor, "B S G D"], Annotated[Tensor, "B S G D"]
]:
    """Gradients of the queries, the keys and the values."""

    def block(carry, xs):
        first, end, *own, output, lse, d_output = xs
        own = Queries(*own)
        query, d_rows = by_head(own.query), by_head(d_output)
        output = ops.cast(by_head(output), "float32")
        row_dot = ops.sum(ops.cast(d_rows, "float32") * output, axis=-1, keepdims=True)

        def step(number, running):
            d_query, d_key, d_value = running
            tile = tile_of(own, keys, number, options.block_kv)
            weights = ops.exp(scores_of(query, tile, options.scale) - lse[..., None])
            weights = ops.where(tile.seen, weights, 0.0)
            d_weights = product(d_rows, ops.swapaxes(tile.value, -1, -2))
            kept = weights
            if options.dropout:
                keep = keep_factor(ops.shape(weights), own.seed, number, options.dropout)
                d_weights, kept = d_weights * keep, weights * keep
            d_scores = options.scale * weights * (d_weights - row_dot)
            d_scores = ops.cast(d_scores, tile.key.dtype)
            kept = ops.cast(kept, tile.value.dtype)
            d_query = d_query + product(d_scores, tile.key)
            d_key = _add(d_key, tile.start, product(ops.swapaxes(query, -1, -2), d_scores))
            d_value = _add(d_value, tile.start, product(ops.swapaxes(d_rows, -1, -2), kept))
            return d_query, d_key, d_value

        running = (ops.zeros(ops.shape(query), "float32"), *carry)
        d_query, *carry = _over_keys(keys, options, (first, end), step, running)
        d_query = ops.cast(by_token(d_query, ops.shape(own.query)), own.query.dtype)
        return tuple(carry), (d_query,)

    shape = ops.shape(keys.key)
    carry = (ops.zeros(shape, "float32"), ops.zeros(shape, "float32"))
    spans = _spans(queries, keys, options.block_kv)
    xs = (*spans, *_present(queries), output, lse, d_output)
    (d_key, d_value), (d_query,) = scan(block, carry, xs, (ops.zeros_like(queries.query),))
    return d_query, ops.cast(d_key, keys.key.dtype), ops.cast(d_value, keys.value.dtype)


def _spans(
    queries: Queries, keys: Keys, block_kv: int
) -> tuple[Annotated[Tensor, "N"], Annotated[Tensor, "N"]]:
    """First block of keys and end of those that a block of queries reads."""
    limits = queries.limits
    count = ops.shape(limits)[0]
    if 0 in limits.shape:  # none of which one is the largest
        return ops.zeros((count,), "int32"), ops.zeros((count,), "int32")
    if limits.shape[0] == 1:  # of all segments there are
        last = ops.minimum(ops.max(limits), ops.shape(keys.mask)[1] - 1)  # what is added fits
        end = (last + block_kv) // block_kv
        return ops.zeros((1,), "int32"), ops.reshape(end, (1,))
    meets = meetings(limits, queries.segments, keys, block_kv)
    return span(ops.any(meets, axis=-1), axis=1)


def _over_keys(
    keys: Keys,
    options: BlockOptions,
    bounds: tuple[Tensor, Tensor],
    step: Callable[[Tensor, Any], Any],
    running: Any,
) -> Any:
    """`running = step(number, running)` over the blocks of keys within `bounds`."""
    if platform() == "gpu" and ops.shape(keys.key)[1] == options.block_kv:
        # A host that has to know whether the one block is seen waits for the GPU.
        return step(ops.zeros((), "int32"), running)
    return ops.fori_loop(*bounds, step, running)


def _add(
    buffer: Annotated[Tensor, "B S G D"],
    start: Tensor,
    columns: Annotated[Tensor, "B G D block_kv"],
) -> Annotated[Tensor, "B S G D"]:
    """Adds to `buffer` from key `start` on.

    Columns, because they come from products in which the wide matrices of queries by keys stand as
    they are; a compiler for the CPU turns those round slowly.
    """
    rows = ops.transpose(columns, (0, 3, 1, 2))
    old = get_rows(buffer, start, rows.shape[1], axis=1)
    return set_rows(buffer, start, old + rows, axis=1)


def _present(queries: Queries) -> tuple[Tensor, ...]:
    return tuple(x for x in queries if x is not None)
