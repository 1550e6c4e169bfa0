"""Causal grouped-query attention that never holds a (T, S) matrix.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s      over the keys s that token t may see

Public: `attention`. The blocks' maths is in `chunked_attention`, that of a GPU's kernels in
`pallas_attention`.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from keras import ops

from qwen3_next.config.validation import DROPOUT_RATE, OPTIONAL_NUMBER, require

from ..backend.autodiff import Shards, custom_gradient
from ..backend.platform import choose, has_pallas, platform, require_pallas
from ..backend.sharding import Devices, devices, spec
from ..checks import as_floats, as_mask, exact_int32, if_given, require_shape, require_tokens
from ..padding import from_blocks, pad_end, to_blocks
from ..tensor_types import Tensor
from . import chunked_attention
from .attention_blocks import Keys, Queries
from .chunked_attention import BlockOptions
from .tile_dropout import as_seed, block_seeds

if TYPE_CHECKING:
    from .pallas_attention import Sizes

IMPLEMENTATIONS = ("chunked", "fused", "pallas")
BLOCK_Q, BLOCK_KV = 128, 512
# On a GPU that many queries and fewer, as in decoding, are one block, and so are their keys up to
# that many scores: each further block takes longer to start than to run.
GPU_BLOCK_Q, GPU_SCORES = 64, 2**26


def attention(
    query: Annotated[Tensor, "B T H D"],
    key: Annotated[Tensor, "B S G D"],
    value: Annotated[Tensor, "B S G D"],
    *,
    limits: Annotated[Tensor, "B T"] | None = None,
    key_mask: Annotated[Tensor, "B S"] | None = None,
    query_segments: Annotated[Tensor, "B T"] | None = None,
    key_segments: Annotated[Tensor, "B S"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: Annotated[Tensor, "2"] | None = None,
    implementation: str | None = None,
) -> Annotated[Tensor, "B T H D"]:
    """Attends from T queries to S keys; query head h reads key head `h // (H // G)`.

    Token t sees key s if `s <= limits[t]`, if the key is not masked and if both are of the same
    segment. A token that sees no key yields 0. Softmax and sums are float32.

    Args:
        query: `(B, T, H, D)`.
        key, value: `(B, S, G, D)`, H a multiple of G.
        limits: `(B, T)` or `(1, T)` int32, last key a token sees; `None` for its own number, with
            as many keys as queries.
        key_mask: `(B, S)` bool, true at keys that may be seen, or `None`.
        query_segments, key_segments: `(B, T)` and `(B, S)` int32, or both `None`.
        scale: factor on the scores. Defaults to `D ** -0.5`.
        dropout: probability in [0, 1) with which a softmax weight is dropped; the others are
            divided by `1 - dropout`.
        dropout_seed: `(2,)` integers as `keras.random.SeedGenerator().next()` returns them;
            required with dropout. The same seed and shapes drop the same weights.
        implementation: `"chunked"` (blocks of queries and keys with a running softmax and its own
            backward pass; keys that no query of a block sees are not read), `"fused"` (the
            attention of the backend, cuDNN's or XLA's, for plain causal order without dropout),
            `"pallas"` (kernels for JAX on a GPU, without dropout; interpreted, which is slow, on a
            CPU), or `None`: on a GPU `"fused"` for plain causal order in half precision, and
            `"pallas"` with JAX for more than 64 queries, else `"chunked"`.

    Returns:
        `(B, T, H, D)` in the dtype of `value`.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit together, rows without tokens, a scale that is
            no number, a dropout rate out of range or without a seed, or an implementation that is
            unknown or cannot do what is asked.
    """
    query, key, value = as_floats("query", query), as_floats("key", key), as_floats("value", value)
    limits = if_given(exact_int32, "limits", limits)
    query_segments = if_given(exact_int32, "query_segments", query_segments)
    key_segments = if_given(exact_int32, "key_segments", key_segments)
    dropout_seed = if_given(as_seed, "dropout_seed", dropout_seed)
    queries = Queries(query, limits, query_segments)
    keys = Keys(key, value, as_mask(key_mask, "key_mask"), key_segments)
    _check_shapes(queries, keys)
    _check_dropout(dropout, dropout_seed)
    require(OPTIONAL_NUMBER, "scale", scale)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    plain = limits is None and key_mask is None and query_segments is None and not dropout
    implementation = choose(
        implementation, IMPLEMENTATIONS, _default(queries, keys, plain, dropout)
    )
    if implementation == "fused":
        if not plain:
            raise ValueError(
                "implementation='fused' takes no `limits`, `key_mask`, segments or `dropout`. "
                f"Received: limits={limits}, key_mask={key_mask}, "
                f"query_segments={query_segments}, dropout={dropout}"
            )
        return ops.dot_product_attention(query, key, value, scale=scale, is_causal=True)
    queries, keys = _filled(queries, keys)
    if implementation == "pallas":
        require_pallas(implementation)
        sizes = _kernel_sizes(queries, keys, dropout)
        if sizes is None:
            dtypes = [str(x.dtype) for x in (query, key, value)]
            raise ValueError(
                "implementation='pallas' takes no `dropout`, and query, key and value of known "
                "shapes, of one dtype, and with heads of at most 1024 bytes. "
                f"Received: {dropout=}, query.shape={query.shape}, key.shape={key.shape}, {dtypes=}"
            )
        found = devices()
        shards = found and _kernel_shards(found, query.shape[0], key.shape[2])
        return _with_kernels(sizes, float(scale), shards)(*keys, *queries[:3])
    return _in_blocks(queries, keys, float(scale), float(dropout), dropout_seed)


def _default(queries: Queries, keys: Keys, plain: bool, dropout: float) -> str:
    if platform() != "gpu":
        return "chunked"
    if plain and keys.value.dtype in ("bfloat16", "float16"):
        return "fused"
    length = ops.shape(queries.query)[1]
    if isinstance(length, int) and length <= GPU_BLOCK_Q:
        return "chunked"
    return "pallas" if has_pallas() and _kernel_sizes(queries, keys, dropout) else "chunked"


def _kernel_sizes(queries: Queries, keys: Keys, dropout: float) -> "Sizes | None":
    """Blocks of the kernels, or `None` where there are no kernels."""
    from . import pallas_attention

    arrays = queries.query, *keys[:2]
    dtypes = {str(x.dtype) for x in arrays}
    if dropout or len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16", "float32"}:
        return None
    if any(not isinstance(size, int) for x in arrays for size in x.shape):
        return None
    return pallas_attention.sizes_for(arrays[0].shape[3], *dtypes)


def _filled(queries: Queries, keys: Keys) -> tuple[Queries, Keys]:
    """With limits, a mask and segments, where there are none."""
    query, limits, query_segments, _ = queries
    batch, length = ops.shape(query)[:2]
    count = ops.shape(keys.key)[1]
    if limits is None:
        limits = ops.arange(length, dtype="int32")[None]
    limits = ops.broadcast_to(limits, (batch, length))
    mask = ops.ones((batch, count), "bool") if keys.mask is None else keys.mask
    key_segments = keys.segments
    if query_segments is None:
        query_segments, key_segments = ops.zeros_like(limits), ops.zeros((batch, count), "int32")
    return Queries(query, limits, query_segments), keys._replace(mask=mask, segments=key_segments)


def _in_blocks(
    queries: Queries, keys: Keys, scale: float, dropout: float, seed: Tensor | None
) -> Annotated[Tensor, "B T H D"]:
    batch, length, heads, dim = ops.shape(queries.query)
    count, groups = ops.shape(keys.key)[1:3]
    block_q, block_kv = _block_sizes(batch, length, heads, count)
    if not isinstance(count, int):  # a block must not be longer than the keys
        missing = ops.maximum(block_kv - count, 0)
        keys = Keys(*(pad_end(x, missing, axis=1) for x in keys))

    query = ops.reshape(queries.query, (batch, length, groups, heads // groups, dim))
    inputs: tuple[Tensor, ...] = (
        *keys,
        to_blocks(query, block_q),
        to_blocks(queries.limits, block_q, fill=-1),  # what fills the last block sees nothing
        to_blocks(queries.segments, block_q),
    )
    if dropout:
        tiles_per_block = (count + block_kv - 1) // block_kv
        inputs += (block_seeds(seed, ops.shape(inputs[-1])[0], tiles_per_block),)
    options = BlockOptions(block_kv, scale, dropout)
    # Weights are dropped by place: what is dropped must not depend on the devices.
    found = None if dropout else devices()
    shards = None if found is None else _shards(found, batch, groups)
    output = _differentiable(options, shards)(*inputs)
    return ops.reshape(from_blocks(output, length), (batch, length, heads, dim))


def _block_sizes(
    batch: int | Tensor, length: int | Tensor, heads: int, count: int | Tensor
) -> tuple[int, int]:
    """Queries and keys of a block."""
    block_q = min(BLOCK_Q, length) if isinstance(length, int) else BLOCK_Q
    block_kv = BLOCK_KV
    if platform() == "gpu" and isinstance(batch, int) and block_q <= GPU_BLOCK_Q:
        block_kv = max(block_kv, GPU_SCORES // max(batch * heads * block_q, 1))
    return block_q, min(block_kv, count) if isinstance(count, int) else block_kv


def _shards(found: Devices, batch: int, groups: int) -> Shards:
    """Rows and key heads are spread: a device needs nothing of the others."""
    rows, heads = found.rows(batch), found.heads(groups)
    keys = spec(rows, (), heads)
    queries, places = spec((), rows, (), heads), spec((), rows)
    inputs = keys, keys, spec(rows), spec(rows), queries, places, places
    gradients = keys, keys, None, None, queries, None, None
    residuals = inputs, queries, spec((), rows, heads)
    return Shards(found.mesh, inputs, queries, residuals, gradients)


def _kernel_shards(found: Devices, batch: int, groups: int) -> Shards:
    """The same for queries that are not in blocks."""
    rows, heads = found.rows(batch), found.heads(groups)
    by_head, by_row = spec(rows, (), heads), spec(rows)
    inputs = by_head, by_head, by_row, by_row, by_head, by_row, by_row
    gradients = by_head, by_head, None, None, by_head, None, None
    residuals = inputs, by_head, spec(rows, heads)
    return Shards(found.mesh, inputs, by_head, residuals, gradients)


@functools.cache
def _differentiable(options: BlockOptions, shards: Shards | None) -> Callable[..., Tensor]:
    """`f(*keys, *queries)`, the queries in blocks and, with dropout, with their seeds."""

    def forward(*inputs):
        keys, queries = Keys(*inputs[:4]), Queries(*inputs[4:])
        output, lse = chunked_attention.forward(queries, keys, options)
        return output, (inputs, output, lse)

    def backward(residuals, d_output):
        inputs, output, lse = residuals
        keys, queries = Keys(*inputs[:4]), Queries(*inputs[4:])
        d_query, d_key, d_value = chunked_attention.backward(
            queries, keys, output, lse, d_output, options
        )
        return d_key, d_value, None, None, d_query, *(None for _ in inputs[5:])

    return custom_gradient(forward, backward, shards=shards)


@functools.cache
def _with_kernels(sizes: "Sizes", scale: float, shards: Shards | None) -> Callable[..., Tensor]:
    """`f(*keys, *queries)`, as they are."""
    from . import pallas_attention

    def forward(*inputs):
        queries, keys = Queries(*inputs[4:]), Keys(*inputs[:4])
        output, lse = pallas_attention.forward(queries, keys, sizes, scale)
        return output, (inputs, output, lse)

    def backward(residuals, d_output):
        inputs, output, lse = residuals
        queries, keys = Queries(*inputs[4:]), Keys(*inputs[:4])
        d_query, d_key, d_value = pallas_attention.backward(
            queries, keys, output, lse, d_output, sizes, scale
        )
        return d_key, d_value, None, None, d_query, None, None

    return custom_gradient(forward, backward, shards=shards)


def _check_shapes(queries: Queries, keys: Keys) -> None:
    query, limits, query_segments, _ = queries
    key, value, key_mask, key_segments = keys
    require_shape("query", query, (None, None, None, None))
    batch, length, heads, dim = query.shape
    require_shape("key", key, (batch, None, None, dim))
    count, groups = key.shape[1:3]
    require_shape("value", value, key.shape)
    require_tokens("query", query)
    require_tokens("key", key)
    if heads % groups:
        raise ValueError(
            "The heads of `query` must be a multiple of those of `key`. "
            f"Received: query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
        )
    if limits is None and None not in (length, count) and length != count:
        raise ValueError(
            "`limits` is needed unless there are as many keys as queries. "
            f"Received: query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
        )
    if limits is not None:
        rows = 1 if tuple(limits.shape[:1]) == (1,) else batch
        require_shape("limits", limits, (rows, length))
    require_shape("key_mask", key_mask, (batch, count))
    if (query_segments is None) != (key_segments is None):
        raise ValueError(
            "Give `query_segments` and `key_segments`, or neither. "
            f"Received: query_segments={query_segments}, key_segments={key_segments}"
        )
    require_shape("query_segments", query_segments, (batch, length))
    require_shape("key_segments", key_segments, (batch, count))


def _check_dropout(dropout: float, seed: Tensor | None) -> None:
    require(DROPOUT_RATE, "dropout", dropout)
    if dropout and seed is None:
        raise ValueError(
            "`dropout_seed` is required with dropout. "
            f"Received: dropout={dropout}, dropout_seed={seed}"
        )
