"""All experts of a mixture in one loop over tiles of (token, expert) pairs.

A tile gathers its tokens, goes through both products of its expert and leaves one row for every
pair, so that nothing but those rows (and, for the backward pass, what went into the activation) is
ever written for all pairs: on a CPU a tile stays in the cache.

Pairs are numbered token by token, pair p belongs to token p // K. `order (R,)` lists the pair
numbers by expert, `places (N, K)` says where the pairs of a token stand in that list.
"""

from typing import NamedTuple

from keras import ops

from ..backend.loops import add_to_row, get_row, get_rows
from ..grouped_matmul.tiles import Tiles, write
from .activations import ACTIVATIONS


class Grouping(NamedTuple):
    """Pairs by expert: `order (R,)`, `places (N, K)` and `sizes (E,)`, all int32."""

    order: object
    places: object
    sizes: object


def forward(x, gate_up, down, weights, grouping, sizes, activation, keep):
    """Outputs `(N, D)` and, with `keep`, gate and up of all pairs `(R, 2F)`, else `None`."""
    act = ACTIVATIONS[activation][0]
    tiles = Tiles(ops.shape(grouping.order)[0], grouping.sizes, sizes)
    pairs = tiles.pad(grouping.order)

    def body(tile, carry):
        rows, weight = _gather(x, weights, pairs, tile)
        gated = rows @ get_row(gate_up, tile.group)
        gate, up = ops.split(gated, 2, axis=-1)
        output = (weight * act(gate) * up) @ get_row(down, tile.group)
        return tuple(write(old, tile, new) for old, new in zip(carry, (output, gated)))

    count = ops.shape(pairs)[0]
    carry = (ops.zeros((count, x.shape[1]), x.dtype),)
    if keep:
        carry += (ops.zeros((count, gate_up.shape[2]), x.dtype),)
    outputs, *kept = tiles.loop(body, carry)
    return _sum_over_pairs(outputs, grouping.places), kept[0] if keep else None


def backward(x, gate_up, down, weights, grouping, gated, d_output, sizes, activation):
    """Gradients of `x`, `gate_up`, `down` and `weights`; those of weights add up in float32."""
    act, slope = ACTIVATIONS[activation]
    tiles = Tiles(ops.shape(grouping.order)[0], grouping.sizes, sizes)
    pairs = tiles.pad(grouping.order)

    def body(tile, carry):
        d_rows, d_gate_up, d_down, d_weights = carry
        rows, weight = _gather(x, weights, pairs, tile)
        d_tile = _tokens(d_output, weights, pairs, tile)
        gate, up = ops.split(get_rows(gated, tile.start, tile.size), 2, axis=-1)
        inner = act(gate) * up
        d_inner = d_tile @ ops.transpose(get_row(down, tile.group))
        d_weight = ops.sum(d_inner * inner, axis=-1)
        d_inner = weight * d_inner
        d_gated = ops.concatenate([d_inner * up * slope(gate), d_inner * act(gate)], axis=-1)
        return (
            write(d_rows, tile, d_gated @ ops.transpose(get_row(gate_up, tile.group))),
            add_to_row(d_gate_up, tile.group, ops.transpose(rows) @ d_gated),
            add_to_row(d_down, tile.group, ops.transpose(weight * inner) @ d_tile),
            write(d_weights, tile, d_weight),
        )

    count = ops.shape(pairs)[0]
    carry = (
        ops.zeros((count, x.shape[1]), x.dtype),
        ops.zeros(gate_up.shape, "float32"),
        ops.zeros(down.shape, "float32"),
        ops.zeros((count,), weights.dtype),
    )
    d_rows, d_gate_up, d_down, d_weights = tiles.loop(body, carry)
    return (
        _sum_over_pairs(d_rows, grouping.places),
        ops.cast(d_gate_up, gate_up.dtype),
        ops.cast(d_down, down.dtype),
        ops.take(d_weights, grouping.places, axis=0),
    )


def _gather(x, weights, pairs, tile):
    """Tokens `(S, D)` of a tile's pairs and their weights `(S, 1)`, 0 where not its own."""
    weight = ops.take(ops.reshape(weights, (-1,)), get_rows(pairs, tile.start, tile.size))
    weight = ops.where(tile.own, weight, ops.zeros_like(weight))
    return _tokens(x, weights, pairs, tile), ops.expand_dims(weight, -1)


def _tokens(x, weights, pairs, tile):
    return ops.take(x, get_rows(pairs, tile.start, tile.size) // weights.shape[1], axis=0)


def _sum_over_pairs(rows, places):
    return ops.sum(ops.take(rows, places, axis=0), axis=1)
