"""The gated delta rule token by token: one step in closed form, or a few in a loop.

run     a few tokens
step    one token
"""

from typing import Annotated

from keras import ops

from ..tensor_types import Tensor
from .delta_inputs import DeltaInputs


def run(
    inputs: DeltaInputs, state: Annotated[Tensor, "B G R K V"]
) -> tuple[Annotated[Tensor, "B T H V"], Annotated[Tensor, "B H K V"]]:
    """`step` over the tokens of inputs by group, unrolled: T is static and small."""

    def tokens(x):
        batch, length, groups, repeats, *dims = ops.shape(x)
        x = ops.reshape(x, (batch, length, groups * repeats, *dims))  # (B, T, H, ...)
        return ops.unstack(ops.moveaxis(x, 1, 0), axis=0)

    # One query and key per value head: shared ones would make XLA transpose the state to share it.
    repeats = inputs.value.shape[3]
    query, key = (ops.repeat(x, repeats, axis=3) for x in (inputs.query, inputs.key))
    inputs = inputs._replace(query=query, key=key)
    batch, groups, _, *dims = ops.shape(state)
    state = ops.reshape(state, (batch, groups * repeats, *dims))
    outputs = []
    for token in zip(*map(tokens, inputs[:5])):
        output, state = step(DeltaInputs(*token), state)
        outputs.append(output)
    return ops.moveaxis(ops.stack(outputs, axis=0), 0, 1), state


def step(
    token: DeltaInputs, state: Annotated[Tensor, "B H K V"]
) -> tuple[Annotated[Tensor, "B H V"], Annotated[Tensor, "B H K V"]]:
    """One token: `S' = a S + k d^T`, `d = beta (v - a S^T k)`, `o = S'^T q`, `a = exp(g)`.

    `o` is taken from the old state, `a S^T q + (q . k) d`, and the decay is applied to what was
    read, so that S is read once and written once.

    Args:
        token: query and key `(B, H, K)`, value `(B, H, V)`, log decay and beta `(B, H)`, float32.
        state: `(B, H, K, V)` float32.

    Returns:
        `(output, state)`.
    """
    query, key, value, log_decay, beta, _ = token
    decay = ops.exp(log_decay)
    both = ops.stack([key, query], axis=-2)  # (B, H, 2, K)
    recalled = decay[..., None, None] * (both @ state)  # (B, H, 2, V)
    delta = beta[..., None] * (value - recalled[..., 0, :])
    overlap = ops.sum(query * key, axis=-1, keepdims=True)  # (B, H, 1)
    output = recalled[..., 1, :] + overlap * delta
    return output, decay[..., None, None] * state + key[..., None] * delta[..., None, :]
