"""The chunked gated delta rule with all that needs no state computed for all chunks at once.

The equations are those of `chunk_terms`; only three products per chunk are left in the loop. A
device that a single chunk cannot fill is faster this way, at the price of keeping the C x C
matrices of all chunks.

    forward, backward    as those of `chunked`
"""

from typing import Annotated

from keras import ops

from ..backend.loops import scan
from ..tensor_types import Tensor
from .chunk_terms import ChunkTerms, chunk_terms, input_gradients, transpose, written_rows
from .chunked import ChunkStarts
from .delta_inputs import DeltaInputs, by_head, by_token, gradients_by_token


def forward(
    chunks: DeltaInputs, state: Annotated[Tensor, "B G R K V"]
) -> tuple[Annotated[Tensor, "N B C G R V"], Annotated[Tensor, "B G R K V"], ChunkStarts]:
    """Outputs, final state and what the backward pass needs."""
    first = ops.zeros_like(chunks.segment[:1, :, 0])
    segments = ops.concatenate([first, chunks.segment[:-1, :, -1]])
    chunk, terms = _all_chunks(chunks, segments)

    def step(carry, xs):
        (state,) = carry
        inverse, value, read_key, write_key, chunk_decay = xs
        delta = inverse @ (value - read_key @ state)
        return (chunk_decay * state + transpose(write_key) @ delta,), (state, delta)

    beta = chunk.beta[..., None]
    xs = _split(
        chunks,
        terms.inverse,
        beta * chunk.value,
        beta * terms.read_decay * chunk.key,
        terms.write_decay * chunk.key,
        terms.chunk_decay,
    )
    count = ops.shape(chunks.value)[0]
    into = ops.zeros((count, *ops.shape(state)), state.dtype), ops.zeros_like(xs[1])
    (final,), (states, deltas) = scan(step, (state,), xs, into)
    read = (terms.read_decay * chunk.query) @ _merge(states)
    (output,) = _split(chunks, by_token(read + terms.attention @ _merge(deltas)))
    return output, final, ChunkStarts(states, segments)


def backward(
    chunks: DeltaInputs,
    starts: ChunkStarts,
    d_outputs: Annotated[Tensor, "N B C G R V"],
    d_final: Annotated[Tensor, "B G R K V"],
) -> tuple[tuple[Tensor, ...], Annotated[Tensor, "B G R K V"]]:
    """Gradients of query, key, value, log decay and beta in chunks, and of the state."""
    chunk, terms = _all_chunks(chunks, starts.segments)
    state = _merge(starts.states)
    delta = written_rows(chunk, terms, state)
    d_output = ops.moveaxis(_merge(d_outputs), 1, -2)

    def step(carry, xs):
        (d_state,) = carry
        inverse, d_delta, d_read, read_key, write_key, chunk_decay = xs
        d_residual = transpose(inverse) @ (d_delta + write_key @ d_state)
        before = chunk_decay * d_state + d_read - transpose(read_key) @ d_residual
        return (before,), (d_state, d_residual)

    xs = _split(
        chunks,
        terms.inverse,
        transpose(terms.attention) @ d_output,
        transpose(terms.read_decay * chunk.query) @ d_output,
        chunk.beta[..., None] * terms.read_decay * chunk.key,
        terms.write_decay * chunk.key,
        terms.chunk_decay,
    )
    into = ops.zeros_like(starts.states), ops.zeros_like(xs[1])
    (d_state,), (d_states, d_residuals) = scan(step, (d_final,), xs, into, reverse=True)
    gradients = input_gradients(
        chunk, terms, delta, state, d_output, _merge(d_states), _merge(d_residuals)
    )
    return _split(chunks, *gradients_by_token(gradients)), d_state


def _all_chunks(
    chunks: DeltaInputs, segments: Annotated[Tensor, "N B"]
) -> tuple[DeltaInputs, ChunkTerms]:
    """All chunks as one batch by head, and their terms."""
    chunk = by_head([_merge(x) for x in chunks])
    return chunk, chunk_terms(chunk, _merge(segments))


def _merge(x: Annotated[Tensor, "N B ..."]) -> Annotated[Tensor, "N*B ..."]:
    return ops.reshape(x, (-1, *ops.shape(x)[2:]))


def _split(chunks: DeltaInputs, *xs: Annotated[Tensor, "N*B ..."]) -> tuple[Tensor, ...]:
    """The inverse of `_merge`, tensor by tensor."""
    count, batch = ops.shape(chunks.segment)[:2]
    return tuple(ops.reshape(x, (count, batch, *ops.shape(x)[1:])) for x in xs)
