"""The gated delta rule (Gated Delta Networks, arXiv 2412.06464).

    S_t = exp(g_t) S_{t-1} + k_t d_t^T        d_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
    o_t = scale * S_t^T q_t                   decay first, then the write, then the read

Each head keeps one matrix S `(K, V)`, in float32, whatever the dtype of the inputs.
"""

import functools
from typing import NamedTuple

from keras import ops

from ..backend.autodiff import custom_gradient, full_precision
from ..backend.platform import choose, platform
from ..checks import require_shape
from ..sequence import segment_index
from . import chunk_parallel, chunked, recurrent

IMPLEMENTATIONS = ("chunked", "chunk_parallel", "recurrent")
RECURRENT_LIMIT = 4


class GatedDeltaRuleOutput(NamedTuple):
    """`output` `(B, T, H, V)` in the dtype of `value`; `state` `(B, H, K, V)` float32."""

    output: object
    state: object


def gated_delta_rule(
    query,
    key,
    value,
    log_decay,
    beta,
    *,
    state=None,
    padding_mask=None,
    segment_ids=None,
    scale=None,
    chunk_size=64,
    implementation=None,
):
    """Runs the gated delta rule over T tokens and returns the outputs and the final state.

    Value head h reads and writes with key head `h // (H // G)`. Queries and keys are used as they
    come: normalise them first. At a padded token the state stays as it is and the output is 0. A
    new segment starts from a zero state; the first segment of a row continues `state`.

    Args:
        query, key: `(B, T, G, K)`.
        value: `(B, T, H, V)`, H a multiple of G.
        log_decay: `(B, T, H)`, `g <= 0`.
        beta: `(B, T, H)`, write strength, usually in [0, 1].
        state: `(B, H, K, V)` float32 or `None` for zeros.
        padding_mask: `(B, T)` bool, true at real tokens, anywhere in the row; or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`.
        scale: factor on the query. Defaults to `K ** -0.5`.
        chunk_size: tokens a chunk, a power of two.
        implementation: `"chunked"` (matrix products over chunks, one after the other),
            `"chunk_parallel"` (all chunks at once, but for the state), `"recurrent"` (token by
            token, a static and small T without segments), or `None`: recurrent up to 4 tokens,
            beyond them chunked on a CPU and parallel on a GPU or TPU.

    Returns:
        `GatedDeltaRuleOutput(output, state)`.

    Raises:
        ValueError: shapes that do not fit together, a chunk size that is no power of two, or an
            unknown implementation.
    """
    check(query, key, value, log_decay, beta, state, padding_mask, segment_ids)
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"`chunk_size` must be a power of two. Received: {chunk_size=}")
    chunked_default = "chunked" if platform() == "cpu" else "chunk_parallel"
    batch, length, heads, value_dim = ops.shape(value)
    key_dim, dtype = key.shape[3], value.dtype
    query, key, value, log_decay, beta, state = by_group(
        query, key, value, log_decay, beta, state, padding_mask, scale
    )

    static_length = length if isinstance(length, int) else None
    few = static_length is not None and static_length <= RECURRENT_LIMIT
    default = "recurrent" if few and segment_ids is None else chunked_default
    implementation = choose(implementation, IMPLEMENTATIONS, default)
    if implementation == "recurrent":
        if static_length is None or segment_ids is not None:
            raise ValueError(
                "implementation='recurrent' takes a static number of tokens and no segments. "
                f"Received: value.shape={tuple(value.shape)}, segment_ids={segment_ids}"
            )
        output, state = _recurrent(query, key, value, log_decay, beta, state)
    else:
        if static_length is not None:
            chunk_size = min(chunk_size, 1 << max(static_length - 1, 0).bit_length())
        if segment_ids is None:
            segment = ops.zeros((batch, length), "int32")
        else:
            segment = segment_index(segment_ids, padding_mask)
        output, state = _chunked(
            query, key, value, log_decay, beta, segment, state, chunk_size, implementation
        )
    output = ops.reshape(output, (batch, length, heads, value_dim))
    if padding_mask is not None:
        output = ops.where(padding_mask[:, :, None, None], output, 0.0)
    state = ops.reshape(state, (batch, heads, key_dim, value_dim))
    return GatedDeltaRuleOutput(ops.cast(output, dtype), state)


def by_group(query, key, value, log_decay, beta, state, padding_mask, scale):
    """Float32 inputs with R value heads behind every key head, still at padding; scaled queries.

    Returns query and key `(B, T, G, 1, K)`, value `(B, T, G, R, V)`, log decay and beta
    `(B, T, G, R)` and the state `(B, G, R, K, V)`.
    """
    batch, length, groups, key_dim = ops.shape(query)
    heads, value_dim = value.shape[2:]
    repeats = heads // groups
    query, key, value, log_decay, beta = (
        ops.cast(x, "float32") for x in (query, key, value, log_decay, beta)
    )
    query = query * (key_dim**-0.5 if scale is None else scale)
    query, key = (ops.reshape(x, (batch, length, groups, 1, key_dim)) for x in (query, key))
    value = ops.reshape(value, (batch, length, groups, repeats, value_dim))
    log_decay, beta = (ops.reshape(x, (batch, length, groups, repeats)) for x in (log_decay, beta))
    if padding_mask is not None:
        real = padding_mask[:, :, None, None]
        log_decay = ops.where(real, log_decay, 0.0)
        beta = ops.where(real, beta, 0.0)
    state_shape = (batch, groups, repeats, key_dim, value_dim)
    if state is None:
        state = ops.zeros(state_shape, "float32")
    else:
        state = ops.reshape(ops.cast(state, "float32"), state_shape)
    return query, key, value, log_decay, beta, state


def _recurrent(query, key, value, log_decay, beta, state):
    def by_token(x):
        return ops.moveaxis(ops.reshape(x, (*ops.shape(x)[:2], -1, *x.shape[4:])), 1, 0)

    # One query and key a value head: shared ones would make XLA transpose the state to share them.
    repeats = value.shape[3]
    query, key = (ops.repeat(x, repeats, axis=3) for x in (query, key))
    xs = [by_token(x) for x in (query, key, value, ops.exp(log_decay), beta)]
    batch, groups, _, *dims = ops.shape(state)
    state = ops.reshape(state, (batch, groups * repeats, *dims))
    with full_precision():
        output, state = recurrent.run(*xs, state)
    return ops.moveaxis(output, 0, 1), state


def _chunked(query, key, value, log_decay, beta, segment, state, chunk_size, implementation):
    length = ops.shape(value)[1]
    xs = [to_chunks(x, chunk_size) for x in (query, key, value, log_decay, beta)]
    # Padding the tail with the last segment's number keeps its state.
    segment = to_chunks(segment, chunk_size, repeat_last=True)
    output, state = _differentiable(implementation)(*xs, segment, state)
    output = ops.moveaxis(output, 0, 1)  # (B, N, C, G, R, V)
    output = ops.reshape(output, (ops.shape(value)[0], -1, *value.shape[2:]))
    return output[:, :length], state


@functools.cache
def _differentiable(implementation):
    module = {"chunked": chunked, "chunk_parallel": chunk_parallel}[implementation]

    def forward(query, key, value, log_decay, beta, segment, state):
        chunks = chunked.Chunk(query, key, value, log_decay, beta, segment)
        with full_precision():
            output, final, starts = module.forward(chunks, state)
        return (output, final), (tuple(chunks), starts)

    def backward(residuals, d_output, d_final):
        chunks, starts = residuals
        with full_precision():
            grads, d_state = module.backward(chunked.Chunk(*chunks), *starts, d_output, d_final)
        return (*grads, None, d_state)

    return custom_gradient(forward, backward)


def to_chunks(x, size, repeat_last=False):
    """`(B, T, ...)` -> `(N, B, C, ...)`; zeros at the end neither decay nor write."""
    batch, length, *rest = ops.shape(x)
    missing = -length % size
    if not (isinstance(missing, int) and missing == 0):
        tail = ops.zeros((batch, missing, *rest), x.dtype)
        x = ops.concatenate([x, tail + x[:, -1:] if repeat_last else tail], axis=1)
    return ops.moveaxis(ops.reshape(x, (batch, -1, size, *rest)), 1, 0)


def check(query, key, value, log_decay, beta, state, padding_mask, segment_ids):
    require_shape("value", value, (None, None, None, None))
    batch, length, heads, value_dim = value.shape
    require_shape("key", key, (batch, length, None, None))
    groups, key_dim = key.shape[2:]
    require_shape("query", query, (batch, length, groups, key_dim))
    if heads % groups:
        raise ValueError(
            "The heads of `value` must be a multiple of those of `key`. "
            f"Received: value.shape={tuple(value.shape)}, key.shape={tuple(key.shape)}"
        )
    require_shape("log_decay", log_decay, (batch, length, heads))
    require_shape("beta", beta, (batch, length, heads))
    require_shape("state", state, (batch, heads, key_dim, value_dim))
    require_shape("padding_mask", padding_mask, (batch, length))
    require_shape("segment_ids", segment_ids, (batch, length))
