"""Walking through grouped rows in tiles of a few static sizes, so that work follows the rows.

A group of n rows is cut into full tiles of the largest size and one last tile, of the smallest size
that holds them, for the rest. A product has a fixed price (its weights are read and packed), so
few tiles are better than many, and a well-fitting last one is better than padding: on two CPU
cores a tile cost as much as 25 of its rows. The loops run over the tiles in use: their trip counts
are data, a group without rows costs nothing.

For instance, groups of [5, 0, 19] rows and the sizes (8, 16) make three tiles:

    full, size 16    group 2    rows  5 to 21, all its own
    last, size 8     group 0    rows  0 to 8, of which the first 5 are its own
    last, size 8     group 2    rows 21 to 29, of which the first 3 are its own

    full_count 1, full_groups [2], full_offsets [0, 5, 5]
    last_groups [0, 2, 1], last_bounds [0, 2, 2], last_starts [0, 5, 21]

Entry points, in the order of use:

    tile_sizes             static sizes that suit a number of rows and groups
    plan_tiles             which tiles there are
    pad_for_tiles          room for a tile that reaches past the last row
    for_each_tile          the loop over them
    read_tile, write_tile  a tile's own rows
    add_for_group          sums over the tiles of a group
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import numpy as np
from keras import ops

from ..backend.loops import add_to_row, get_row, get_rows, set_row, set_rows
from ..padding import pad_end
from ..tensor_types import Tensor

FRACTIONS = (0.25, 0.5, 1.0, 1.125, 1.25)  # of the mean group
LARGEST_MEAN = 256  # larger tiles read weights less often; beyond, little was gained
UNKNOWN_ROWS = (8, 32, 128)


class Tile(NamedTuple):
    """Rows `start` to `start + size` of a group; the tile may reach past the group's end.

    Attributes:
        size: int.
        group: `()` int32.
        start: `()` int32.
        own: `(size,)` bool, false at rows past the end of the group.
        first: bool, no other tile of the group can have had its turn.
    """

    size: int
    group: Tensor
    start: Tensor
    own: Tensor
    first: bool


class TilePlan(NamedTuple):
    """The tiles of R rows in E groups: lists of full tiles and of last tiles.

    Attributes:
        sizes: ascending ints, the static sizes; L is the largest.
        group_ends: `(E,)` int32, where every group ends.
        full_count: `()` int32, number of tiles of size L that are full.
        full_groups: `(R // L,)` int32, their groups; entries from `full_count` on mean nothing.
        full_offsets: `(E,)` int32; full tile n, of group e, starts at row `full_offsets[e] + n L`.
        last_groups: `(E,)` int32, the groups, sorted by the size of their last tile.
        last_bounds: `(len(sizes) + 1,)` int32; the last tiles of size `sizes[i]` are numbers
            `last_bounds[i]` to `last_bounds[i + 1]` of `last_groups`. Groups without one stand
            behind all others.
        last_starts: `(E,)` int32, where the last tile of every group starts.
    """

    sizes: tuple[int, ...]
    group_ends: Annotated[Tensor, "E"]
    full_count: Tensor
    full_groups: Tensor
    full_offsets: Annotated[Tensor, "E"]
    last_groups: Annotated[Tensor, "E"]
    last_bounds: Tensor
    last_starts: Annotated[Tensor, "E"]


def tile_sizes(rows: int | None, groups: int) -> tuple[int, ...]:
    """Static tile sizes, ascending, for `rows` rows in `groups` groups."""
    if rows is None:
        return UNKNOWN_ROWS
    mean = min(rows / groups, LARGEST_MEAN)
    sizes = {8 * math.ceil(fraction * mean / 8) for fraction in FRACTIONS}
    if rows <= 2 * groups:  # decoding: most groups in use have a row or two
        sizes |= {2}
    return tuple(sorted(size for size in sizes if size <= 8 * math.ceil(max(rows, 1) / 8)))


def plan_tiles(
    rows: int | Tensor, group_sizes: Annotated[Tensor, "E"], sizes: tuple[int, ...]
) -> TilePlan:
    """Cuts `rows` rows, which stand group by group, into tiles of the given sizes."""
    largest = sizes[-1]
    group_ends = ops.cumsum(group_sizes)
    group_starts = group_ends - group_sizes
    full = group_sizes // largest  # full tiles of every group
    full_ends = ops.cumsum(full)
    numbers = ops.arange(rows // largest, dtype="int32")

    rest = group_sizes - full * largest
    choices = ops.convert_to_tensor(np.array(sizes, "int32"))
    choice = ops.cast(ops.searchsorted(choices, rest, side="left"), "int32")
    choice = ops.where(rest == 0, len(sizes), choice)
    last_groups = ops.cast(ops.argsort(choice), "int32")
    choices = ops.arange(len(sizes) + 1, dtype="int32")
    last_bounds = ops.searchsorted(ops.take(choice, last_groups), choices, side="left")
    return TilePlan(
        sizes=sizes,
        group_ends=group_ends,
        full_count=full_ends[-1],
        full_groups=ops.cast(ops.searchsorted(full_ends, numbers, side="right"), "int32"),
        full_offsets=group_starts - (full_ends - full) * largest,
        last_groups=last_groups,
        last_bounds=ops.cast(last_bounds, "int32"),
        last_starts=group_starts + full * largest,
    )


def pad_for_tiles(rows: Annotated[Tensor, "R ..."], plan: TilePlan) -> Tensor:
    """`rows` with room behind them for a tile that reaches past the last."""
    return pad_end(rows, plan.sizes[-1])


def for_each_tile(plan: TilePlan, body: Callable[[Tile, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(tile, carry)` over all tiles: the last ones of the groups come first."""

    def run(size, group, start, carry, first):
        own = ops.arange(size, dtype="int32") < get_row(plan.group_ends, group) - start
        return body(Tile(size, group, start, own, first), carry)

    def last(size, number, carry):
        group = get_row(plan.last_groups, number)
        return run(size, group, get_row(plan.last_starts, group), carry, first=True)

    def full(number, carry):
        group = get_row(plan.full_groups, number)
        start = get_row(plan.full_offsets, group) + number * plan.sizes[-1]
        return run(plan.sizes[-1], group, start, carry, first=False)

    for i, size in enumerate(plan.sizes):
        step = functools.partial(last, size)
        carry = ops.fori_loop(plan.last_bounds[i], plan.last_bounds[i + 1], step, carry)
    if plan.full_groups.shape[0] != 0:
        carry = ops.fori_loop(0, plan.full_count, full, carry)
    return carry


def add_for_group(
    buffer: Annotated[Tensor, "E ..."], tile: Tile, found: Annotated[Tensor, "..."]
) -> Annotated[Tensor, "E ..."]:
    """`buffer`, of zeros at the start, with what a tile has found for its group added."""
    if tile.first:
        return set_row(buffer, tile.group, ops.cast(found, buffer.dtype))
    return add_to_row(buffer, tile.group, found)


def read_tile(rows: Annotated[Tensor, "R ..."], tile: Tile) -> Annotated[Tensor, "size ..."]:
    """The rows of a tile, zeros where they are not its own."""
    own = ops.reshape(tile.own, (-1,) + (1,) * (len(rows.shape) - 1))
    found = get_rows(rows, tile.start, tile.size)
    return ops.where(own, found, ops.zeros_like(found))


def write_tile(
    buffer: Annotated[Tensor, "R ..."], tile: Tile, rows: Annotated[Tensor, "size ..."]
) -> Annotated[Tensor, "R ..."]:
    """`buffer` with the tile's own rows replaced."""
    own = ops.reshape(tile.own, (-1,) + (1,) * (len(rows.shape) - 1))
    old = get_rows(buffer, tile.start, tile.size)
    return set_rows(buffer, tile.start, ops.where(own, rows, old))
