"""The experts of a few (token, expert) pairs, read where they stand: decoding.

Every pair multiplies its token with its own expert, see `row_product`: no expert is copied out of
its stack. Pairs are sorted by expert, so that one that several tokens share is in the cache when it
is read again.

Shapes: N tokens, K experts per token, P = N K pairs, E experts, B blocks of rows of a kernel.

    forward     outputs of all tokens
    backward    their gradients, by the loop over tiles
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from keras import ops

from ..activations import ACTIVATIONS
from ..backend.loops import scan, zeros_after
from ..grouped_matmul.tiles import tile_sizes
from ..padding import pad_end
from ..row_product import partial_products, sum_of_blocks
from ..tensor_types import Tensor
from . import tiled_experts
from .tiled_experts import ExpertInputs, sort_by_expert

# What they write meanwhile is a sixteenth of a kernel each; more at a time were no faster.
MOST_AT_A_TIME = 128


class PairInputs(NamedTuple):
    """Tokens, experts, and which token goes to which.

    Attributes:
        x: `(N, D)`.
        gate_up: `(E, D, 2F)` of any dtype, the gate's half first.
        down: `(E, F, D)` of any dtype.
        weights: `(N, K)`.
        experts: `(N, K)` int32; E means no expert at all.
    """

    x: Annotated[Tensor, "N D"]
    gate_up: Annotated[Tensor, "E D 2F"]
    down: Annotated[Tensor, "E F D"]
    weights: Annotated[Tensor, "N K"]
    experts: Annotated[Tensor, "N K"]


def forward(inputs: PairInputs, activation: str) -> Annotated[Tensor, "N D"]:
    """Outputs in the dtype of x; kernels are rounded to it as they are read."""
    x, gate_up, down, weights, experts = inputs
    tokens, chosen = experts.shape
    if tokens == 1:  # its experts are distinct
        sort_indices = ops.arange(chosen, dtype="int32")
        inverse_sort = sort_indices[None]
    else:
        sort_indices, inverse_sort, _ = sort_by_expert(experts, gate_up.shape[0])
    sorted_experts = ops.take(ops.reshape(experts, (-1,)), sort_indices)
    rows = ops.take(x, sort_indices // chosen, axis=0)

    def outputs_of(rows, experts):
        return _outputs(rows, gate_up, down, experts, activation)

    rows = _some_at_a_time(outputs_of, rows, sorted_experts)
    outputs = ops.take(rows, inverse_sort, axis=0)  # (N, K, D)
    weights = ops.cast(weights, "float32")[..., None]
    return ops.cast(ops.sum(weights * outputs, axis=1), x.dtype)


def _some_at_a_time(
    function: Callable[[Tensor, Tensor], Tensor],
    rows: Annotated[Tensor, "P D"],
    experts: Annotated[Tensor, "P"],
) -> Annotated[Tensor, "P D"]:
    """`function(rows, experts)`, of no more than `MOST_AT_A_TIME` rows each time."""
    count, width = rows.shape
    pieces = math.ceil(count / MOST_AT_A_TIME)
    if pieces == 1:
        return function(rows, experts)
    size = math.ceil(count / pieces)
    rows, experts = (pad_end(each, pieces * size - count) for each in (rows, experts))
    xs = ops.reshape(rows, (pieces, size, width)), ops.reshape(experts, (pieces, size))
    into = (zeros_after(rows, (pieces, size, width), "float32"),)
    _, (found,) = scan(lambda carry, piece: (carry, (function(*piece),)), (), xs, into)
    return ops.reshape(found, (-1, width))[:count]


def _outputs(
    rows: Annotated[Tensor, "P D"],
    gate_up: Annotated[Tensor, "E D 2F"],
    down: Annotated[Tensor, "E F D"],
    experts: Annotated[Tensor, "P"],
    activation: str,
) -> Annotated[Tensor, "P D"]:
    """What every row becomes in its expert, float32; 0 where that is none."""
    real = experts < gate_up.shape[0]
    index = ops.where(real, experts, 0)
    gate, up = ops.split(sum_of_blocks(partial_products(rows, gate_up, index)), 2, axis=-1)
    gated = ops.cast(ACTIVATIONS[activation].function(gate) * up, rows.dtype)
    partial = partial_products(gated, down, index)
    # An expert that a pair was not sent to may hold anything.
    return sum_of_blocks(ops.where(real[:, None, None], partial, 0.0))


def backward(
    inputs: PairInputs, d_output: Annotated[Tensor, "N D"], activation: str
) -> tuple[Tensor, ...]:
    """Gradients of `x`, `gate_up`, `down` and `weights`, in their dtypes."""
    *given, experts = inputs
    count, dtype = inputs.gate_up.shape[0], inputs.x.dtype
    x, gate_up, down, weights = (ops.cast(tensor, dtype) for tensor in given)
    sorted_pairs = ExpertInputs(x, gate_up, down, weights, *sort_by_expert(experts, count))
    sizes = tile_sizes(sorted_pairs.sort_indices.shape[0], count)
    gated: Any
    _, gated = tiled_experts.forward(sorted_pairs, sizes, activation, keep=True)
    gradients = tiled_experts.backward(sorted_pairs, gated, d_output, sizes, activation)
    return tuple(ops.cast(grad, tensor.dtype) for grad, tensor in zip(gradients, given))
