"""One chunk of the gated delta rule: the matrices it is made of, and the gradients of its inputs.

Notation, per value head and chunk of C tokens: S is the state `(K, V)` at the start of the chunk,

    D_ij = exp(g_{j+1} + ... + g_i)   for i >= j in the same segment, else 0
    r_i  = exp(g_1 + ... + g_i)       how much of S token i still sees
    w_i  = exp(g_{i+1} + ... + g_C)   how much of token i's write is left at the end
    e    = exp(g_1 + ... + g_C)       the chunk decay, how much of S is left at the end

    A = stril(beta_i (k_i . k_j) D_ij)      X = (I + A)^-1       P = tril((q_i . k_j) D_ij)
    V = X (beta v - beta r k S)             the rows that the C rank-one updates write
    O = r q S + P V                         S' = e S + (w k)^T V

r, w and e are 0 across a segment boundary. Against the textbook WY form this is one matrix product
fewer and has no U, W buffers. Chunks: Gated Delta Networks, arXiv 2412.06464, section 3.3.

X is never differentiated: with `d_residual = X^T dV`, dA = -stril(d_residual V^T).

All tensors are by head (see `delta_inputs`), float32.

    chunk_terms        D, r, w, e, A, X and P
    written_rows       V
    input_gradients    of query, key, value, log decay and beta
"""

from typing import Annotated, NamedTuple

from keras import ops

from ..sums import row_sums
from ..tensor_types import Tensor
from .delta_inputs import DeltaInputs
from .triangular_inverse import unit_lower_inverse


class ChunkTerms(NamedTuple):
    """What a chunk is made of besides its inputs, float32.

    Attributes:
        decay: `(B, G, R, C, C)`, D.
        read_decay: `(B, G, R, C, 1)`, r.
        write_decay: `(B, G, R, C, 1)`, w.
        chunk_decay: `(B, G, R, 1, 1)`, e.
        overlap: `(B, G, R, C, C)`, A.
        inverse: `(B, G, R, C, C)`, X.
        attention: `(B, G, R, C, C)`, P.
    """

    decay: Tensor
    read_decay: Tensor
    write_decay: Tensor
    chunk_decay: Tensor
    overlap: Tensor
    inverse: Tensor
    attention: Tensor


class ProductGradients(NamedTuple):
    """Gradients of the products that a chunk's inputs enter, float32.

    Attributes:
        attention: `(B, G, R, C, C)`, of P.
        overlap: `(B, G, R, C, C)`, of A.
        read_query: `(B, G, R, C, K)`, of r q.
        read_key: `(B, G, R, C, K)`, of beta r k.
        write_key: `(B, G, R, C, K)`, of w k.
    """

    attention: Tensor
    overlap: Tensor
    read_query: Tensor
    read_key: Tensor
    write_key: Tensor


def chunk_terms(chunk: DeltaInputs, state_segment: Annotated[Tensor, "B"]) -> ChunkTerms:
    """The terms of a chunk whose incoming state belongs to the segment `state_segment`."""
    size = chunk.log_decay.shape[-1]
    rows = ops.arange(size)
    lower = rows[:, None] >= rows[None, :]
    strict = rows[:, None] > rows[None, :]
    # Summing g over (j, i] directly: differences of a running sum lose small decays behind a
    # strong one (a sum of -3000 in float32 is only good to 2e-4).
    span = ops.where(lower, chunk.log_decay[..., None, :], 0.0) @ ops.cast(strict, "float32")
    segment = chunk.segment[:, None, None, :]  # (B, 1, 1, C)
    same = segment[..., :, None] == segment[..., None, :]
    # Masked before exp: above the diagonal the sums would be of the wrong tokens, and afterwards
    # inf * 0 would poison the gradients.
    decay = ops.exp(ops.where(lower & same, span, -float("inf")))
    since_start = ops.cumsum(chunk.log_decay, axis=-1)
    seen = segment == state_segment[:, None, None, None]
    read_decay = ops.where(seen, ops.exp(since_start), 0.0)
    overlap = chunk.key @ transpose(chunk.key)  # (B, G, 1, C, C), once per key head
    overlap = ops.where(strict, chunk.beta[..., None] * overlap * decay, 0.0)
    return ChunkTerms(
        decay=decay,
        read_decay=read_decay[..., None],
        write_decay=decay[..., -1, :, None],
        chunk_decay=read_decay[..., -1, None, None],
        overlap=overlap,
        inverse=unit_lower_inverse(overlap),
        attention=(chunk.query @ transpose(chunk.key)) * decay,
    )


def written_rows(
    chunk: DeltaInputs, terms: ChunkTerms, state: Annotated[Tensor, "B G R K V"]
) -> Annotated[Tensor, "B G R C V"]:
    """V: the rows that the tokens of a chunk write under their keys."""
    recalled = (terms.read_decay * chunk.key) @ state
    return terms.inverse @ (chunk.beta[..., None] * (chunk.value - recalled))


def input_gradients(
    chunk: DeltaInputs,
    terms: ChunkTerms,
    delta: Annotated[Tensor, "B G R C V"],
    state: Annotated[Tensor, "B G R K V"],
    d_output: Annotated[Tensor, "B G R C V"],
    d_state: Annotated[Tensor, "B G R K V"],
    d_residual: Annotated[Tensor, "B G R C V"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log decay and beta, by head.

    `delta` is V, `d_state` the gradient of the state behind the chunk, `d_residual` that of
    `X^-1 V`. Queries and keys are shared by the R value heads of a group: there they are summed.
    """
    q, k, v = chunk.query, chunk.key, chunk.value
    beta = chunk.beta[..., None]
    rows = ops.arange(beta.shape[-2])
    strict = rows[:, None] > rows[None, :]
    products = ProductGradients(
        attention=d_output @ transpose(delta),
        overlap=ops.where(strict, -(d_residual @ transpose(delta)), 0.0),
        read_query=d_output @ transpose(state),
        read_key=-(d_residual @ transpose(state)),
        write_key=delta @ transpose(d_state),
    )
    d_scores = products.attention * terms.decay  # of q k^T
    d_gram = products.overlap * terms.decay  # of (beta k) k^T
    d_beta_key = terms.read_decay * products.read_key + d_gram @ k  # of beta k
    d_query = d_scores @ k + terms.read_decay * products.read_query
    d_key = (
        transpose(d_gram) @ (beta * k)
        + transpose(d_scores) @ q
        + beta * d_beta_key
        + terms.write_decay * products.write_key
    )
    return (
        _over_heads(d_query),
        _over_heads(d_key),
        beta * d_residual,
        _log_decay_gradient(chunk, terms, products, state, d_state),
        _dot(d_beta_key, k) + _dot(d_residual, v),
    )


def _log_decay_gradient(
    chunk: DeltaInputs,
    terms: ChunkTerms,
    products: ProductGradients,
    state: Annotated[Tensor, "B G R K V"],
    d_state: Annotated[Tensor, "B G R K V"],
) -> Annotated[Tensor, "B G R C"]:
    """Every exponent is a sum of g: its gradient is exp(exponent) times the gradient of that.

    g_t is in the exponents of r_i for i >= t, of w_j for j < t, of D_ij for j < t <= i and of the
    chunk decay. Each is summed as it stands: differences of running sums would lose small
    gradients behind large ones.
    """
    q, k, beta = chunk.query, chunk.key, chunk.beta[..., None]
    rows = ops.arange(beta.shape[-2])
    from_here = ops.cast(rows[:, None] <= rows[None, :], "float32")  # (C, C), sums over i >= t
    before = rows[:, None] > rows[None, :]
    d_span = products.overlap * terms.overlap + products.attention * terms.attention
    d_read = terms.read_decay * (products.read_query * q + products.read_key * (beta * k))
    d_write = _dot(products.write_key, terms.write_decay * k)
    *heads, key_dim, value_dim = ops.shape(state)
    d_chunk_decay = row_sums(ops.reshape(d_state * state, (*heads, key_dim * value_dim)))
    return (
        row_sums(ops.where(before, from_here @ d_span, 0.0))
        + (from_here @ row_sums(d_read)[..., None])[..., 0]
        + (ops.cast(before, "float32") @ d_write[..., None])[..., 0]
        + terms.chunk_decay[..., 0] * d_chunk_decay[..., None]
    )


def transpose(x: Tensor) -> Tensor:
    """Matrices with their last two axes swapped."""
    return ops.swapaxes(x, -1, -2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return row_sums(a * b)


def _over_heads(x: Annotated[Tensor, "B G R ..."]) -> Annotated[Tensor, "B G 1 ..."]:
    """The sum over the value heads of a group, without a reduction, see `sums`."""
    return sum((x[:, :, i : i + 1] for i in range(1, x.shape[2])), x[:, :, :1])
