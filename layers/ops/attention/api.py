"""Causal grouped-query attention that never holds a (T, S) matrix.

o_t = sum_s softmax_s(scale q_t . k_s) v_s      over the keys s that token t may see
"""

import functools

from keras import ops

from ..backend.autodiff import custom_gradient
from ..backend.platform import choose, platform
from ..checks import require_shape
from . import chunked_attention as chunked

IMPLEMENTATIONS = ("chunked", "fused")
QUERIES, KEYS = 128, 512  # a block of scores


def attention(
    query,
    key,
    value,
    *,
    limits=None,
    key_mask=None,
    query_segments=None,
    key_segments=None,
    scale=None,
    implementation=None,
):
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
        implementation: `"chunked"` (blocks of queries and keys with a running softmax and its own
            backward pass; keys that no query of a block sees are not read), `"fused"` (the
            attention of the backend, cuDNN's or XLA's, for plain causal order), or `None`:
            `"fused"` on a GPU for plain causal order in half precision, else `"chunked"`.

    Returns:
        `(B, T, H, D)` in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that is unknown or cannot
            do what is asked.
    """
    _check(query, key, value, limits, key_mask, query_segments, key_segments)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    plain = limits is None and key_mask is None and query_segments is None
    half = value.dtype in ("bfloat16", "float16")
    default = "fused" if plain and half and platform() == "gpu" else "chunked"
    if choose(implementation, IMPLEMENTATIONS, default) == "fused":
        if not plain:
            raise ValueError(
                "implementation='fused' takes no `limits`, `key_mask` or segments. Received: "
                f"limits={limits}, key_mask={key_mask}, query_segments={query_segments}"
            )
        return ops.dot_product_attention(query, key, value, scale=scale, is_causal=True)

    batch, length, heads, dim = ops.shape(query)
    keys, groups = ops.shape(key)[1:3]
    if limits is None:
        limits = ops.arange(length, dtype="int32")[None]
    limits = ops.broadcast_to(limits, (batch, length))
    if key_mask is None:
        key_mask = ops.ones((batch, keys), "bool")
    if query_segments is None:
        query_segments, key_segments = ops.zeros_like(limits), ops.zeros((batch, keys), "int32")
    rows = min(QUERIES, length) if isinstance(length, int) else QUERIES
    columns = min(KEYS, keys) if isinstance(keys, int) else KEYS
    if not isinstance(keys, int):  # a block must not be longer than the keys
        missing = ops.maximum(columns - keys, 0)
        key, value, key_mask, key_segments = (
            _extend(x, missing) for x in (key, value, key_mask, key_segments)
        )
    # Rows that fill the last block see nothing.
    blocks = [_blocks(x, rows, fill) for x, fill in ((query, 0), (limits, -1), (query_segments, 0))]
    blocks[0] = ops.reshape(blocks[0], (-1, batch, rows, groups, heads // groups, dim))
    output = _differentiable(columns, float(scale))(*blocks, key, value, key_mask, key_segments)
    output = ops.reshape(ops.moveaxis(output, 0, 1), (batch, -1, heads, dim))
    return output[:, :length]


@functools.cache
def _differentiable(columns, scale):
    def forward(query, limits, segments, key, value, key_mask, key_segments):
        queries = chunked.Queries(query, limits, segments)
        keys = chunked.Keys(key, value, key_mask, key_segments)
        output, log_sum = chunked.forward(queries, keys, columns, scale)
        return output, (queries, keys, output, log_sum)

    def backward(residuals, d_output):
        d_query, d_key, d_value = chunked.backward(*residuals, d_output, columns, scale)
        return d_query, None, None, d_key, d_value, None, None

    return custom_gradient(forward, backward)


def _blocks(x, size, fill):
    """`(B, T, ...)` -> `(N, B, size, ...)`, filled up at the end."""
    batch, length, *rest = ops.shape(x)
    missing = -length % size
    if not (isinstance(missing, int) and missing == 0):
        x = _extend(x, missing, fill)
    return ops.moveaxis(ops.reshape(x, (batch, -1, size, *rest)), 1, 0)


def _extend(x, count, fill=0):
    batch, _, *rest = ops.shape(x)
    tail = ops.cast(ops.full((batch, count, *rest), fill), x.dtype)
    return ops.concatenate([x, tail], axis=1)


def _check(query, key, value, limits, key_mask, query_segments, key_segments):
    require_shape("query", query, (None, None, None, None))
    batch, length, heads, dim = query.shape
    require_shape("key", key, (batch, None, None, dim))
    keys, groups = key.shape[1:3]
    require_shape("value", value, key.shape)
    if heads % groups:
        raise ValueError(
            "The heads of `query` must be a multiple of those of `key`. "
            f"Received: query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
        )
    if limits is None and None not in (length, keys) and length != keys:
        raise ValueError(
            "`limits` is needed unless there are as many keys as queries. "
            f"Received: query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
        )
    if limits is not None:
        one = 1 if limits.shape[0] == 1 else batch
        require_shape("limits", limits, (one, length))
    require_shape("key_mask", key_mask, (batch, keys))
    if (query_segments is None) != (key_segments is None):
        raise ValueError(
            "Give `query_segments` and `key_segments`, or neither. "
            f"Received: query_segments={query_segments}, key_segments={key_segments}"
        )
    require_shape("query_segments", query_segments, (batch, length))
    require_shape("key_segments", key_segments, (batch, keys))
