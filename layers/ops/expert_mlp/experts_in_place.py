"""The experts of a few (token, expert) pairs, read where they stand: decoding.

Every pair multiplies its token with its own expert, see `row_product`: no expert is copied out of
its stack. Pairs are sorted by expert, so that one that several tokens share is in the cache when it
is read again.

Shapes: N tokens, K experts per token, P = N K pairs, E experts, B blocks of rows of a kernel.

    forward     outputs of all tokens
    backward    their gradients, by the loop over tiles
"""

from typing import Annotated

from keras import ops

from ..activations import ACTIVATIONS
from ..grouped_matmul.tiles import tile_sizes
from ..row_product import partial_products, weighted_sum
from ..tensor_types import Tensor
from . import tiled_experts
from .tiled_experts import ExpertInputs, sort_by_expert


def forward(
    x: Annotated[Tensor, "N D"],
    gate_up: Annotated[Tensor, "E D 2F"],
    down: Annotated[Tensor, "E F D"],
    weights: Annotated[Tensor, "N K"],
    experts: Annotated[Tensor, "N K"],
    activation: str,
) -> Annotated[Tensor, "N D"]:
    """Outputs in the dtype of x; kernels, of any dtype, are rounded to it as they are read."""
    tokens, chosen = experts.shape
    if tokens == 1:  # its experts are distinct
        sort_indices = ops.arange(chosen, dtype="int32")
        inverse_sort = sort_indices[None]
    else:
        sort_indices, inverse_sort, _ = sort_by_expert(experts, gate_up.shape[0])
    flat = ops.take(ops.reshape(experts, (-1,)), sort_indices)
    real = flat < gate_up.shape[0]
    index = ops.where(real, flat, 0)
    rows = ops.take(x, sort_indices // chosen, axis=0)  # (P, D)
    partial = partial_products(rows, gate_up, index)
    gate, up = ops.split(weighted_sum(ops.ones(partial.shape[:2], "float32"), partial), 2, axis=-1)
    gated = ops.cast(ACTIVATIONS[activation].function(gate) * up, x.dtype)
    partial = partial_products(gated, down, index)
    # An expert that a pair was not sent to may hold anything.
    partial = ops.where(real[:, None, None], partial, 0.0)
    outputs = weighted_sum(ops.ones(partial.shape[:2], "float32"), partial)
    outputs = ops.take(outputs, inverse_sort, axis=0)  # (N, K, D)
    return ops.cast(weighted_sum(ops.cast(weights, "float32"), outputs), x.dtype)


def backward(
    x: Annotated[Tensor, "N D"],
    gate_up: Annotated[Tensor, "E D 2F"],
    down: Annotated[Tensor, "E F D"],
    weights: Annotated[Tensor, "N K"],
    experts: Annotated[Tensor, "N K"],
    d_output: Annotated[Tensor, "N D"],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, `gate_up`, `down` and `weights`, in their dtypes."""
    count = gate_up.shape[0]
    given = x, gate_up, down, weights
    cast = (ops.cast(tensor, x.dtype) for tensor in given)
    inputs = ExpertInputs(*cast, *sort_by_expert(experts, count))
    sizes = tile_sizes(inputs.sort_indices.shape[0], count)
    _, gated = tiled_experts.forward(inputs, sizes, activation, keep=True)
    gradients = tiled_experts.backward(inputs, gated, d_output, sizes, activation)
    return tuple(ops.cast(grad, tensor.dtype) for grad, tensor in zip(gradients, given))
