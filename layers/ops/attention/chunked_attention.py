"""Attention in blocks of queries and keys with a running softmax, and its backward pass.

For a block of queries the keys are read block by block, up to the last one that any of its queries
sees. m is the running maximum of the scores, l the running sum of exponentials:

    m' = max(m, max_s z_s)    l' = e^{m - m'} l + sum_s e^{z_s - m'}    o' = e^{m - m'} o + ...

The backward pass keeps the outputs and L = m + log l, and recomputes p_s = e^{z_s - L}:

    dV = P^T dO    dZ = P * (dO V^T - rowsum(dO * O))    dQ = scale dZ K    dK = scale dZ^T Q

Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.

Shapes: B batch, G key heads, R query heads a key head, C queries a block, N blocks, S keys.
"""

from typing import NamedTuple

from keras import ops

from ..backend.loops import get_rows, scan, set_rows

FAR = -1e30  # less than any score, but differences of it are not NaN


class Queries(NamedTuple):
    """One block of queries, or with a leading axis N all of them."""

    query: object  # (B, C, G, R, D)
    limits: object  # (B, C) int32
    segments: object  # (B, C) int32


class Keys(NamedTuple):
    key: object  # (B, S, G, D)
    value: object  # (B, S, G, D)
    mask: object  # (B, S) bool
    segments: object  # (B, S) int32


def forward(queries, keys, columns, scale):
    """`Queries` with axis N -> outputs `(N, B, C, G, R, D)`, log-sums `(N, B, G, R C)`."""

    def block(carry, xs):
        own = Queries(*xs)
        query = _rows(own.query)  # (B, G, R C, D)

        def step(number, running):
            top, total, output = running
            key, value, seen, _ = _columns(own, keys, number, columns)
            scores = _scores(query, key, seen, scale)
            new_top = ops.maximum(top, ops.max(scores, axis=-1))
            weights = ops.where(seen, ops.exp(scores - new_top[..., None]), 0.0)
            shrink = ops.exp(top - new_top)
            total = shrink * total + ops.sum(weights, axis=-1)
            read = ops.cast(ops.cast(weights, value.dtype) @ value, "float32")
            return new_top, total, shrink[..., None] * output + read

        sums = ops.zeros(ops.shape(query)[:-1], "float32")
        running = (sums + FAR, sums, ops.zeros(ops.shape(query), "float32"))
        top, total, output = ops.fori_loop(0, _used(own, columns), step, running)
        output = output / ops.maximum(total, 1e-30)[..., None]
        log_sum = top + ops.log(ops.maximum(total, 1e-30))
        output = ops.cast(_heads(output, ops.shape(own.query)), own.query.dtype)
        return carry, (output, log_sum)

    count, batch, rows, groups, repeats, _ = ops.shape(queries.query)
    into = (
        ops.zeros_like(queries.query),
        ops.zeros((count, batch, groups, repeats * rows), "float32"),
    )
    _, (output, log_sum) = scan(block, (), tuple(queries), into)
    return output, log_sum


def backward(queries, keys, output, log_sum, d_output, columns, scale):
    """Gradients of the queries `(N, B, C, G, R, D)`, the keys and the values."""

    def block(carry, xs):
        *own, output, log_sum, d_output = xs
        own = Queries(*own)
        query, d_rows = _rows(own.query), _rows(d_output)
        output = ops.cast(_rows(output), "float32")
        pull = ops.sum(ops.cast(d_rows, "float32") * output, axis=-1, keepdims=True)

        def step(number, running):
            d_query, d_key, d_value = running
            key, value, seen, start = _columns(own, keys, number, columns)
            weights = ops.exp(_scores(query, key, seen, scale) - log_sum[..., None])
            weights = ops.where(seen, weights, 0.0)
            d_weights = ops.cast(d_rows @ ops.swapaxes(value, -1, -2), "float32")
            d_scores = ops.cast(scale * weights * (d_weights - pull), key.dtype)
            weights = ops.cast(weights, value.dtype)
            d_query = d_query + ops.cast(d_scores @ key, "float32")
            d_key = _add(d_key, start, ops.swapaxes(d_scores, -1, -2) @ query)
            d_value = _add(d_value, start, ops.swapaxes(weights, -1, -2) @ d_rows)
            return d_query, d_key, d_value

        running = (ops.zeros(ops.shape(query), "float32"), *carry)
        d_query, *carry = ops.fori_loop(0, _used(own, columns), step, running)
        d_query = ops.cast(_heads(d_query, ops.shape(own.query)), own.query.dtype)
        return tuple(carry), (d_query,)

    shape = ops.shape(keys.key)
    carry = (ops.zeros(shape, "float32"), ops.zeros(shape, "float32"))
    xs = (*queries, output, log_sum, d_output)
    (d_key, d_value), (d_query,) = scan(block, carry, xs, (ops.zeros_like(queries.query),))
    return d_query, ops.cast(d_key, keys.key.dtype), ops.cast(d_value, keys.value.dtype)


def _used(queries, columns):
    """Blocks of keys up to the last one that a query of the block sees."""
    return (ops.max(queries.limits) + columns) // columns


def _columns(queries, keys, number, columns):
    """Keys and values `(B, G, columns, D)` of a block, which queries see them, and its start."""
    nominal = number * columns
    # The last block ends with the last key; what it shares with the one before is not seen again.
    start = ops.minimum(nominal, ops.shape(keys.key)[1] - columns)
    key, value = (ops.swapaxes(get_rows(x, start, columns, axis=1), 1, 2) for x in keys[:2])
    mask, segments = (get_rows(x, start, columns, axis=1)[:, None] for x in keys[2:])
    index = start + ops.arange(columns, dtype="int32")
    seen = mask & (index >= nominal) & (index <= queries.limits[..., None])
    seen = seen & (segments == queries.segments[..., None])  # (B, C, columns)
    repeats = queries.query.shape[3]
    return key, value, ops.tile(seen, (1, repeats, 1))[:, None], start


def _scores(query, key, seen, scale):
    scores = ops.cast(query @ ops.swapaxes(key, -1, -2), "float32") * scale
    return ops.where(seen, scores, FAR)


def _rows(x):
    """`(B, C, G, R, D)` -> `(B, G, R C, D)`."""
    batch, rows, groups, repeats, dim = ops.shape(x)
    return ops.reshape(ops.transpose(x, (0, 2, 3, 1, 4)), (batch, groups, repeats * rows, dim))


def _heads(x, shape):
    """`(B, G, R C, D)` -> `(B, C, G, R, D)`."""
    batch, rows, groups, repeats, dim = shape
    return ops.transpose(ops.reshape(x, (batch, groups, repeats, rows, dim)), (0, 3, 1, 2, 4))


def _add(buffer, start, rows):
    """Adds `(B, G, columns, D)` to `buffer (B, S, G, D)` from key `start` on."""
    rows = ops.cast(ops.swapaxes(rows, 1, 2), "float32")
    old = get_rows(buffer, start, rows.shape[1], axis=1)
    return set_rows(buffer, start, old + rows, axis=1)
