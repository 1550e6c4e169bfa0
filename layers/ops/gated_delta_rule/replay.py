"""Reading a few tokens ahead without keeping a state for each of them.

A speculative pass runs T tokens from a state S_0 and learns only afterwards how many of them stay.
It leaves S_0 as it is and keeps, for every token, what the token would write: its key k_t, the row
d_t and its decay g_t. Any number n of accepted tokens is then committed with one product:

    S_n = exp(g_1 + ... + g_n) S_0 + sum_{t <= n} exp(g_{t+1} + ... + g_n) k_t d_t^T

That is K + V + 1 numbers a token and head instead of the K V of a state.
"""

from typing import NamedTuple

from keras import ops

from ..backend.autodiff import full_precision
from ..checks import require_shape
from . import chunked
from .api import by_group, check, to_chunks

MOST_TOKENS = 64


class Replay(NamedTuple):
    """What T tokens write, float32: `key` `(B, G, 1, C, K)`, `delta` `(B, G, R, C, V)` and
    `log_decay` `(B, G, R, C)`, T filled up with tokens that write nothing."""

    key: object
    delta: object
    log_decay: object


def gated_delta_rule_with_replay(
    query, key, value, log_decay, beta, *, state, padding_mask=None, scale=None
):
    """As `gated_delta_rule` for at most 64 tokens, but leaves the state alone.

    Args:
        query, key, value, log_decay, beta, padding_mask, scale: As for `gated_delta_rule`.
        state: `(B, H, K, V)` float32.

    Returns:
        `(output (B, T, H, V) in the dtype of value, Replay)`.

    Raises:
        ValueError: shapes that do not fit together, or too many tokens.
    """
    check(query, key, value, log_decay, beta, state, padding_mask, None)
    length, shape, dtype = value.shape[1], ops.shape(value), value.dtype
    if length is None or length > MOST_TOKENS:
        raise ValueError(
            f"A replay takes a static number of at most {MOST_TOKENS} tokens. "
            f"Received: value.shape={tuple(value.shape)}"
        )
    *xs, state = by_group(query, key, value, log_decay, beta, state, padding_mask, scale)
    size = 1 << max(length - 1, 0).bit_length()
    segment = ops.zeros(shape[:2], "int32")
    chunk = chunked.by_head([to_chunks(x, size)[0] for x in (*xs, segment)])
    with full_precision():
        _, delta, output = chunked.outputs_of(chunk, state, chunk.segment[:, 0])
    output = ops.reshape(chunked.by_token(output)[:, :length], shape)
    if padding_mask is not None:
        output = ops.where(padding_mask[:, :, None, None], output, 0.0)
    return ops.cast(output, dtype), Replay(chunk.key, delta, chunk.log_decay)


def replay(state, record, counts):
    """The state after the first `counts` tokens of a record.

    Args:
        state: `(B, H, K, V)` float32, the state the record was made from.
        record: `Replay`.
        counts: `(B,)` int32, between 0 and the record's number of tokens.

    Returns:
        `(B, H, K, V)` float32.
    """
    batch, groups, repeats, size = record.log_decay.shape
    require_shape("counts", counts, (state.shape[0],))
    require_shape("state", state, (batch, groups * repeats, None, None))
    index = ops.arange(size, dtype="int32")
    kept = (index < counts[:, None])[:, None, None]  # (B, 1, 1, C)
    log_decay = ops.where(kept, record.log_decay, 0.0)
    later = ops.cast(index[:, None] > index, "float32")  # row s, column t: s > t
    grouped = ops.reshape(state, (ops.shape(state)[0], groups, repeats, *state.shape[2:]))
    with full_precision():
        left = ops.where(kept, ops.exp(log_decay @ later), 0.0)[..., None]
        written = ops.swapaxes(left * record.key, -1, -2) @ record.delta
    total = ops.exp(ops.sum(log_decay, axis=-1))[..., None, None]
    return ops.reshape(total * grouped + written, ops.shape(state))
