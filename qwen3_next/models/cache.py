"""What a model keeps of the tokens it has read, so that the next ones need not read them again."""

from typing import NamedTuple

from keras import ops

from qwen3_next.layers import AttentionCache
from qwen3_next.layers.ops.sequence import valid_lengths
from qwen3_next.layers.ops.tensor_types import Tensor


class Cache(NamedTuple):
    """Fixed-size buffers that survive compilation.

    Attributes:
        lengths: `(B,)` int32, tokens of every row.
        layers: `layers[layer][pass]`, the layer cache of a mixer, an `AttentionCache` or a
            `DeltaNetCache`. A layer that runs several times has one for each pass, never a shared
            one.
    """

    lengths: Tensor
    layers: tuple


class CacheUpdate(NamedTuple):
    """What a replayable pass would write: `Qwen3NextBackbone.commit` makes a `Cache` of it.

    Attributes:
        layers: `layers[layer][pass]`, an `AttentionUpdate` or a `DeltaNetUpdate`.
    """

    layers: tuple


def check_capacity(cache: Cache, padding_mask: Tensor) -> None:
    """Raises `ValueError` if the attention caches cannot hold the new tokens as well."""
    found = [layer for passes in cache.layers for layer in passes]
    capacities = [layer.keys.shape[1] for layer in found if isinstance(layer, AttentionCache)]
    if not capacities:
        return
    needed = int(ops.max(cache.lengths + valid_lengths(padding_mask)))
    if needed > min(capacities):
        raise ValueError(
            f"The cache has room for {min(capacities)} tokens per row (`max_length` of "
            f"`init_cache`). Received: {needed} tokens with the new ones"
        )
