"""The routed experts of an MoE layer: every token goes through the experts it was sent to.

    y_n = sum_k w_nk * (act(x_n G_e) * (x_n U_e)) D_e      e = experts_nk,  [G_e | U_e] = gate_up_e

Public: `expert_mlp`.
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any

from keras import ops

from qwen3_next.config.validation import one_of, require

from ..activations import ACTIVATIONS
from ..backend.autodiff import custom_gradient
from ..backend.platform import choose, has_pallas, platform
from ..backend.sharding import devices
from ..checks import as_floats, require_shape, to_integers
from ..grouped_matmul.api import IMPLEMENTATIONS as OF_GROUPED_MATMUL
from ..grouped_matmul.api import pick
from ..grouped_matmul.tiles import tile_sizes
from ..padding import pad_end
from ..tensor_types import Tensor
from . import experts_in_place, grouped_experts, spread_experts, tiled_experts
from .experts_in_place import PairInputs
from .spread_experts import Spread
from .tiled_experts import ExpertInputs, sort_by_expert

IMPLEMENTATIONS = ("in_place", *OF_GROUPED_MATMUL)
# Pairs per expert. With 8 to 512 experts of 0.8 to 25 MB, on two cores, up to two were 1.1 to 3
# times as fast as tiles in float32, and 1.2 to 4 times in bfloat16; from four on it depends.
MOST_IN_PLACE = 2


def expert_mlp(
    x: Annotated[Tensor, "N D"],
    gate_up: Annotated[Tensor, "E D 2F"],
    down: Annotated[Tensor, "E F D"],
    experts: Annotated[Tensor, "N K"],
    weights: Annotated[Tensor, "N K"],
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> tuple[Annotated[Tensor, "N D"], Annotated[Tensor, "E"]]:
    """Runs every token through its K experts and adds up the weighted results.

    The N K (token, expert) pairs are sorted by expert; only experts in use are read, no pair is
    dropped, and the work grows with K, not with E.

    Args:
        x: `(N, D)`.
        gate_up: `(E, D, 2F)`, the gate's half first.
        down: `(E, F, D)`.
        experts: `(N, K)` integers, K at least 1; what is not in [0, E) means no expert at all.
        weights: `(N, K)`; 0 where there is no expert.
        activation: `"silu"` or `"gelu"` (exact), on the gate.
        implementation: `"tiled"` (one loop over tiles of pairs), `"in_place"` (every pair reads its
            expert where it stands: for a few pairs), `"ragged_dot"` or `"pallas"` (see
            `grouped_matmul`), or `None`: in place on a CPU for up to two pairs per expert, N K
            <= 2 E, else as `grouped_matmul` chooses; on the devices of a `keras.distribution`
            `"pallas"` if they are GPUs, and `"tiled"` elsewhere.

    Returns:
        `(y, tokens_per_expert)`: `(N, D)` in the dtype of x and `(E,)` int32.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit, an unknown activation or implementation, or
            one that cannot run on these devices or without a known number of tokens.
    """
    x, weights = as_floats("x", x), as_floats("weights", weights)
    gate_up, down = as_floats("gate_up", gate_up), as_floats("down", down)
    require_shape("x", x, (None, None))
    require_shape("gate_up", gate_up, (None, x.shape[1], None))
    require_shape("down", down, (gate_up.shape[0], gate_up.shape[2] // 2, x.shape[1]))
    require_shape("gate_up", gate_up, (None, None, 2 * down.shape[1]))
    experts = to_integers("experts", experts)
    require_shape("experts", experts, (x.shape[0], None))
    if experts.shape[1] == 0:
        raise ValueError(
            "`experts` must hold at least one expert per token. "
            f"Received: experts.shape={tuple(experts.shape)}"
        )
    require_shape("weights", weights, experts.shape)
    require(one_of(sorted(ACTIVATIONS)), "activation", activation)
    found, count, rows = devices(), gate_up.shape[0], ops.shape(x)[0]
    if not isinstance(rows, int) or rows == 0:
        # There may be none, of which XLA cannot gather: one more, which is sent nowhere.
        x, weights = pad_end(x, 1), pad_end(weights, 1)
        experts = pad_end(experts, 1, fill=count)
    implementation = _pick(implementation, experts.shape, count, found is not None)
    # Sorted, those of no expert come last.
    experts = ops.where((experts >= 0) & (experts < count), experts, count)
    if implementation == "in_place":
        output = _in_place(activation)(x, gate_up, down, weights, experts)
        return output[:rows], _tokens_per_expert(experts, count)
    gate_up, down, weights = (ops.cast(w, x.dtype) for w in (gate_up, down, weights))
    if found is not None:
        axes = found.rows(x.shape[0]), found.experts(count)
        columns = found.columns(x.shape[1], axes[1], axes[0])
        how = Spread(found, *axes, columns, by_kernels=implementation == "pallas")
        output, tokens = spread_experts.run(x, gate_up, down, experts, weights, activation, how)
        return output[:rows], tokens
    inputs = ExpertInputs(x, gate_up, down, weights, *sort_by_expert(experts, count))
    if implementation == "tiled":
        sizes = tile_sizes(inputs.sort_indices.shape[0], count)
        output = _differentiable(sizes, activation)(*inputs)
    else:
        output = grouped_experts.run(inputs, activation, implementation)
    return output[:rows], inputs.tokens_per_expert


def _pick(implementation: str | None, pairs: Any, count: int, spread: bool) -> str:
    """The implementation for pairs `(N, K)` of `count` experts.

    `spread`: whether these are over devices.
    """
    rows = None if None in pairs else math.prod(pairs)
    if implementation is None:
        if spread:
            return "pallas" if platform() == "gpu" and has_pallas() else "tiled"
        few = rows is not None and rows <= MOST_IN_PLACE * count and platform() == "cpu"
        return "in_place" if few else pick(None, rows)
    choose(implementation, IMPLEMENTATIONS, "")
    if spread and implementation not in ("tiled", "pallas"):
        raise ValueError(
            "Experts that are spread over devices need implementation='tiled' or 'pallas'. "
            f"Received: {implementation=}"
        )
    if implementation == "in_place" and rows is None:
        raise ValueError(
            "implementation='in_place' needs a known number of tokens. "
            f"Received: experts.shape={tuple(pairs)}"
        )
    return implementation if implementation == "in_place" else pick(implementation, rows)


def _tokens_per_expert(experts: Annotated[Tensor, "N K"], count: int) -> Annotated[Tensor, "E"]:
    numbers = ops.arange(count, dtype="int32")
    return ops.sum(ops.cast(ops.reshape(experts, (-1, 1)) == numbers, "int32"), axis=0)


@functools.cache
def _in_place(activation: str) -> Callable[..., Tensor]:
    def forward(*inputs):
        return experts_in_place.forward(PairInputs(*inputs), activation), inputs

    def backward(inputs, d_output):
        return *experts_in_place.backward(PairInputs(*inputs), d_output, activation), None

    return custom_gradient(forward, backward)


@functools.cache
def _differentiable(sizes: tuple[int, ...], activation: str) -> Callable[..., Tensor]:
    def primal(*inputs):
        return tiled_experts.forward(ExpertInputs(*inputs), sizes, activation, keep=False)[0]

    def forward(*inputs):
        output, gated = tiled_experts.forward(ExpertInputs(*inputs), sizes, activation, keep=True)
        return output, (*inputs, gated)

    def backward(residuals, d_output):
        *inputs, gated = residuals
        gradients = tiled_experts.backward(
            ExpertInputs(*inputs), gated, d_output, sizes, activation
        )
        return *gradients, None, None, None

    return custom_gradient(forward, backward, primal)
