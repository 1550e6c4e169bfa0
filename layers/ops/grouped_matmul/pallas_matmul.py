"""The grouped matrix product as kernels of a GPU, written in Pallas for JAX.

A group of n rows is cut into ceil(n / S) tiles of S rows; the rows behind the last group make tiles
too, which are zeros. One program multiplies a tile with a block of its group's matrix, column
blocks of one tile beside each other, so that tiles of one group find its matrix in the cache:

    forward     out[tile] = rows[tile] @ weights[e]
    backward    d_rows[tile] = d_out[tile] @ weights[e]^T
                d_weights[e] = rows[e]^T @ d_out[e]      one program for a block of a matrix

    times_weights, of_weights    the two kernels, in blocks of any size

No kernel reads a matrix of a group without rows, nor forms a tensor beyond its results. Sums are
float32. Triton compiles the kernels; on a CPU Pallas interprets them, for tests.

Shapes: R rows, E groups, T tiles, S rows of a tile.
"""

import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ..backend.platform import run_kernel
from ..tensor_types import Tensor

TILE_ROWS = (16, 32, 64, 128)


class Blocks(NamedTuple):
    """What a program holds: `rows x columns` of a result, from steps of `inner` products."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By the rows of a tile. Those of 64 and 128 and of `OF_WEIGHTS` are among the fastest that were
# tried, see `benchmarks/results/gpu`; those of 16 were as fast as others, those of 32 are untried.
OF_ROWS = {
    16: Blocks(16, 64, 64, warps=4, stages=5),
    32: Blocks(32, 128, 64, warps=4, stages=4),
    64: Blocks(64, 128, 64, warps=4, stages=4),
    128: Blocks(128, 128, 64, warps=8, stages=3),
}
OF_WEIGHTS = Blocks(128, 128, 32, warps=4, stages=3)


class Tiles(NamedTuple):
    """Tiles of rows, int32 `(T,)`: the group, E for rows of none, and the rows' bounds."""

    group: Annotated[Tensor, "T"]
    start: Annotated[Tensor, "T"]
    end: Annotated[Tensor, "T"]


def forward(
    rows: Annotated[Tensor, "R D"],
    weights: Annotated[Tensor, "E D F"],
    group_sizes: Annotated[Tensor, "E"],
) -> Annotated[Tensor, "R F"]:
    """Every row times the weights of its group."""
    return times_weights(rows, weights, group_sizes, turned=False)


def backward(
    rows: Annotated[Tensor, "R D"],
    weights: Annotated[Tensor, "E D F"],
    group_sizes: Annotated[Tensor, "E"],
    d_outputs: Annotated[Tensor, "R F"],
) -> tuple[Annotated[Tensor, "R D"], Annotated[Tensor, "E D F"]]:
    """Gradients of `rows` and `weights`."""
    d_rows = times_weights(d_outputs, weights, group_sizes, turned=True)
    return d_rows, of_weights(rows, d_outputs, group_sizes, weights.dtype)


def times_weights(rows, weights, group_sizes, turned, blocks=None):
    """`rows[r] @ weights[e]` or, turned, `rows[r] @ weights[e]^T`."""
    count, inner = rows.shape
    groups, columns = len(weights), weights.shape[1 if turned else 2]
    shape = jax.ShapeDtypeStruct((count, columns), rows.dtype)
    if 0 in (count, groups, inner, columns):
        return jnp.zeros(shape.shape, shape.dtype)
    blocks = blocks or OF_ROWS[_tile_rows(count, groups)]
    tiles = _tiles(group_sizes, count, blocks.rows)
    parts = pl.cdiv(columns, blocks.columns)
    # One axis, of which there may be more programs than of the others.
    grid = (len(tiles.group) * parts,)
    kernel = functools.partial(_tile_kernel, blocks=blocks, parts=parts, turned=turned)
    return _run(kernel, grid, blocks, shape, *tiles, rows, weights)


def of_weights(rows, d_outputs, group_sizes, dtype, blocks=OF_WEIGHTS):
    """`rows[e]^T @ d_outputs[e]` for every group e."""
    groups = len(group_sizes)
    shape = jax.ShapeDtypeStruct((groups, rows.shape[1], d_outputs.shape[1]), dtype)
    if 0 in (len(rows), *shape.shape):
        return jnp.zeros(shape.shape, shape.dtype)
    ends = jnp.cumsum(group_sizes, dtype="int32")
    grid = pl.cdiv(shape.shape[2], blocks.columns), pl.cdiv(shape.shape[1], blocks.rows), groups
    kernel = functools.partial(_weights_kernel, blocks=blocks)
    return _run(kernel, grid, blocks, shape, ends - group_sizes, ends, rows, d_outputs)


def _tile_rows(count: int, groups: int) -> int:
    """The rows of a tile: about as many as a group has, that few are empty."""
    mean = count / groups
    return next((size for size in TILE_ROWS if mean <= size), TILE_ROWS[-1])


def _tiles(group_sizes: Annotated[Tensor, "E"], count: int, size: int) -> Tiles:
    """As many tiles as there can be; those that are not needed have no rows."""
    groups = len(group_sizes)
    rest = count - jnp.sum(group_sizes, dtype="int32")
    sizes = jnp.append(group_sizes, rest).astype("int32")
    number = jnp.arange(count // size + min(groups + 1, count), dtype="int32")
    of_group = pl.cdiv(sizes, size)
    tile_ends, ends = jnp.cumsum(of_group), jnp.cumsum(sizes)
    # A search is a loop of many small programs; to compare all with all takes one.
    group = jnp.sum(tile_ends[:-1] <= number[:, None], axis=1, dtype="int32")
    before = number - (tile_ends - of_group)[group]
    start = jnp.minimum((ends - sizes)[group] + before * size, count)
    return Tiles(group, start.astype("int32"), ends[group].astype("int32"))


def _tile_kernel(groups, starts, ends, rows, weights, outputs, *, blocks, parts, turned):
    program = pl.program_id(0)
    number, part = jax.lax.div(program, parts), jax.lax.rem(program, parts)
    group, end = groups[number], ends[number]
    row = starts[number] + jnp.arange(blocks.rows)
    column = part * blocks.columns + jnp.arange(blocks.columns)
    has_row, has_column = row < end, column < outputs.shape[1]
    count = rows.shape[1]

    def step(i, total):
        inner = i * blocks.inner + jnp.arange(blocks.inner)
        # All or none of a step's products are there where their number divides evenly.
        known = inner < (count if count % blocks.inner else (i + 1) * blocks.inner)
        left = _load(rows, (row, inner), (has_row, known))
        if turned:
            right = _load(weights, (column, inner), (has_column, known), group).T
        else:
            right = _load(weights, (inner, column), (known, has_column), group)
        return total + jnp.dot(left, right, preferred_element_type="float32")

    # Rows of no group are zeros. Of a `where` of two numbers Pallas would make a bound of one bit.
    steps = (group < len(weights)).astype("int32") * pl.cdiv(count, blocks.inner)
    total = jnp.zeros((blocks.rows, blocks.columns), "float32")
    total = jax.lax.fori_loop(0, steps, step, total)
    _store(outputs, (row, column), (has_row, has_column), total)


def _weights_kernel(starts, ends, rows, d_outputs, d_weights, *, blocks):
    group = pl.program_id(2)
    start, end = starts[group], ends[group]
    above = pl.program_id(1) * blocks.rows + jnp.arange(blocks.rows)
    column = pl.program_id(0) * blocks.columns + jnp.arange(blocks.columns)
    has_above, has_column = above < rows.shape[1], column < d_outputs.shape[1]

    def step(i, total):
        row = start + i * blocks.inner + jnp.arange(blocks.inner)
        left = _load(rows, (row, above), (row < end, has_above))
        right = _load(d_outputs, (row, column), (row < end, has_column))
        return total + jnp.dot(left.T, right, preferred_element_type="float32")

    total = jnp.zeros((blocks.rows, blocks.columns), "float32")
    total = jax.lax.fori_loop(0, pl.cdiv(end - start, blocks.inner), step, total)
    _store(d_weights, (above, column), (has_above, has_column), total, group)


def _load(ref, places, there, *before):
    """`ref[*before, *places]` as a matrix, 0 where one of `there` is false."""
    at, mask = _select(ref, places, there, before)
    return triton.load(at, mask=mask, other=0.0)


def _store(ref, places, there, values, *before):
    at, mask = _select(ref, places, there, before)
    triton.store(at, values.astype(ref.dtype), mask=mask)


def _select(ref, places, there, before):
    (first, second), (has_first, has_second) = places, there
    at = ref.at[(*before, first[:, None], second[None, :])]
    return at, has_first[:, None] & has_second[None, :]


def _run(kernel, grid, blocks, shape, *inputs):
    options = triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    call = functools.partial(
        pl.pallas_call, kernel, shape, grid=grid, compiler_params=options, name=kernel.func.__name__
    )
    return run_kernel(lambda *inputs, interpret: call(interpret=interpret)(*inputs), *inputs)
