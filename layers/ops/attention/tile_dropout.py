"""Dropout of attention weights tile by tile, with masks that the backward pass draws again.

A tile is what a block of queries has to do with a block of keys. The tiles are numbered, query
block by query block, and a tile's seed is the call's seed with its number added to the first
entry, times a large odd factor: calls differ in the second entry, so no two tiles share a seed.

    as_seed        the seed of a call
    block_seeds    a seed for every block of queries
    keep_factor    what the weights of a tile are multiplied with
"""

from typing import Annotated, Any

import keras
from keras import ops

from ..backend.seeds import DrawnSeed
from ..checks import as_array, require_shape
from ..tensor_types import Tensor

SPREAD = 0x61C88647  # 2^32 divided by the golden ratio squared, to the next odd number


def as_seed(name: str, seed: Any) -> Annotated[Tensor, "2"]:
    """Two integers as uint32, as JAX takes them; `ValueError` for anything else."""
    seed = as_array(name, seed)
    require_shape(name, seed, (2,))
    if "int" not in keras.backend.standardize_dtype(seed.dtype):
        raise ValueError(f"`{name}` must be integers. Received: {name}.dtype={seed.dtype}")
    return ops.cast(seed, "uint32")


def block_seeds(
    seed: Annotated[Tensor, "2"], count: int | Tensor, tiles_per_block: int | Tensor
) -> Annotated[Tensor, "N 2"]:
    """The seeds of the first tiles of `count` blocks of queries."""
    return _tile_seed(seed, ops.arange(count, dtype="int32")[:, None] * tiles_per_block)


def keep_factor(
    shape: Any, seed: Annotated[Tensor, "2"], number: Tensor, dropout: float
) -> Annotated[Tensor, "shape"]:
    """0 with probability `dropout`, else `1 / (1 - dropout)`, for the weights of a tile.

    `seed` is that of the first tile of the block of queries, `number` says which one this is.
    """
    drawn = keras.random.uniform(shape, dtype="float32", seed=DrawnSeed(_tile_seed(seed, number)))
    return ops.cast(drawn >= dropout, "float32") / (1.0 - dropout)


def _tile_seed(seed: Tensor, number: Tensor) -> Tensor:
    """The seed of the tile that stands `number` tiles behind the one that has `seed`."""
    offset = ops.cast(number, seed.dtype) * SPREAD
    return seed + offset * ops.cast(ops.convert_to_tensor([1, 0], "int32"), seed.dtype)
