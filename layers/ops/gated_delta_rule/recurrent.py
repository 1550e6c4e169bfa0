"""The gated delta rule token by token: one step in closed form, or a few in a loop."""

from keras import ops


def step(query, key, value, decay, beta, state):
    """One token: `S' = a S + k d^T`, `d = beta (v - a S^T k)`, `o = S'^T q`.

    `o` is taken from the old state, `a S^T q + (q . k) d`, and the decay is applied to what was
    read, so that S is read once and written once.

    Args:
        query, key: `(B, H, K)` float32.
        value: `(B, H, V)` float32.
        decay, beta: `(B, H)` float32; `decay` is `a = exp(g)`.
        state: `(B, H, K, V)` float32.

    Returns:
        `(output (B, H, V), state)`.
    """
    both = ops.stack([key, query], axis=-2)  # (B, H, 2, K)
    recalled = decay[..., None, None] * (both @ state)  # (B, H, 2, V)
    delta = beta[..., None] * (value - recalled[..., 0, :])
    overlap = ops.sum(query * key, axis=-1, keepdims=True)  # (B, H, 1)
    output = recalled[..., 1, :] + overlap * delta
    return output, decay[..., None, None] * state + key[..., None] * delta[..., None, :]


def run(query, key, value, decay, beta, state):
    """`step` over a leading axis of T tokens, unrolled: `T` is static and small."""
    outputs = []
    for xs in zip(*(ops.unstack(x, axis=0) for x in (query, key, value, decay, beta))):
        output, state = step(*xs, state)
        outputs.append(output)
    return ops.stack(outputs, axis=0), state
