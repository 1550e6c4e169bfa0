"""The gated delta rule chunk by chunk, and its analytic backward pass.

The equations are those of `chunk_terms`. The backward pass keeps the inputs and the state at the
start of every chunk, walks the chunks in reverse and recomputes the rest.

    forward          all chunks
    backward         gradients of chunks and state
    chunk_outputs    one chunk
"""

from typing import Annotated, NamedTuple

from keras import ops

from ..backend.loops import scan
from ..tensor_types import Tensor
from .chunk_terms import ChunkTerms, chunk_terms, input_gradients, transpose, written_rows
from .delta_inputs import DeltaInputs, by_head, by_token, gradients_by_token


class ChunkStarts(NamedTuple):
    """What the backward pass keeps besides the inputs.

    Attributes:
        states: `(N, B, G, R, K, V)` float32, the state at the start of every chunk.
        segments: `(N, B)` int32, the segments those states belong to.
    """

    states: Annotated[Tensor, "N B G R K V"]
    segments: Annotated[Tensor, "N B"]


def forward(
    chunks: DeltaInputs, state: Annotated[Tensor, "B G R K V"]
) -> tuple[Annotated[Tensor, "N B C G R V"], Annotated[Tensor, "B G R K V"], ChunkStarts]:
    """Outputs, final state and what the backward pass needs."""

    def step(carry, xs):
        state, state_segment = carry
        chunk = by_head(xs)
        terms, delta, output = chunk_outputs(chunk, state, state_segment)
        written = transpose(terms.write_decay * chunk.key) @ delta
        new_state = terms.chunk_decay * state + written
        return (new_state, chunk.segment[:, -1]), (by_token(output), state, state_segment)

    count = ops.shape(chunks.value)[0]
    # The state that comes in belongs to the first segment of the row.
    first = ops.zeros_like(chunks.segment[0, :, 0])
    into = (
        ops.zeros_like(chunks.value),
        ops.zeros((count, *ops.shape(state)), state.dtype),
        ops.zeros((count, *ops.shape(first)), first.dtype),
    )
    (final, _), (outputs, *starts) = scan(step, (state, first), tuple(chunks), into)
    return outputs, final, ChunkStarts(*starts)


def chunk_outputs(
    chunk: DeltaInputs, state: Annotated[Tensor, "B G R K V"], state_segment: Annotated[Tensor, "B"]
) -> tuple[ChunkTerms, Annotated[Tensor, "B G R C V"], Annotated[Tensor, "B G R C V"]]:
    """The terms of a chunk by head, the rows it writes and its outputs."""
    terms = chunk_terms(chunk, state_segment)
    delta = written_rows(chunk, terms, state)
    output = (terms.read_decay * chunk.query) @ state + terms.attention @ delta
    return terms, delta, output


def backward(
    chunks: DeltaInputs,
    starts: ChunkStarts,
    d_outputs: Annotated[Tensor, "N B C G R V"],
    d_final: Annotated[Tensor, "B G R K V"],
) -> tuple[tuple[Tensor, ...], Annotated[Tensor, "B G R K V"]]:
    """Gradients of query, key, value, log decay and beta in chunks, and of the state."""

    def step(carry, xs):
        (d_state,) = carry
        *inputs, state, state_segment, d_output = xs
        chunk = by_head(inputs)
        d_output = ops.moveaxis(d_output, 1, -2)
        gradients, d_state = _chunk_gradients(chunk, state, state_segment, d_output, d_state)
        return (d_state,), gradients_by_token(gradients)

    into = tuple(ops.zeros_like(x) for x in chunks[:5])
    xs = (*chunks, *starts, d_outputs)
    (d_state,), gradients = scan(step, (d_final,), xs, into, reverse=True)
    return gradients, d_state


def _chunk_gradients(
    chunk: DeltaInputs, state: Tensor, state_segment: Tensor, d_output: Tensor, d_state: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of a chunk's inputs and of the state before it; `d_state` is of that behind it."""
    terms = chunk_terms(chunk, state_segment)
    delta = written_rows(chunk, terms, state)
    d_delta = transpose(terms.attention) @ d_output + (terms.write_decay * chunk.key) @ d_state
    d_residual = transpose(terms.inverse) @ d_delta
    gradients = input_gradients(chunk, terms, delta, state, d_output, d_state, d_residual)
    d_state = (
        terms.chunk_decay * d_state
        + transpose(terms.read_decay * chunk.query) @ d_output
        - transpose(chunk.beta[..., None] * terms.read_decay * chunk.key) @ d_residual
    )
    return gradients, d_state
