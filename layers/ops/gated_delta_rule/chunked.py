"""The chunked gated delta rule and its analytic backward pass, on float32 chunks.

Notation, per value head and chunk of C tokens: S is the state `(K, V)` at the start of the chunk,

    D_ij = exp(g_{j+1} + ... + g_i)   for i >= j in the same segment, else 0
    r_i  = exp(g_1 + ... + g_i)       how much of S token i still sees
    w_i  = exp(g_{i+1} + ... + g_C)   how much of token i's write is left at the end
    e    = exp(g_1 + ... + g_C)       how much of S is left at the end

    A = stril(beta_i (k_i . k_j) D_ij)      X = (I + A)^-1       P = tril((q_i . k_j) D_ij)
    V = X (beta v - beta r k S)             the rows that the C rank-one updates write
    O = r q S + P V                         S' = e S + (w k)^T V

r, w and e are 0 across a segment boundary. Against the textbook WY form this is one matrix product
fewer and has no U, W buffers. Chunks: Gated Delta Networks, arXiv 2412.06464, section 3.3.

The backward pass keeps the inputs and the state at the start of every chunk, walks the chunks in
reverse and recomputes the rest. X is never differentiated: dA = -stril((X^T dV) V^T).

Shapes: B batch, G key heads, R value heads a key head, C chunk, N chunks. Chunks come and go token
by token, `(B, C, G, R, ...)`, and are turned head by head inside the loop, while they are in the
cache.
"""

from typing import NamedTuple

from keras import ops

from ..backend.loops import scan

MIN_BLOCK = 16


class Chunk(NamedTuple):
    """One chunk of inputs, head by head."""

    query: object  # (B, G, 1, C, K)
    key: object  # (B, G, 1, C, K)
    value: object  # (B, G, R, C, V)
    log_decay: object  # (B, G, R, C)
    beta: object  # (B, G, R, C)
    segment: object  # (B, C) int32


class Intra(NamedTuple):
    """What a chunk is made of besides its inputs (names as in the module's equations)."""

    decay: object  # D (B, G, R, C, C)
    read: object  # r (B, G, R, C, 1)
    write: object  # w (B, G, R, C, 1)
    keep: object  # e (B, G, R, 1, 1)
    overlap: object  # A (B, G, R, C, C)
    inverse: object  # X (B, G, R, C, C)
    attention: object  # P (B, G, R, C, C)


def forward(chunks, state):
    """Chunks `(N, B, C, G, R, ...)`, state `(B, G, R, K, V)` -> outputs, final state, starts."""

    def step(carry, xs):
        state, state_segment = carry
        chunk = by_head(xs)
        intra, delta, output = outputs_of(chunk, state, state_segment)
        new_state = intra.keep * state + transpose(intra.write * chunk.key) @ delta
        return (new_state, chunk.segment[:, -1]), (by_token(output), state, state_segment)

    count = ops.shape(chunks.value)[0]
    # The state that comes in belongs to the first segment of the row.
    first = ops.zeros_like(chunks.segment[0, :, 0])
    into = (
        ops.zeros_like(chunks.value),
        ops.zeros((count, *ops.shape(state)), state.dtype),
        ops.zeros((count, *ops.shape(first)), first.dtype),
    )
    (final, _), (outputs, starts, start_segments) = scan(step, (state, first), tuple(chunks), into)
    return outputs, final, (starts, start_segments)


def outputs_of(chunk, state, state_segment):
    """What a chunk reads and writes: its `Intra`, V `(B, G, R, C, V)` and O of that shape."""
    intra = intra_of(chunk, state_segment)
    delta = delta_of(chunk, intra, state)
    output = (intra.read * chunk.query) @ state + intra.attention @ delta
    return intra, delta, output


def backward(chunks, starts, start_segments, d_outputs, d_final):
    """Cotangents of outputs and final state -> gradients in the order of `Chunk`, d_state."""

    def step(carry, xs):
        (d_state,) = carry
        *chunk, state, state_segment, d_output = xs
        d_output = ops.moveaxis(d_output, 1, -2)
        grads, d_state = _backward_step(by_head(chunk), state, state_segment, d_output, d_state)
        return (d_state,), gradients_by_token(grads)

    # Queries and keys are shared by the R value heads of a group: their gradients are summed there.
    into = tuple(ops.zeros_like(x) for x in chunks[:5])
    xs = (*chunks, starts, start_segments, d_outputs)
    (d_state,), grads = scan(step, (d_final,), xs, into, reverse=True)
    return grads, d_state


def by_head(xs):
    query, key, value, log_decay, beta, segment = xs
    wide = (ops.moveaxis(x, 1, -2) for x in (query, key, value))
    return Chunk(*wide, *(ops.moveaxis(x, 1, -1) for x in (log_decay, beta)), segment)


def by_token(x):
    """`(B, G, R, C, ...)` -> `(B, C, G, R, ...)`."""
    return ops.moveaxis(x, -2, 1)


def gradients_by_token(grads):
    *wide, d_decay, d_beta = grads
    return *map(by_token, wide), *(ops.moveaxis(x, -1, 1) for x in (d_decay, d_beta))


def intra_of(chunk, state_segment):
    size = chunk.log_decay.shape[-1]
    rows = ops.arange(size)
    lower = rows[:, None] >= rows[None, :]
    strict = rows[:, None] > rows[None, :]
    # Summing g over (j, i] directly: differences of a running sum lose small decays behind a
    # strong one (a sum of -3000 in float32 is only good to 2e-4).
    span = ops.cast(lower, "float32") @ ops.where(strict, chunk.log_decay[..., :, None], 0.0)
    segment = chunk.segment[:, None, None, :]  # (B, 1, 1, C)
    same = segment[..., :, None] == segment[..., None, :]
    # Masked before exp: above the diagonal the sums would be of the wrong tokens, and afterwards
    # inf * 0 would poison the gradients.
    decay = ops.exp(ops.where(lower & same, span, -float("inf")))
    total = ops.cumsum(chunk.log_decay, axis=-1)
    seen = segment == state_segment[:, None, None, None]
    read = ops.where(seen, ops.exp(total), 0.0)
    overlap = chunk.key @ transpose(chunk.key)  # (B, G, 1, C, C), once a key head
    overlap = ops.where(strict, chunk.beta[..., None] * overlap * decay, 0.0)
    return Intra(
        decay=decay,
        read=read[..., None],
        write=decay[..., -1, :, None],
        keep=read[..., -1, None, None],
        overlap=overlap,
        inverse=unit_lower_inverse(overlap),
        attention=(chunk.query @ transpose(chunk.key)) * decay,
    )


def delta_of(chunk, intra, state):
    recalled = (intra.read * chunk.key) @ state
    return intra.inverse @ (chunk.beta[..., None] * (chunk.value - recalled))


def _backward_step(chunk, state, state_segment, d_output, d_state):
    intra = intra_of(chunk, state_segment)
    delta = delta_of(chunk, intra, state)
    d_delta = transpose(intra.attention) @ d_output + (intra.write * chunk.key) @ d_state
    d_residual = transpose(intra.inverse) @ d_delta
    grads = pull_inputs(chunk, intra, delta, state, d_output, d_state, d_residual)
    d_state = (
        intra.keep * d_state
        + transpose(intra.read * chunk.query) @ d_output
        - transpose(chunk.beta[..., None] * intra.read * chunk.key) @ d_residual
    )
    return grads, d_state


def pull_inputs(chunk, intra, delta, state, d_output, d_state, d_residual):
    """Gradients of a chunk's inputs, head by head; `d_residual` is the cotangent of X^-1 V."""
    q, k, v, _, beta, _ = chunk
    beta = beta[..., None]
    size = beta.shape[-2]
    strict = ops.arange(size)[:, None] > ops.arange(size)[None, :]
    d_attention = d_output @ transpose(delta)
    d_overlap = ops.where(strict, -(d_residual @ transpose(delta)), 0.0)
    d_read_q = d_output @ transpose(state)  # cotangent of r q
    d_read_k = -(d_residual @ transpose(state))  # cotangent of beta r k
    d_write_k = delta @ transpose(d_state)  # cotangent of w k

    d_scores = d_attention * intra.decay  # of q k^T
    d_gram = d_overlap * intra.decay  # of (beta k) k^T
    gram_k = d_gram @ k
    d_query = d_scores @ k + intra.read * d_read_q
    d_key = (
        transpose(d_gram) @ (beta * k)
        + transpose(d_scores) @ q
        + beta * (intra.read * d_read_k + gram_k)
        + intra.write * d_write_k
    )
    d_beta = _dot(intra.read * d_read_k + gram_k, k) + _dot(d_residual, v)

    # Every exponent is a sum of g, so its cotangent is (value) * (cotangent of value).
    d_span = d_overlap * intra.overlap + d_attention * intra.attention
    d_write = _dot(d_write_k, intra.write * k)
    d_total = (
        ops.sum(d_span, axis=-1)
        - ops.sum(d_span, axis=-2)
        + _dot(d_read_q, intra.read * q)
        + _dot(d_read_k, beta * intra.read * k)
        - d_write
    )
    d_end = ops.sum(d_write, axis=-1) + ops.sum(intra.keep * d_state * state, axis=(-2, -1))
    # g_t is in the sums up to t and beyond: a running sum from the end.
    after = ops.sum(d_total, axis=-1, keepdims=True) - ops.cumsum(d_total, axis=-1)
    return (
        ops.sum(d_query, axis=2, keepdims=True),
        ops.sum(d_key, axis=2, keepdims=True),
        beta * d_residual,
        after + d_total + d_end[..., None],
        d_beta,
    )


def unit_lower_inverse(strictly_lower):
    """`(I + A)^-1` for strictly lower triangular `A (..., C, C)`, C a power of two.

    Inverts the diagonal blocks, then doubles them: the inverse of [[a, 0], [l, b]] is
    [[a', 0], [-b' l a', b']]. Only products of exact inverses are formed, never powers of A: a
    Neumann product overflows float32 on correlated keys, where the entries of A are near 1.
    """
    size = strictly_lower.shape[-1]
    block = min(size, MIN_BLOCK)
    inverse = _ladder(_diagonal_blocks(strictly_lower, block, 0), block)  # (..., C/b, b, b)
    while block < size:
        lower = _diagonal_blocks(strictly_lower, 2 * block, block)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -(second @ (lower @ first))
        top = ops.concatenate([first, ops.zeros_like(first)], axis=-1)
        inverse = ops.concatenate([top, ops.concatenate([corner, second], axis=-1)], axis=-2)
        block *= 2
    return inverse[..., 0, :, :]


def _diagonal_blocks(matrix, step, offset):
    """Stacks `matrix[s + offset : s + step, s : s + step - offset]` for s = 0, step, 2 step, ..."""
    starts = range(0, matrix.shape[-1], step)
    blocks = [matrix[..., s + offset : s + step, s : s + step - offset] for s in starts]
    return ops.stack(blocks, axis=-3)


def _ladder(strictly_lower, size):
    """The same doubling on whole matrices, X <- X - X L X, for blocks too small to cut up."""
    rows = ops.arange(size)
    inverse = ops.broadcast_to(ops.eye(size), ops.shape(strictly_lower))
    width = 1
    while width < size:
        pair = rows // width
        in_corner = (pair[:, None] == pair[None, :] + 1) & (pair[:, None] % 2 == 1)
        corner = ops.where(in_corner, strictly_lower, 0.0)
        inverse = inverse - inverse @ (corner @ inverse)
        width *= 2
    return inverse


def transpose(x):
    return ops.swapaxes(x, -1, -2)


def _dot(a, b):
    return ops.sum(a * b, axis=-1)
