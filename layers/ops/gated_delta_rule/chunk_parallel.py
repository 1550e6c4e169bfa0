"""The chunked gated delta rule with all that needs no state computed for all chunks at once.

The equations are those of `chunked`; only three products a chunk are left in the loop. A device
that a single chunk cannot fill is faster this way, at the price of keeping the C x C matrices of
all chunks.
"""

from keras import ops

from ..backend.loops import scan
from .chunked import (
    by_head,
    by_token,
    delta_of,
    gradients_by_token,
    intra_of,
    pull_inputs,
    transpose,
)


def forward(chunks, state):
    """As `chunked.forward`."""
    first = ops.zeros_like(chunks.segment[:1, :, 0])
    start_segments = ops.concatenate([first, chunks.segment[:-1, :, -1]])
    chunk, intra = _all_chunks(chunks, start_segments)

    def step(carry, xs):
        (state,) = carry
        inverse, value, read_key, write_key, keep = xs
        delta = inverse @ (value - read_key @ state)
        return (keep * state + transpose(write_key) @ delta,), (state, delta)

    beta = chunk.beta[..., None]
    xs = _split(
        chunks,
        intra.inverse,
        beta * chunk.value,
        beta * intra.read * chunk.key,
        intra.write * chunk.key,
        intra.keep,
    )
    count = ops.shape(chunks.value)[0]
    into = ops.zeros((count, *ops.shape(state)), state.dtype), ops.zeros_like(xs[1])
    (final,), (starts, deltas) = scan(step, (state,), xs, into)
    output = (intra.read * chunk.query) @ _merge(starts) + intra.attention @ _merge(deltas)
    (output,) = _split(chunks, by_token(output))
    return output, final, (starts, start_segments)


def backward(chunks, starts, start_segments, d_outputs, d_final):
    """As `chunked.backward`."""
    chunk, intra = _all_chunks(chunks, start_segments)
    state = _merge(starts)
    delta = delta_of(chunk, intra, state)
    d_output = ops.moveaxis(_merge(d_outputs), 1, -2)

    def step(carry, xs):
        (d_state,) = carry
        inverse, d_delta, d_read, read_key, write_key, keep = xs
        d_residual = transpose(inverse) @ (d_delta + write_key @ d_state)
        before = keep * d_state + d_read - transpose(read_key) @ d_residual
        return (before,), (d_state, d_residual)

    xs = _split(
        chunks,
        intra.inverse,
        transpose(intra.attention) @ d_output,
        transpose(intra.read * chunk.query) @ d_output,
        chunk.beta[..., None] * intra.read * chunk.key,
        intra.write * chunk.key,
        intra.keep,
    )
    into = ops.zeros_like(starts), ops.zeros_like(xs[1])
    (d_state,), (d_states, d_residuals) = scan(step, (d_final,), xs, into, reverse=True)
    grads = pull_inputs(chunk, intra, delta, state, d_output, _merge(d_states), _merge(d_residuals))
    return _split(chunks, *gradients_by_token(grads)), d_state


def _all_chunks(chunks, start_segments):
    """All chunks as one batch, head by head, and what they are made of."""
    chunk = by_head([_merge(x) for x in chunks])
    return chunk, intra_of(chunk, _merge(start_segments))


def _merge(x):
    """`(N, B, ...)` -> `(N B, ...)`."""
    return ops.reshape(x, (-1, *ops.shape(x)[2:]))


def _split(chunks, *xs):
    """`(N B, ...)` -> `(N, B, ...)`."""
    count, batch = ops.shape(chunks.segment)[:2]
    return tuple(ops.reshape(x, (count, batch, *ops.shape(x)[1:])) for x in xs)
