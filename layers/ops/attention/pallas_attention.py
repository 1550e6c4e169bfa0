"""Attention as kernels of a GPU, written in Pallas for JAX.

The equations are those of `chunked_attention`. A program holds a block of queries of one head, or
of keys of one key head, and walks over the blocks of the other, from the first that it meets to the
last (see `meetings`), so that packed sequences cost about what they would one by one. What it sums
stays in its registers:

    forward     O and L, a program per block of queries
    backward    dQ, a program per block of queries
                dK and dV, a program per block of keys, over all query heads that read them

Scores and sums are float32. Triton compiles the kernels; on a CPU Pallas interprets them, for
tests.

Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.

Shapes: B batch, T queries, S keys, H query heads, G key heads, D numbers of a head; N blocks of
queries, M blocks of keys.
"""

import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ..backend.platform import run_kernel
from ..padding import to_blocks
from ..tensor_types import Tensor
from .attention_blocks import FAR, MOST, Keys, Queries, meetings, span

# Of `jax.lax.DotAlgorithmPreset`: one pass of tf32 would keep 10 bits of a float32's mantissa.
FLOAT32_PRODUCTS = "TF32_TF32_F32_X3"
NOWHERE = MOST  # the place of a key that no query sees
NARROWEST = 16  # Triton multiplies no narrower matrices


class Blocks(NamedTuple):
    """What a program holds of queries and keys."""

    queries: int
    keys: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """Blocks of the three kernels."""

    forward: Blocks
    of_queries: Blocks
    of_keys: Blocks


# By the bytes of one head of a token, up to which they fit a multiprocessor, see
# `benchmarks/results/gpu`. The three passes of a float32 need room of their own.
_NARROW = Sizes(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))
_PUBLISHED = Sizes(Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 8, 1))
_WIDE = Sizes(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1))
HALF = {256: _NARROW, 512: _PUBLISHED, 1024: _WIDE}
FLOAT32 = {256: _NARROW, 1024: _WIDE}


class Places(NamedTuple):
    """What decides which query sees which key, all int32.

    Attributes:
        limits: `(B, T)`, the last key that a token sees.
        query_segments: `(B, T)`.
        keys: `(B, S)`, the number of a key, `NOWHERE` for one that may not be seen.
        key_segments: `(B, S)`.
    """

    limits: Tensor
    query_segments: Tensor
    keys: Tensor
    key_segments: Tensor


def sizes_for(dim: int, dtype: Any) -> Sizes | None:
    """Blocks for heads of `dim` numbers, `None` where there are none."""
    width = _width(dim) * jnp.dtype(dtype).itemsize
    found = FLOAT32 if dtype == "float32" else HALF
    return next((sizes for widest, sizes in found.items() if width <= widest), None)


def forward(
    queries: Queries, keys: Keys, sizes: Sizes, scale: float
) -> tuple[Annotated[Tensor, "B T H D"], Annotated[Tensor, "B H T"]]:
    """Outputs and the log-sum-exp of the scores."""
    query, (key, value) = queries.query, keys[:2]
    batch, length, heads, _ = query.shape
    shapes = (
        jax.ShapeDtypeStruct(query.shape, value.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), "float32"),
    )
    places, blocks = _places(queries, keys), sizes.forward
    bounds = span(_meetings(queries, keys, blocks), axis=1)
    kernel = functools.partial(_forward_kernel, blocks=blocks, scale=scale)
    programs = batch * heads * pl.cdiv(length, blocks.queries)
    return _run(kernel, programs, blocks, shapes, bounds, places, query, key, value)


def backward(
    queries: Queries,
    keys: Keys,
    output: Annotated[Tensor, "B T H D"],
    lse: Annotated[Tensor, "B H T"],
    d_output: Annotated[Tensor, "B T H D"],
    sizes: Sizes,
    scale: float,
) -> tuple[
    Annotated[Tensor, "B T H D"], Annotated[Tensor, "B S G D"], Annotated[Tensor, "B S G D"]
]:
    """Gradients of the queries, the keys and the values."""
    query, (key, value) = queries.query, keys[:2]
    batch, length, heads, _ = query.shape
    count, groups = key.shape[1:3]
    row_dot = jnp.sum(d_output.astype("float32") * output.astype("float32"), axis=-1)
    inputs = query, key, value, d_output, lse, jnp.swapaxes(row_dot, 1, 2)
    places = _places(queries, keys)

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    blocks = sizes.of_queries
    kernel = functools.partial(_query_gradient_kernel, blocks=blocks, scale=scale)
    programs = batch * heads * pl.cdiv(length, blocks.queries)
    bounds = span(_meetings(queries, keys, blocks), axis=1)
    (d_query,) = _run(kernel, programs, blocks, (like(query),), bounds, places, *inputs)

    blocks = sizes.of_keys
    kernel = functools.partial(_key_gradient_kernel, blocks=blocks, scale=scale)
    programs = batch * groups * pl.cdiv(count, blocks.keys)
    bounds = span(_meetings(queries, keys, blocks), axis=0)
    shapes = like(key), like(value)
    return d_query, *_run(kernel, programs, blocks, shapes, bounds, places, *inputs)


def _forward_kernel(firsts, ends, *refs, blocks, scale):
    *places, query, key, value, output, lse = refs
    row, head, block, group = _query_block(query, key, blocks)
    tokens = _query_tokens(query, block, blocks)
    own = _load(query, row, tokens, head)
    limits, segments = _query_places(places, row, tokens)

    def step(i, running):
        row_max, row_sum, total = running
        seen_tokens = _key_tokens(key, i, blocks)
        seen = _seen(places, row, seen_tokens, limits[:, None], segments[:, None], (None, ...))
        scores = _dot(own, _load(key, row, seen_tokens, group).T) * scale
        scores = jnp.where(seen, scores, FAR)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - new_max[:, None]), 0.0)
        shrink = jnp.exp(row_max - new_max)
        row_sum = shrink * row_sum + jnp.sum(weights, axis=1)
        read = _dot(weights.astype(value.dtype), _load(value, row, seen_tokens, group))
        return new_max, row_sum, shrink[:, None] * total + read

    zeros = jnp.zeros((blocks.queries,), "float32")
    running = zeros + FAR, zeros, jnp.zeros(own.shape, "float32")
    bounds = firsts[block, row], ends[block, row]
    row_max, row_sum, total = jax.lax.fori_loop(*bounds, step, running)
    row_sum = jnp.maximum(row_sum, 1e-30)
    _store(output, row, tokens, head, total / row_sum[:, None])
    at = lse.at[row, head, tokens.number]
    triton.store(at, row_max + jnp.log(row_sum), mask=tokens.known)


def _query_gradient_kernel(firsts, ends, *refs, blocks, scale):
    *places, query, key, value, d_output, lse, row_dot, d_query = refs
    row, head, block, group = _query_block(query, key, blocks)
    tokens = _query_tokens(query, block, blocks)
    own, d_own = (_load(x, row, tokens, head) for x in (query, d_output))
    own_lse, own_dot = (_vector(x, (row, head), tokens)[:, None] for x in (lse, row_dot))
    limits, segments = _query_places(places, row, tokens)

    def step(i, total):
        seen_tokens = _key_tokens(key, i, blocks)
        seen = _seen(places, row, seen_tokens, limits[:, None], segments[:, None], (None, ...))
        keys = _load(key, row, seen_tokens, group)
        scores = jnp.where(seen, _dot(own, keys.T) * scale, FAR)
        weights = jnp.where(seen, jnp.exp(scores - own_lse), 0.0)
        d_weights = _dot(d_own, _load(value, row, seen_tokens, group).T)
        d_scores = scale * weights * (d_weights - own_dot)
        return total + _dot(d_scores.astype(key.dtype), keys)

    total = jnp.zeros(own.shape, "float32")
    total = jax.lax.fori_loop(firsts[block, row], ends[block, row], step, total)
    _store(d_query, row, tokens, head, total)


def _key_gradient_kernel(firsts, ends, *refs, blocks, scale):
    """With the matrices of weights turned round: keys by queries."""
    *places, query, key, value, d_output, lse, row_dot, d_key, d_value = refs
    # The first keys are seen by most queries: their programs start first.
    groups, repeats = key.shape[2], query.shape[2] // key.shape[2]
    block, rest = _divide(pl.program_id(0), key.shape[0] * groups)
    row, group = _divide(rest, groups)
    tokens = _key_tokens(key, block, blocks)
    own_key, own_value = (_load(x, row, tokens, group) for x in (key, value))
    first, end = firsts[block, row], ends[block, row]

    def step(i, totals):
        d_key, d_value = totals
        number, repeat = _divide(i, repeats)
        head = group * repeats + repeat
        seeing = _query_tokens(query, first + number, blocks)
        limits, segments = _query_places(places, row, seeing)
        seen = _seen(places, row, tokens, limits[None], segments[None], (..., None))
        queries, d_rows = (_load(x, row, seeing, head) for x in (query, d_output))
        own_lse, own_dot = (_vector(x, (row, head), seeing)[None] for x in (lse, row_dot))
        scores = jnp.where(seen, _dot(own_key, queries.T) * scale, FAR)
        weights = jnp.where(seen, jnp.exp(scores - own_lse), 0.0)
        d_value = d_value + _dot(weights.astype(value.dtype), d_rows)
        d_weights = _dot(own_value, d_rows.T)
        d_scores = scale * weights * (d_weights - own_dot)
        return d_key + _dot(d_scores.astype(key.dtype), queries), d_value

    zeros = jnp.zeros(own_key.shape, "float32")
    steps = jnp.maximum(end - first, 0) * repeats
    totals = jax.lax.fori_loop(0, steps, step, (zeros, zeros))
    for ref, total in zip((d_key, d_value), totals):
        _store(ref, row, tokens, group, total)


def _places(queries: Queries, keys: Keys) -> Places:
    number = jnp.arange(keys.mask.shape[1], dtype="int32")
    limits = jnp.minimum(queries.limits, len(number) - 1)
    place = jnp.where(keys.mask, number, NOWHERE)
    return Places(limits, queries.segments, place, keys.segments)


def _meetings(queries: Queries, keys: Keys, blocks: Blocks) -> Annotated[Tensor, "N M B"]:
    limits = to_blocks(queries.limits, blocks.queries, fill=-1)
    segments = to_blocks(queries.segments, blocks.queries)
    return meetings(limits, segments, keys, blocks.keys)


def _query_block(query, key, blocks):
    """Row, head, block and key head of a program. The last queries see most and start first."""
    heads, count = query.shape[2], pl.cdiv(query.shape[1], blocks.queries)
    before, rest = _divide(pl.program_id(0), query.shape[0] * heads)
    row, head = _divide(rest, heads)
    return row, head, count - 1 - before, jax.lax.div(head, heads // key.shape[2])


class Tokens(NamedTuple):
    """Numbers of tokens, and which of them there are (`None` for all)."""

    number: Tensor
    known: Tensor | None


def _query_tokens(query, block, blocks) -> Tokens:
    return _tokens(block, blocks.queries, query.shape[1])


def _key_tokens(key, block, blocks) -> Tokens:
    return _tokens(block, blocks.keys, key.shape[1])


def _tokens(block, size: int, count: int) -> Tokens:
    number = block * size + jnp.arange(size, dtype="int32")
    return Tokens(number, number < count if count % size else None)


def _query_places(places, row, tokens):
    # What is behind the last token sees nothing.
    return _vector(places[0], (row,), tokens, -1), _vector(places[1], (row,), tokens)


def _seen(places, row, tokens, limits, segments, axes):
    """Which queries see which keys, in the order of the axes that are given."""
    place = _vector(places[2], (row,), tokens, NOWHERE)[axes]
    return (place <= limits) & (_vector(places[3], (row,), tokens)[axes] == segments)


def _load(ref, row, tokens: Tokens, head):
    """`ref[row, tokens, head]` as a matrix, zeros where there is nothing."""
    return _load_at(*_matrix(ref, row, tokens, head))


def _store(ref, row, tokens: Tokens, head, values):
    at, mask = _matrix(ref, row, tokens, head)
    triton.store(at, values.astype(ref.dtype), mask=mask)


def _matrix(ref, row, tokens, head):
    dim = ref.shape[3]
    column = jnp.arange(_width(dim), dtype="int32")
    mask = None if tokens.known is None else tokens.known[:, None]
    if len(column) != dim:
        there = (column < dim)[None]
        mask = there if mask is None else mask & there
    if mask is not None:
        mask = jnp.broadcast_to(mask, (len(tokens.number), len(column)))
    return ref.at[row, tokens.number[:, None], head, column[None]], mask


def _vector(ref, before, tokens, missing=0):
    """`ref[*before, tokens]`, `missing` behind the last."""
    return _load_at(ref.at[(*before, tokens.number)], tokens.known, missing)


def _load_at(at, mask, missing=0):
    return triton.load(at, mask=mask, other=None if mask is None else missing)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type="float32")


def _divide(number, by: int):
    return jax.lax.div(number, by), jax.lax.rem(number, by)


def _width(dim: int) -> int:
    return max(NARROWEST, 1 << (dim - 1).bit_length())


def _run(kernel, programs: int, blocks: Blocks, shapes, bounds, places, *arrays):
    if not programs:  # no rows: a kernel without programs does not start
        return tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)
    options = triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    is_float32 = arrays[0].dtype == "float32"

    def run(*inputs, interpret):
        precise = "highest" if interpret else FLOAT32_PRODUCTS
        with jax.default_matmul_precision(precise if is_float32 else None):
            return pl.pallas_call(
                kernel,
                shapes,
                grid=(programs,),
                compiler_params=options,
                interpret=interpret,
                name=kernel.func.__name__.strip("_"),
            )(*inputs)

    return run_kernel(run, *bounds, *places, *arrays)
