"""The gated delta rule token by token: one step in closed form, or a few in a loop."""

from keras import ops


def step(query, key, value, decay, beta, state):
    """One token: `S' = a S + k d^T`, `d = beta (v - a S^T k)`, `o = S'^T q`.

    `o` is taken from the old state, `a S^T q + (q . k) d`, so that S is read once and written once.

    Args:
        query, key: `(B, G, 1, K)` float32.
        value: `(B, G, R, V)` float32.
        decay, beta: `(B, G, R)` float32; `decay` is `a = exp(g)`.
        state: `(B, G, R, K, V)` float32.

    Returns:
        `(output (B, G, R, V), state)`.
    """
    state = decay[..., None, None] * state
    both = ops.concatenate([key, query], axis=-2)[:, :, None]  # (B, G, 1, 2, K)
    recalled = both @ state  # (B, G, R, 2, V)
    delta = beta[..., None] * (value - recalled[..., 0, :])
    overlap = ops.sum(query * key, axis=-1, keepdims=True)  # (B, G, 1, 1)
    output = recalled[..., 1, :] + overlap * delta
    return output, state + key[..., None] * delta[..., None, :]


def run(query, key, value, decay, beta, state):
    """`step` over a leading axis of T tokens, unrolled: `T` is static and small."""
    outputs = []
    for xs in zip(*(ops.unstack(x, axis=0) for x in (query, key, value, decay, beta))):
        output, state = step(*xs, state)
        outputs.append(output)
    return ops.stack(outputs, axis=0), state
