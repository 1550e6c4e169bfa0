"""Reading a few tokens ahead without keeping a state for each of them.

A speculative pass runs T tokens from a state S_0 and learns only afterwards how many of them stay.
It leaves S_0 as it is and keeps, for every token, what the token would write: its key k_t, the row
d_t and its decay g_t. Any number n of accepted tokens is then committed with one product:

    S_n = exp(g_1 + ... + g_n) S_0 + sum_{t <= n} exp(g_{t+1} + ... + g_n) k_t d_t^T

That is K + V + 1 numbers per token and head instead of the K V of a state.

    gated_delta_rule_with_replay    outputs, and what the tokens write
    empty_replay                    a record that writes nothing
    replay                          the state after the tokens that stay
"""

from typing import Annotated, NamedTuple

from keras import ops

from qwen3_next.config.validation import OPTIONAL_NUMBER, Rule, require

from ..backend.autodiff import full_precision
from ..checks import as_floats, as_mask, exact_int32, require_shape
from ..tensor_types import Tensor
from . import chunked
from .delta_inputs import (
    DeltaInputs,
    as_given,
    by_group,
    by_head,
    by_token,
    check_shapes,
    chunk_size_for,
    floats_given,
    state_by_group,
    to_chunks,
)

MOST_TOKENS = 64


class Replay(NamedTuple):
    """What T tokens write, T filled up to C with tokens that write nothing.

    Attributes:
        key: `(B, G, 1, C, K)` float32.
        delta: `(B, G, R, C, V)` float32, the rows written under the keys.
        log_decay: `(B, G, R, C)` float32.
    """

    key: Annotated[Tensor, "B G 1 C K"]
    delta: Annotated[Tensor, "B G R C V"]
    log_decay: Annotated[Tensor, "B G R C"]


RECORD = Rule("a `Replay`", lambda value: isinstance(value, Replay))


def gated_delta_rule_with_replay(
    query: Annotated[Tensor, "B T G K"],
    key: Annotated[Tensor, "B T G K"],
    value: Annotated[Tensor, "B T H V"],
    log_decay: Annotated[Tensor, "B T H"],
    beta: Annotated[Tensor, "B T H"],
    *,
    state: Annotated[Tensor, "B H K V"],
    padding_mask: Annotated[Tensor, "B T"] | None = None,
    scale: float | None = None,
) -> tuple[Annotated[Tensor, "B T H V"], Replay]:
    """As `gated_delta_rule` for at most 64 tokens, but leaves the state alone.

    Args:
        query, key, value, log_decay, beta, padding_mask, scale: As for `gated_delta_rule`.
        state: `(B, H, K, V)` float32.

    Returns:
        `(output, Replay)`, the output `(B, T, H, V)` in the dtype of value.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit together, or no or too many tokens.
    """
    given, state = floats_given(DeltaInputs(query, key, value, log_decay, beta), state)
    value, state = given.value, as_floats("state", state)  # which is not optional here
    padding_mask = as_mask(padding_mask)
    check_shapes(given, state, padding_mask)
    require(OPTIONAL_NUMBER, "scale", scale)
    length = value.shape[1]
    if length is None or length > MOST_TOKENS:
        raise ValueError(
            f"A replay takes a static number of at most {MOST_TOKENS} tokens. "
            f"Received: value.shape={tuple(value.shape)}"
        )
    inputs = by_group(given, padding_mask, scale)
    start = state_by_group(state, inputs)
    chunk = by_head([x[0] for x in to_chunks(inputs, chunk_size_for(length))])
    with full_precision():
        _, delta, output = chunked.chunk_outputs(chunk, start, chunk.segment[:, 0])
    output = as_given(by_token(output)[:, :length], value, padding_mask)
    return output, Replay(chunk.key, delta, chunk.log_decay)


def empty_replay(state: Annotated[Tensor, "B H K V"], groups: int, length: int) -> Replay:
    """A record with the shapes of one of `length` tokens from `state`, with `groups` key heads."""
    batch, heads, key_dim, value_dim = ops.shape(state)
    size, by_head = chunk_size_for(length), (batch, groups, heads // groups)
    return Replay(
        ops.zeros((batch, groups, 1, size, key_dim), "float32"),
        ops.zeros((*by_head, size, value_dim), "float32"),
        ops.zeros((*by_head, size), "float32"),
    )


def replay(
    state: Annotated[Tensor, "B H K V"], record: Replay, counts: Annotated[Tensor, "B"]
) -> Annotated[Tensor, "B H K V"]:
    """The state after the first `counts` tokens of a record.

    Args:
        state: `(B, H, K, V)` float32, the state the record was made from.
        record: `Replay`.
        counts: `(B,)` int32, between 0 and the record's number of tokens.

    Returns:
        `(B, H, K, V)` float32.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: no `Replay`, or shapes or dtypes that do not fit together.
    """
    require(RECORD, "record", record)
    state = ops.cast(as_floats("state", state), "float32")
    counts = exact_int32("counts", counts)
    batch, groups, repeats, size = record.log_decay.shape
    sizes = record.key.shape[-1], record.delta.shape[-1]
    require_shape("state", state, (batch, groups * repeats, *sizes))
    require_shape("counts", counts, (state.shape[0],))
    index = ops.arange(size, dtype="int32")
    kept = (index < counts[:, None])[:, None, None]  # (B, 1, 1, C)
    log_decay = ops.where(kept, record.log_decay, 0.0)
    later = ops.cast(index[:, None] > index, "float32")  # row s, column t: s > t
    grouped = ops.reshape(state, (ops.shape(state)[0], groups, repeats, *state.shape[2:]))
    with full_precision():
        write_decay = ops.where(kept, ops.exp(log_decay @ later), 0.0)[..., None]
        written = ops.swapaxes(write_decay * record.key, -1, -2) @ record.delta
    chunk_decay = ops.exp(ops.sum(log_decay, axis=-1))[..., None, None]
    return ops.reshape(chunk_decay * grouped + written, ops.shape(state))
