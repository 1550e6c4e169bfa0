"""The experts of an MoE layer from products of grouped rows, one row per (token, expert) pair.

A device that a single tile cannot fill is faster this way, at the price of rows for all pairs in
memory. Differentiated by tracing: the products and the moves of rows have gradients of their own.
"""

from typing import Annotated

from keras import ops

from ..activations import ACTIVATIONS
from ..grouped_matmul import grouped_matmul
from ..rows import take_rows
from ..tensor_types import Tensor
from .tiled_experts import ExpertInputs


def run(inputs: ExpertInputs, activation: str, implementation: str) -> Annotated[Tensor, "N D"]:
    """Outputs of all tokens, by an implementation of `grouped_matmul`."""
    x, gate_up, down, weights, sort_indices, inverse_sort, tokens_per_expert = inputs
    chosen = inverse_sort.shape[1]

    def product(rows, weights):
        return grouped_matmul(rows, weights, tokens_per_expert, implementation=implementation)

    rows = take_rows(x, sort_indices // chosen, inverse_sort)  # (N K, D)
    gate, up = ops.split(product(rows, gate_up), 2, axis=-1)
    rows = product(ACTIVATIONS[activation].function(gate) * up, down)
    rows = take_rows(rows, ops.reshape(inverse_sort, (-1,)), ops.expand_dims(sort_indices, -1))
    rows = ops.reshape(rows, (-1, chosen, x.shape[1]))
    return ops.sum(ops.expand_dims(weights, -1) * rows, axis=1)
