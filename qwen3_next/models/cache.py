"""What a model keeps of the tokens it has read, so that the next ones need not read them again."""

from typing import Annotated, Any, NamedTuple

from keras import ops, tree

from qwen3_next.config.validation import Rule, require
from qwen3_next.layers import AttentionCache, ThinkLoopCache
from qwen3_next.layers.ops.backend.loops import scatter_rows
from qwen3_next.layers.ops.sequence import valid_lengths
from qwen3_next.layers.ops.tensor_types import Tensor


class Cache(NamedTuple):
    """Fixed-size buffers that survive compilation.

    Attributes:
        lengths: `(B,)` int32, tokens of every row.
        blocks: One cache per block of the schedule: the `AttentionCache` or `DeltaNetCache` of a
            layer, or the `ThinkLoopCache` of a loop.
    """

    lengths: Tensor
    blocks: tuple

    @property
    def layers(self) -> tuple:
        """`layers[layer][pass]`, the cache of every pass: a layer that runs several times has one
        for each, never a shared one."""
        found: list[tuple] = []
        for block in self.blocks:
            found += block.passes() if isinstance(block, ThinkLoopCache) else [(block,)]
        return tuple(found)

    @property
    def loop(self) -> ThinkLoopCache | None:
        """That of the think loop, `None` without one."""
        return next((block for block in self.blocks if isinstance(block, ThinkLoopCache)), None)

    @property
    def think_iterations(self) -> int | None:
        """Iterations of the loop that it was made for, `None` without a loop."""
        return None if self.loop is None else self.loop.iterations

    @property
    def route(self) -> Tensor | None:
        """`(B, L)` int32, how often each of L think layers runs for a row; `None` unrouted."""
        loop = self.loop
        return None if loop is None or isinstance(loop.route, tuple) else loop.route[0]

    @property
    def branch(self) -> Tensor | None:
        """`(B, k)` int32, the LoRA expert of a row in each iteration, -1 for none; `None` where
        rows choose no experts."""
        loop = self.loop
        if loop is None or isinstance(loop.branch, tuple):
            return None
        return ops.transpose(loop.branch)


_CACHE = Rule("a `Cache` from `init_cache`", lambda value: isinstance(value, Cache))


def take_rows(cache: Cache, rows: Annotated[Tensor, "R"]) -> Cache:
    """The cache of some rows alone."""
    return _by_axis(lambda axis, x: ops.take(x, rows, axis), cache)


def set_rows(cache: Cache, rows: Annotated[Tensor, "R"], part: Cache) -> Cache:
    """The cache with `part` in some of its rows, each of which is named once."""

    def put(axis, x, own):
        moved = scatter_rows(ops.moveaxis(x, axis, 0), rows, ops.moveaxis(own, axis, 0))
        return ops.moveaxis(moved, 0, axis)

    return _by_axis(put, cache, part)


def _by_axis(function, *caches):
    """Applies `function(axis of the rows, *buffers)`; buffers of a loop begin with iterations."""

    def apply(axis, *parts):
        return tree.map_structure(lambda *x: function(axis, *x), *parts)

    lengths = apply(0, *(cache.lengths for cache in caches))
    blocks = zip(*(cache.blocks for cache in caches))
    return Cache(lengths, tuple(apply(int(isinstance(b[0], ThinkLoopCache)), *b) for b in blocks))


class CacheUpdate(NamedTuple):
    """What a replayable pass would write: `Qwen3NextBackbone.commit` makes a `Cache` of it.

    Attributes:
        blocks: One update per block of the schedule: an `AttentionUpdate`, a `DeltaNetUpdate` or a
            `ThinkLoopUpdate`.
    """

    blocks: tuple


def check_cache(cache: Any, batch_size: int | None) -> None:
    """Raises `ValueError` for what is no `Cache`, or one of another number of rows."""
    require(_CACHE, "cache", cache)
    rows = cache.lengths.shape[0]
    if None not in (rows, batch_size) and rows != batch_size:
        raise ValueError(
            f"The cache must have as many rows as there are sequences, {batch_size}. "
            f"Received: cache.lengths.shape={tuple(cache.lengths.shape)}"
        )


def check_capacity(cache: Cache, padding_mask: Tensor) -> None:
    """Raises `ValueError` if the attention caches cannot hold the new tokens as well."""
    check_cache(cache, padding_mask.shape[0])
    found: list[Any] = []
    for block in cache.blocks:  # as they are: slices of a loop's would be copies
        found += block.layers if isinstance(block, ThinkLoopCache) else [block]
    capacities = [layer.keys.shape[-3] for layer in found if isinstance(layer, AttentionCache)]
    if not capacities:
        return
    needed = int(ops.max(cache.lengths + valid_lengths(padding_mask)))
    if needed > min(capacities):
        raise ValueError(
            f"The cache has room for {min(capacities)} tokens per row (`max_length` of "
            f"`init_cache`). Received: {needed} tokens with the new ones"
        )
