"""All experts of an MoE layer in one loop over tiles of (token, expert) pairs.

A tile gathers its tokens, goes through both products of its expert and leaves one row for every
pair, so that nothing but those rows (and, for the backward pass, what went into the activation) is
ever written for all pairs: on a CPU a tile stays in the cache.

Pairs are numbered token by token, pair p belongs to token p // K.

Shapes: N tokens, K experts per token, R = N K pairs, E experts, S pairs of a tile.

    sort_by_expert    the pairs of every expert one behind the other
    forward           outputs of all tokens
    backward          gradients of tokens, kernels and weights
    tile_outputs, tile_gradients    the same for one tile
"""

import functools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from keras import ops

from ..activations import ACTIVATIONS
from ..backend.loops import get_at, get_row, get_rows, zeros_after
from ..grouped_matmul.tiles import (
    Tile,
    TilePlan,
    add_for_group,
    for_each_tile,
    pad_for_tiles,
    plan_tiles,
    write_tile,
)
from ..tensor_types import Tensor


class ExpertInputs(NamedTuple):
    """Tokens, experts, and the pairs of them, sorted by expert.

    Attributes:
        x: `(N, D)`.
        gate_up: `(E, D, 2F)` in the dtype of x, the gate's half first.
        down: `(E, F, D)` in the dtype of x.
        weights: `(N, K)` in the dtype of x.
        sort_indices: `(R,)` int32, the numbers of the pairs, sorted by expert.
        inverse_sort: `(N, K)` int32, where the pairs of a token stand among the sorted ones.
        tokens_per_expert: `(E,)` int32.
    """

    x: Annotated[Tensor, "N D"]
    gate_up: Annotated[Tensor, "E D 2F"]
    down: Annotated[Tensor, "E F D"]
    weights: Annotated[Tensor, "N K"]
    sort_indices: Annotated[Tensor, "R"]
    inverse_sort: Annotated[Tensor, "N K"]
    tokens_per_expert: Annotated[Tensor, "E"]


def sort_by_expert(
    experts: Annotated[Tensor, "N K"], count: int
) -> tuple[Annotated[Tensor, "N*K"], Annotated[Tensor, "N K"], Annotated[Tensor, "E"]]:
    """Sort indices, inverse sort and tokens per expert of `ExpertInputs`.

    Args:
        experts: int32, from 0 to `count`, which is no expert and comes last.
        count: E.
    """
    flat = ops.reshape(experts, (-1,))
    pairs = ops.shape(flat)[0]
    positions = ops.arange(pairs, dtype="int32")
    if isinstance(pairs, int) and (count + 1) * pairs < 2**31:
        # Expert and position in one number: XLA on a CPU sorts it several times as fast as pairs.
        sort_indices = ops.sort(flat * pairs + positions) % pairs
    else:
        sort_indices = ops.cast(ops.argsort(flat), "int32")
    inverse_sort = ops.scatter(ops.expand_dims(sort_indices, -1), positions, (pairs,))
    # Not by a search for the experts' bounds, for which XLA on TensorFlow compares all with all.
    tokens = ops.segment_sum(ops.ones_like(flat), flat, num_segments=count + 1)[:count]
    return sort_indices, ops.reshape(inverse_sort, (-1, experts.shape[1])), tokens


def forward(
    inputs: ExpertInputs, sizes: tuple[int, ...], activation: str, keep: bool
) -> tuple[Annotated[Tensor, "N D"], Annotated[Tensor, "R 2F"] | None]:
    """Outputs and, with `keep`, gate and up of all pairs, else `None`."""
    plan, pairs = plan_of(inputs, sizes)

    def body(tile, carry):
        results = tile_outputs(inputs, pairs, tile, activation)
        return tuple(write_tile(old, tile, new) for old, new in zip(carry, results))

    count, dtype = ops.shape(pairs)[0], inputs.x.dtype
    carry: tuple[Tensor, ...] = (zeros_after(inputs.x, (count, inputs.x.shape[1]), dtype),)
    if keep:
        carry += (zeros_after(inputs.weights, (count, inputs.gate_up.shape[2]), dtype),)
    outputs, *kept = for_each_tile(plan, body, carry)
    return _sum_over_pairs(outputs, inputs.inverse_sort), kept[0] if keep else None


def backward(
    inputs: ExpertInputs,
    gated: Annotated[Tensor, "R 2F"],
    d_output: Annotated[Tensor, "N D"],
    sizes: tuple[int, ...],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, `gate_up`, `down` and `weights`; those of kernels add up in float32."""
    plan, pairs = plan_of(inputs, sizes)

    def body(tile, carry):
        d_rows, *d_kernels, d_weights = carry
        kept = get_rows(gated, tile.start, tile.size)
        found = tile_gradients(inputs, pairs, tile, kept, d_output, activation)
        d_kernels = add_to_kernels(d_kernels, tile, found)
        d_rows, d_weights = (
            write_tile(old, tile, new)
            for old, new in ((d_rows, found.d_tokens), (d_weights, found.d_weight))
        )
        return d_rows, *d_kernels, d_weights

    count = ops.shape(pairs)[0]
    carry = (
        zeros_after(d_output, (count, inputs.x.shape[1]), inputs.x.dtype),
        zeros_after(d_output, inputs.gate_up.shape, "float32"),
        zeros_after(d_output, inputs.down.shape, "float32"),
        ops.zeros((count,), inputs.weights.dtype),
    )
    d_rows, d_gate_up, d_down, d_weights = for_each_tile(plan, body, carry)
    return (
        _sum_over_pairs(d_rows, inputs.inverse_sort),
        ops.cast(d_gate_up, inputs.gate_up.dtype),
        ops.cast(d_down, inputs.down.dtype),
        ops.take(d_weights, inputs.inverse_sort, axis=0),
    )


class TileGradients(NamedTuple):
    """Gradients of what a tile of S pairs has read.

    Attributes:
        d_tokens: `(S, D)`, 0 where a pair is not the tile's own.
        d_gate_up: `(D, 2F)`, of its expert.
        d_down: `(F, D)`, of its expert.
        d_weight: `(S,)`.
    """

    d_tokens: Annotated[Tensor, "S D"]
    d_gate_up: Annotated[Tensor, "D 2F"]
    d_down: Annotated[Tensor, "F D"]
    d_weight: Annotated[Tensor, "S"]


def tile_outputs(
    inputs: ExpertInputs, pairs: Tensor, tile: Tile, activation: str
) -> tuple[Annotated[Tensor, "S D"], Annotated[Tensor, "S 2F"]]:
    """Weighted outputs of a tile's pairs, 0 where they are not its own, and gate and up."""
    rows, weight = _gather(inputs.x, inputs.weights, pairs, tile)
    gated = rows @ get_row(inputs.gate_up, tile.group)
    gate, up = ops.split(gated, 2, axis=-1)
    inner = weight * ACTIVATIONS[activation].function(gate) * up
    return inner @ get_row(inputs.down, tile.group), gated


def tile_gradients(
    inputs: ExpertInputs,
    pairs: Tensor,
    tile: Tile,
    gated: Annotated[Tensor, "S 2F"],
    d_output: Annotated[Tensor, "N D"],
    activation: str,
) -> TileGradients:
    """Gradients from those of all tokens' outputs and the tile's gate and up."""
    act, derivative = ACTIVATIONS[activation]
    rows, weight = _gather(inputs.x, inputs.weights, pairs, tile)
    d_tile = get_at(d_output, tokens_of(inputs, pairs, tile))
    gate, up = ops.split(gated, 2, axis=-1)
    inner = act(gate) * up
    d_inner = d_tile @ ops.transpose(get_row(inputs.down, tile.group))
    d_weight = ops.sum(d_inner * inner, axis=-1)
    d_inner = weight * d_inner
    d_gated = ops.concatenate([d_inner * up * derivative(gate), d_inner * act(gate)], axis=-1)
    return TileGradients(
        d_gated @ ops.transpose(get_row(inputs.gate_up, tile.group)),
        ops.transpose(rows) @ d_gated,
        ops.transpose(weight * inner) @ d_tile,
        d_weight,
    )


def add_to_kernels(kernels: Sequence[Tensor], tile: Tile, found: TileGradients) -> list[Tensor]:
    """Gradients of `gate_up` and `down` with those of a tile added."""
    new = found.d_gate_up, found.d_down
    return [add_for_group(old, tile, one) for old, one in zip(kernels, new)]


def plan_of(inputs: ExpertInputs, sizes: tuple[int, ...]) -> tuple[TilePlan, Tensor]:
    """The tiles, and the numbers of the pairs with room for the last of them."""
    count = ops.shape(inputs.sort_indices)[0]
    plan = plan_tiles(count, inputs.tokens_per_expert, sizes)
    return plan, pad_for_tiles(inputs.sort_indices, plan)


def tokens_of(inputs: ExpertInputs, pairs: Tensor, tile: Tile) -> Annotated[Tensor, "S"]:
    """The tokens of a tile's pairs, and of some others behind them."""
    return get_rows(pairs, tile.start, tile.size) // inputs.weights.shape[1]


def _gather(
    x: Annotated[Tensor, "N D"], weights: Annotated[Tensor, "N K"], pairs: Tensor, tile: Tile
) -> tuple[Annotated[Tensor, "S D"], Annotated[Tensor, "S 1"]]:
    """Tokens of a tile's pairs and their weights, 0 where the pairs are not its own."""
    own = get_rows(pairs, tile.start, tile.size)
    weight = get_at(ops.reshape(weights, (-1,)), own)
    weight = ops.where(tile.own, weight, ops.zeros_like(weight))
    return get_at(x, own // weights.shape[1]), ops.expand_dims(weight, -1)


def _sum_over_pairs(
    rows: Annotated[Tensor, "R D"], inverse_sort: Annotated[Tensor, "N K"]
) -> Annotated[Tensor, "N D"]:
    """Sums in float32, one expression that reads the rows where they lie."""
    chosen = range(inverse_sort.shape[1])
    terms = (ops.cast(get_at(rows, inverse_sort[:, k]), "float32") for k in chosen)
    return ops.cast(functools.reduce(ops.add, terms), rows.dtype)
