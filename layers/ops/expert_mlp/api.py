"""The routed experts of a mixture: every token goes through the experts it was sent to.

y_n = sum_k w_nk * (act(x_n G_e) * (x_n U_e)) D_e        e = expert_nk,  [G_e | U_e] = gate_up_e
"""

import functools

from keras import ops

from ..backend.autodiff import custom_gradient
from ..checks import require_shape
from ..grouped_matmul import grouped_matmul
from ..grouped_matmul.api import pick
from ..grouped_matmul.tiles import tile_sizes
from ..rows import take_rows
from . import tiled_experts as tiled
from .activations import ACTIVATIONS


def expert_mlp(x, gate_up, down, experts, weights, *, activation="silu", implementation=None):
    """Runs every token through its K experts and adds up the weighted results.

    The N K (token, expert) pairs are sorted by expert; only experts in use are read, no pair is
    dropped, and the work grows with K, not with E.

    Args:
        x: `(N, D)`.
        gate_up: `(E, D, 2F)`, the gate's half first.
        down: `(E, F, D)`.
        experts: `(N, K)` integers; E means no expert at all.
        weights: `(N, K)`; 0 where there is no expert.
        activation: `"silu"` or `"gelu"` (exact), on the gate.
        implementation: `"tiled"` (one loop over tiles of pairs), `"ragged_dot"` or `None`, see
            `grouped_matmul`.

    Returns:
        `(y (N, D) in the dtype of x, load (E,) int32)`, the load being the tokens of every expert.

    Raises:
        ValueError: shapes that do not fit together, an unknown activation or implementation.
    """
    require_shape("x", x, (None, None))
    require_shape("gate_up", gate_up, (None, x.shape[1], None))
    require_shape("down", down, (gate_up.shape[0], gate_up.shape[2] // 2, x.shape[1]))
    require_shape("experts", experts, (x.shape[0], None))
    require_shape("weights", weights, experts.shape)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"`activation` must be one of {sorted(ACTIVATIONS)}. Received: {activation=}"
        )
    implementation = pick(implementation)
    gate_up, down, weights = (ops.cast(w, x.dtype) for w in (gate_up, down, weights))
    count, choices = gate_up.shape[0], experts.shape[1]
    flat = ops.cast(ops.reshape(experts, (-1,)), "int32")
    order = ops.cast(ops.argsort(flat), "int32")
    places = ops.reshape(ops.cast(ops.argsort(order), "int32"), (-1, choices))
    bounds = ops.searchsorted(ops.take(flat, order), ops.arange(count + 1, dtype="int32"))
    bounds = ops.cast(bounds, "int32")
    load = bounds[1:] - bounds[:-1]

    if implementation == "tiled":
        function = _differentiable(tile_sizes(flat.shape[0], count), activation)
        return function(x, gate_up, down, weights, order, places, load), load

    rows = take_rows(x, order // choices, places)  # (N K, D)
    options = {"implementation": implementation}
    gate, up = ops.split(grouped_matmul(rows, gate_up, load, **options), 2, axis=-1)
    rows = grouped_matmul(ACTIVATIONS[activation][0](gate) * up, down, load, **options)
    rows = take_rows(rows, ops.reshape(places, (-1,)), ops.expand_dims(order, -1))
    rows = ops.reshape(rows, (-1, choices, x.shape[1]))
    return ops.sum(ops.expand_dims(weights, -1) * rows, axis=1), load


@functools.cache
def _differentiable(sizes, activation):
    def run(x, gate_up, down, weights, *grouping, keep):
        grouping = tiled.Grouping(*grouping)
        return tiled.forward(x, gate_up, down, weights, grouping, sizes, activation, keep)

    def primal(*inputs):
        return run(*inputs, keep=False)[0]

    def forward(*inputs):
        output, gated = run(*inputs, keep=True)
        return output, (*inputs, gated)

    def backward(residuals, d_output):
        x, gate_up, down, weights, *grouping, gated = residuals
        grads = tiled.backward(
            x, gate_up, down, weights, tiled.Grouping(*grouping), gated, d_output, sizes, activation
        )
        return (*grads, None, None, None)

    return custom_gradient(forward, backward, primal)
