"""The chunked gated delta rule with all that needs no state computed for all chunks at once.

The equations are those of `chunk_terms`; only three products per chunk are left in the loop. A
device that a single chunk cannot fill is faster this way, at the price of keeping the C x C
matrices of all chunks. The loop is an argument: `chunk_states_on_gpu` has one in a kernel.

    forward, backward    as those of `chunked`
    over_chunks          the loop, a program per step
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

from keras import ops

from ..backend.loops import scan
from ..tensor_types import Tensor
from .chunk_terms import ChunkTerms, chunk_terms, input_gradients, transpose, written_rows
from .chunked import ChunkStarts
from .delta_inputs import DeltaInputs, by_head, by_token, gradients_by_token


class ChunkLinks(NamedTuple):
    """What takes the state over a chunk, for all chunks `(N, B, G, R, ...)` or for one head.

    Attributes:
        inverse: `(..., C, C)`, X.
        read_key: `(..., C, K)`, beta r k.
        write_key: `(..., C, K)`, w k.
        chunk_decay: `(...)`, e.
    """

    inverse: Tensor
    read_key: Tensor
    write_key: Tensor
    chunk_decay: Tensor


# step(state (..., K, V), links of a chunk, columns of a chunk) -> state, rows (..., C, V): every
# column of the state goes its own way.
Step = Callable[[Tensor, ChunkLinks, tuple[Tensor, ...]], tuple[Tensor, Tensor]]
Loop = Callable[..., tuple[Tensor, Tensor, Tensor]]


def over_chunks(
    step: Step,
    state: Annotated[Tensor, "B G R K V"],
    links: ChunkLinks,
    columns: tuple[Annotated[Tensor, "N B G R ... V"], ...],
    reverse: bool = False,
) -> tuple[
    Annotated[Tensor, "B G R K V"],
    Annotated[Tensor, "N B G R K V"],
    Annotated[Tensor, "N B G R C V"],
]:
    """Takes `state` over all chunks: the last state, those that the steps met, and their rows.

    The first of `columns` is `(N, B, G, R, C, V)`. With `reverse` the last chunk comes first.
    """

    def body(carry, xs):
        (state,) = carry
        after, rows = step(state, ChunkLinks(*xs[: len(links)]), xs[len(links) :])
        return (after,), (state, rows)

    count = ops.shape(columns[0])[0]
    into = ops.zeros((count, *ops.shape(state)), state.dtype), ops.zeros_like(columns[0])
    (last,), (states, rows) = scan(body, (state,), (*links, *columns), into, reverse=reverse)
    return last, states, rows


def forward(
    chunks: DeltaInputs, state: Annotated[Tensor, "B G R K V"], loop: Loop = over_chunks
) -> tuple[Annotated[Tensor, "N B C G R V"], Annotated[Tensor, "B G R K V"], ChunkStarts]:
    """Outputs, final state and what the backward pass needs."""
    first = ops.zeros_like(chunks.segment[:1, :, 0])
    segments = ops.concatenate([first, chunks.segment[:-1, :, -1]])
    chunk, terms = _all_chunks(chunks, segments)
    value = _split(chunks, chunk.beta[..., None] * chunk.value)
    final, states, deltas = loop(_write, state, _links(chunks, chunk, terms), value)
    read = (terms.read_decay * chunk.query) @ _merge(states)
    (output,) = _split(chunks, by_token(read + terms.attention @ _merge(deltas)))
    return output, final, ChunkStarts(states, segments)


def backward(
    chunks: DeltaInputs,
    starts: ChunkStarts,
    d_outputs: Annotated[Tensor, "N B C G R V"],
    d_final: Annotated[Tensor, "B G R K V"],
    loop: Loop = over_chunks,
) -> tuple[tuple[Tensor, ...], Annotated[Tensor, "B G R K V"]]:
    """Gradients of query, key, value, log decay and beta in chunks, and of the state."""
    chunk, terms = _all_chunks(chunks, starts.segments)
    state = _merge(starts.states)
    delta = written_rows(chunk, terms, state)
    d_output = ops.moveaxis(_merge(d_outputs), 1, -2)
    columns = _split(
        chunks,
        transpose(terms.attention) @ d_output,
        transpose(terms.read_decay * chunk.query) @ d_output,
    )
    links = _links(chunks, chunk, terms)
    d_state, d_states, d_residuals = loop(_write_gradient, d_final, links, columns, reverse=True)
    gradients = input_gradients(
        chunk, terms, delta, state, d_output, _merge(d_states), _merge(d_residuals)
    )
    return _split(chunks, *gradients_by_token(gradients)), d_state


def _write(
    state: Annotated[Tensor, "... K V"],
    links: ChunkLinks,
    columns: tuple[Annotated[Tensor, "... C V"]],
) -> tuple[Annotated[Tensor, "... K V"], Annotated[Tensor, "... C V"]]:
    """The state behind a chunk and V, from beta v."""
    (value,) = columns
    delta = links.inverse @ (value - links.read_key @ state)
    written = transpose(links.write_key) @ delta
    return links.chunk_decay[..., None, None] * state + written, delta


def _write_gradient(
    d_state: Annotated[Tensor, "... K V"],
    links: ChunkLinks,
    columns: tuple[Annotated[Tensor, "... C V"], Annotated[Tensor, "... K V"]],
) -> tuple[Annotated[Tensor, "... K V"], Annotated[Tensor, "... C V"]]:
    """Gradients of the state before a chunk and of `X^-1 V`, from what its outputs give to them."""
    d_delta, d_read = columns
    d_residual = transpose(links.inverse) @ (d_delta + links.write_key @ d_state)
    kept = links.chunk_decay[..., None, None] * d_state
    return kept + d_read - transpose(links.read_key) @ d_residual, d_residual


def _links(chunks: DeltaInputs, chunk: DeltaInputs, terms: ChunkTerms) -> ChunkLinks:
    links = ChunkLinks(
        inverse=terms.inverse,
        read_key=chunk.beta[..., None] * terms.read_decay * chunk.key,
        write_key=terms.write_decay * chunk.key,
        chunk_decay=terms.chunk_decay[..., 0, 0],
    )
    return ChunkLinks(*_split(chunks, *links))


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
