"""How the heads of attention become those of a Gated DeltaNet.

    queries  H -> K   mean, or first, of the H / K query heads that share a key head
    keys     G -> K   every key head copied K / G times, or the mean of G / K of them
    values   G -> V   every value head copied V / G times
    outputs  H -> V   output projections of the H / V query heads that share a value head, summed

The source has H query and G key and value heads, the Gated DeltaNet K key and V value heads. Heads
are copied whole: head h of the source reads key head `h // (H / G)`, so copies stand side by side.
All arrays have their heads on an axis of their own.
"""

from typing import Annotated, NamedTuple

import numpy as np


class HeadCounts(NamedTuple):
    """Heads of both sides.

    Attributes:
        queries: H, query heads of the source.
        groups: G, its key and value heads.
        key_heads: K, key heads of the Gated DeltaNet.
        value_heads: V, its value heads.
    """

    queries: int
    groups: int
    key_heads: int
    value_heads: int


def check_heads(counts: HeadCounts) -> None:
    """Raises `ValueError` for head counts that cannot be mapped."""
    queries, groups, keys, values = counts
    if queries % values or values % groups:
        raise ValueError(
            f"`n_heads` must be a divisor of the source's {queries} query heads and a multiple of "
            f"its {groups} key and value heads. Received: n_heads={values}"
        )
    if values % keys or (keys % groups and groups % keys):
        raise ValueError(
            f"`n_kv_heads` must be a divisor of `n_heads`={values}, and a multiple or a divisor of "
            f"the source's {groups} key and value heads. Received: n_kv_heads={keys}"
        )


def reduce_heads(
    kernel: Annotated[np.ndarray, "D H K"], heads: int, how: str = "mean"
) -> Annotated[np.ndarray, "D heads K"]:
    """The mean, or the first, of neighbouring heads."""
    width, count, dim = kernel.shape
    grouped = kernel.reshape(width, heads, count // heads, dim)
    return grouped[:, :, 0] if how == "first" else grouped.mean(axis=2, dtype=kernel.dtype)


def expand_heads(
    kernel: Annotated[np.ndarray, "D G K"], heads: int
) -> Annotated[np.ndarray, "D heads K"]:
    """Every head as often as it takes, copies side by side; the mean of some for fewer heads."""
    if kernel.shape[1] > heads:
        return reduce_heads(kernel, heads)
    return np.repeat(kernel, heads // kernel.shape[1], axis=1)


def sum_heads(
    kernel: Annotated[np.ndarray, "H K D"], heads: int
) -> Annotated[np.ndarray, "heads K D"]:
    """Sums of the output projections of neighbouring heads."""
    count, dim, width = kernel.shape
    grouped = kernel.reshape(heads, count // heads, dim, width)
    return grouped.sum(axis=1, dtype=kernel.dtype)


def by_key_head(
    parts: list[Annotated[np.ndarray, "D heads K"]], key_heads: int
) -> Annotated[np.ndarray, "D K_heads C"]:
    """Kernels of queries, keys, values, ... side by side for every key head, as a Gated DeltaNet
    has them: the heads that belong to a key head follow one another."""
    width = parts[0].shape[0]
    return np.concatenate([part.reshape(width, key_heads, -1) for part in parts], axis=-1)
