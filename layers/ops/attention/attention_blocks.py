"""How attention is cut: blocks of queries, blocks of keys, and the tile where two of them meet.

Shapes: B batch, G key heads, R query heads per key head, C queries of a block (`block_q`), N blocks
of queries, M blocks of keys, S keys.
"""

from typing import Annotated, Any, NamedTuple

from keras import ops

from ..backend.loops import get_rows
from ..backend.platform import BACKEND
from ..padding import to_blocks
from ..tensor_types import Tensor

FAR = -1e30  # less than any score, but differences of it are not NaN
LEAST, MOST = -(2**31), 2**31 - 1  # of int32


class Queries(NamedTuple):
    """One block of queries, or with a leading axis N all of them.

    Before they are cut, they are as `attention` was given them.

    Attributes:
        query: `(B, C, G, R, D)`.
        limits: `(B, C)` int32, the last key that a token sees.
        segments: `(B, C)` int32.
        seed: `(2,)` integers, the seed of the block's first tile, or `None` without dropout.
    """

    query: Tensor
    limits: Tensor
    segments: Tensor
    seed: Tensor | None = None


class Keys(NamedTuple):
    """All keys and their values; mask and segments may be `None` as they were given.

    Attributes:
        key: `(B, S, G, D)`.
        value: `(B, S, G, D)`.
        mask: `(B, S)` bool, true at keys that may be seen.
        segments: `(B, S)` int32.
    """

    key: Tensor
    value: Tensor
    mask: Tensor
    segments: Tensor


class Tile(NamedTuple):
    """One block of keys as a block of queries sees it.

    Attributes:
        key: `(B, G, block_kv, D)`.
        value: `(B, G, block_kv, D)`.
        seen: `(B, 1, R C, block_kv)` bool, which queries see which keys.
        start: `()` int32, number of the first key.
    """

    key: Tensor
    value: Tensor
    seen: Tensor
    start: Tensor


def meetings(
    limits: Annotated[Tensor, "N B C"],
    segments: Annotated[Tensor, "N B C"],
    keys: Keys,
    block_kv: int,
) -> Annotated[Tensor, "N M B"]:
    """Whether a query of a block may see a key of a block; what is false need not be read.

    Blocks of keys behind every limit, those without a key that may be seen, and those whose
    segments lie apart from the queries' are met by no query.
    """
    sees, seen = limits >= 0, to_blocks(keys.mask, block_kv)
    number = ops.arange(ops.shape(keys.mask)[1], dtype="int32")[None]
    first, _ = _bounds(to_blocks(ops.broadcast_to(number, ops.shape(keys.mask)), block_kv), seen)
    _, last = _bounds(limits, sees)
    own, others = _bounds(segments, sees), _bounds(to_blocks(keys.segments, block_kv), seen)
    (lowest, highest), last = (x[:, None] for x in own), last[:, None]
    return (first <= last) & (lowest <= others[1]) & (others[0] <= highest)


def span(meets: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The first place along `axis` that is met, and the one behind the last."""
    count = ops.shape(meets)[axis]
    number = ops.arange(count, dtype="int32")
    number = ops.reshape(number, [-1 if i == axis else 1 for i in range(len(meets.shape))])
    firsts = ops.min(ops.where(meets, number, count), axis=axis)
    return firsts, ops.max(ops.where(meets, number + 1, 0), axis=axis)


def _bounds(
    x: Annotated[Tensor, "N B C"], there: Annotated[Tensor, "N B C"]
) -> tuple[Annotated[Tensor, "N B"], Annotated[Tensor, "N B"]]:
    """The least and the greatest of every block among those that are there."""
    least = ops.min(ops.where(there, x, MOST), axis=-1)
    return least, ops.max(ops.where(there, x, LEAST), axis=-1)


def tile_of(queries: Queries, keys: Keys, number: Tensor, block_kv: int) -> Tile:
    """What a block of queries sees of the block `number` of the keys."""
    nominal = number * block_kv
    # The last block ends with the last key; what it shares with the one before is not seen again.
    start = ops.minimum(nominal, ops.shape(keys.key)[1] - block_kv)
    key, value = (ops.swapaxes(get_rows(x, start, block_kv, axis=1), 1, 2) for x in keys[:2])
    mask, segments = (get_rows(x, start, block_kv, axis=1)[:, None] for x in keys[2:])
    index = start + ops.arange(block_kv, dtype="int32")
    seen = mask & (index >= nominal) & (index <= queries.limits[..., None])
    seen = seen & (segments == queries.segments[..., None])  # (B, C, block_kv)
    repeats = queries.query.shape[3]
    return Tile(key, value, ops.tile(seen, (1, repeats, 1))[:, None], start)


def scores_of(query: Tensor, tile: Tile, scale: float) -> Annotated[Tensor, "B G R*C block_kv"]:
    scores = product(query, ops.swapaxes(tile.key, -1, -2)) * scale
    return ops.where(tile.seen, scores, FAR)


def product(a: Annotated[Tensor, "... M K"], b: Annotated[Tensor, "... K N"]) -> Tensor:
    """`a @ b` in float32, whatever the dtype of its factors: bfloat16 rounds 39.1 to 39."""
    if BACKEND == "jax":
        import jax

        return jax.numpy.matmul(a, b, preferred_element_type="float32")
    return ops.cast(a, "float32") @ ops.cast(b, "float32")


def by_head(x: Annotated[Tensor, "B C G R D"]) -> Annotated[Tensor, "B G R*C D"]:
    batch, block_q, groups, repeats, dim = ops.shape(x)
    return ops.reshape(ops.transpose(x, (0, 2, 3, 1, 4)), (batch, groups, repeats * block_q, dim))


def by_token(x: Annotated[Tensor, "B G R*C D"], shape: Any) -> Annotated[Tensor, "B C G R D"]:
    batch, block_q, groups, repeats, dim = shape
    x = ops.reshape(x, (batch, groups, repeats, block_q, dim))
    return ops.transpose(x, (0, 3, 1, 2, 4))
