"""Walking through grouped rows in tiles of a few static sizes, so that work follows the rows.

A group of n rows is cut into full tiles of the largest size and one tile, of the smallest size
that holds them, for the rest. A product has a fixed price (its weights are read and packed), so
few tiles are better than many, and a well-fitting last one is better than padding: on two CPU
cores a tile cost as much as 25 of its rows. The loops run over the tiles in use: their trip counts
are data, a group without rows costs nothing.
"""

import math
from typing import NamedTuple

import numpy as np
from keras import ops

from ..backend.loops import get_row, get_rows, set_rows

FRACTIONS = (0.25, 0.5, 1.0, 1.25)  # of the mean group
LARGEST_MEAN = 128
UNKNOWN_ROWS = (8, 32, 128)


class Tile(NamedTuple):
    """Rows `start` to `start + size` of the group `group`; `own` `(size,)` says which are its own.

    A tile may reach past the end of its group, `own` is false there.
    """

    size: int
    group: object
    start: object
    own: object


def tile_sizes(rows, groups):
    """Static tile sizes, ascending, for `rows` rows in `groups` groups."""
    if rows is None:
        return UNKNOWN_ROWS
    mean = min(rows / groups, LARGEST_MEAN)
    sizes = {8 * math.ceil(fraction * mean / 8) for fraction in FRACTIONS}
    if rows <= 2 * groups:  # decoding: most groups in use have a row or two
        sizes |= {2}
    return tuple(sorted(size for size in sizes if size <= 8 * math.ceil(max(rows, 1) / 8)))


class Tiles:
    """The tiles of one grouping, `group_sizes (E,)` int32 of rows that stand group by group."""

    def __init__(self, rows, group_sizes, sizes):
        self.sizes = sizes
        largest = sizes[-1]
        self.ends = ops.cumsum(group_sizes)
        starts = self.ends - group_sizes
        full = group_sizes // largest
        self.rest_starts = starts + full * largest
        rest = group_sizes - full * largest
        kind = ops.searchsorted(ops.convert_to_tensor(np.array(sizes, "int32")), rest, side="left")
        kind = ops.where(rest == 0, len(sizes), ops.cast(kind, "int32"))
        self.by_kind = ops.cast(ops.argsort(kind), "int32")
        kinds = ops.arange(len(sizes) + 1, dtype="int32")
        self.bounds = ops.searchsorted(ops.take(kind, self.by_kind), kinds, side="left")
        self.bounds = ops.cast(self.bounds, "int32")
        self.full_ends = ops.cumsum(full)
        self.full_starts = starts - (self.full_ends - full) * largest
        most = rows // largest
        self.no_full = isinstance(most, int) and most == 0
        numbers = ops.arange(most, dtype="int32")
        self.full_groups = ops.cast(
            ops.searchsorted(self.full_ends, numbers, side="right"), "int32"
        )

    def loop(self, body, carry):
        """Runs `carry = body(tile, carry)` over all tiles, in any order."""
        largest = self.sizes[-1]

        def full(number, carry):
            group = get_row(self.full_groups, number)
            start = get_row(self.full_starts, group) + number * largest
            return body(self._tile(largest, group, start), carry)

        def rest(size):
            def step(number, carry):
                group = get_row(self.by_kind, number)
                return body(self._tile(size, group, get_row(self.rest_starts, group)), carry)

            return step

        if not self.no_full:
            carry = ops.fori_loop(0, self.full_ends[-1], full, carry)
        for kind, size in enumerate(self.sizes):
            carry = ops.fori_loop(self.bounds[kind], self.bounds[kind + 1], rest(size), carry)
        return carry

    def _tile(self, size, group, start):
        own = ops.arange(size, dtype="int32") < get_row(self.ends, group) - start
        return Tile(size, group, start, own)

    def pad(self, rows):
        """Room behind the rows for a tile that reaches past the last of them."""
        return ops.concatenate([rows, ops.zeros((self.sizes[-1], *rows.shape[1:]), rows.dtype)])


def read(rows, tile):
    """The rows of a tile, zeros where they are not its own."""
    own = ops.reshape(tile.own, (-1,) + (1,) * (len(rows.shape) - 1))
    found = get_rows(rows, tile.start, tile.size)
    return ops.where(own, found, ops.zeros_like(found))


def write(buffer, tile, rows):
    """`buffer` with the tile's own rows replaced."""
    own = ops.reshape(tile.own, (-1,) + (1,) * (len(rows.shape) - 1))
    old = get_rows(buffer, tile.start, tile.size)
    return set_rows(buffer, tile.start, ops.where(own, rows, old))
