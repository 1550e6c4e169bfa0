"""The routed experts where every device has only some of them.

Rows are spread over devices as well. Along the axes that have both, a device first gathers the
rows of the others, so that it has all tokens that may be sent to its experts; it runs these, and
the sum over devices goes back to where the rows came from:

    forward     x -> gather -> own experts -> y, summed and scattered
    backward    dy -> gather -> own experts -> dx, summed and scattered;  dW, summed over rows

A pair whose expert is elsewhere is sorted behind all others and costs no product. No device ever
has an expert that is not its own, forward or backward.

Source: the ring of experts, without the ring, of MaxText's MoE layer: with many experts per token
it is cheaper to move tokens than their copies.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from keras import ops

from ..backend.autodiff import Shards, custom_gradient
from ..backend.loops import add_rows
from ..backend.sharding import (
    Axes,
    Devices,
    all_sum,
    gather,
    part_number,
    spec,
    sum_parts,
    sum_rows,
)
from ..grouped_matmul.tiles import for_each_tile, tile_sizes, write_tile
from ..tensor_types import Tensor
from . import grouped_experts
from .tiled_experts import (
    ExpertInputs,
    add_to_kernels,
    plan_of,
    sort_by_expert,
    tile_gradients,
    tile_outputs,
    tokens_of,
)


class Spread(NamedTuple):
    """How rows and experts are spread.

    Attributes:
        devices: `Devices`.
        rows: Mesh axes of the rows.
        experts: Mesh axes of the experts.
        columns: Mesh axes of D of the kernels, axes of the rows alone: with FSDP.
        by_kernels: Whether a device runs its experts in the kernels of a GPU, not tile by tile.
    """

    devices: Devices
    rows: Axes
    experts: Axes
    columns: Axes = ()
    by_kernels: bool = False

    @property
    def shared(self) -> Axes:
        """Axes of both: along them rows are gathered."""
        return tuple(name for name in self.rows if name in self.experts)

    @property
    def expert_only(self) -> Axes:
        """Axes of the experts alone: along them all devices have the same rows."""
        return tuple(name for name in self.experts if name not in self.rows)

    @property
    def row_only(self) -> Axes:
        """Axes of the rows alone: along them all devices have the same experts."""
        return tuple(name for name in self.rows if name not in self.experts)


def run(
    x: Annotated[Tensor, "N D"],
    gate_up: Annotated[Tensor, "E D 2F"],
    down: Annotated[Tensor, "E F D"],
    experts: Annotated[Tensor, "N K"],
    weights: Annotated[Tensor, "N K"],
    activation: str,
    how: Spread,
) -> tuple[Annotated[Tensor, "N D"], Annotated[Tensor, "E"]]:
    """Outputs of all rows and tokens per expert."""
    rows, chosen = experts.shape
    count = gate_up.shape[0]
    # The pairs that a device may see, over the experts that these can be of.
    sizes = tile_sizes(rows * chosen // how.devices.size(how.row_only), count)
    return _differentiable(sizes, activation, how)(x, gate_up, down, weights, experts)


@functools.cache
def _differentiable(sizes: tuple[int, ...], activation: str, how: Spread) -> Callable[..., Any]:
    if how.by_kernels:
        outputs, gradients = _by_kernels(activation)
    else:
        outputs = functools.partial(_outputs, sizes=sizes, activation=activation)
        gradients = functools.partial(_gradients, sizes=sizes, activation=activation)

    def whole(gate_up, down):
        return gather(gate_up, how.columns, 1), gather(down, how.columns, 2)

    def forward(x, gate_up, down, weights, experts):
        count = gate_up.shape[0]
        x, weights, experts = (gather(t, how.shared) for t in (x, weights, experts))
        own = experts - count * part_number(how.experts)
        own = ops.where((own >= 0) & (own < count), own, count)
        inputs = ExpertInputs(x, gate_up, down, weights, *sort_by_expert(own, count))
        gate_up, down = whole(gate_up, down)
        output = outputs(inputs._replace(gate_up=gate_up, down=down))
        output = back(output)
        return (output, all_sum(inputs.tokens_per_expert, how.row_only)), inputs

    def back(rows):
        return all_sum(sum_parts(rows, how.shared), how.expert_only)

    def backward(inputs, d_output):
        d_output = gather(d_output, how.shared)
        # No residual: a compiler may gather them again and not keep those of all layers.
        gate_up, down = whole(inputs.gate_up, inputs.down)
        inputs = inputs._replace(gate_up=gate_up, down=down)
        d_x, d_gate_up, d_down, d_weights = gradients(inputs, d_output)
        d_gate_up = sum_rows(d_gate_up, how.row_only, how.columns, 1)
        d_down = sum_rows(d_down, how.row_only, how.columns, 2)
        return back(d_x), d_gate_up, d_down, back(d_weights), None

    return custom_gradient(forward, backward, shards=_shards(how))


def _outputs(
    inputs: ExpertInputs, sizes: tuple[int, ...], activation: str
) -> Annotated[Tensor, "N D"]:
    """Outputs of a device's own experts, added up token by token.

    All pairs may be of one device: with a row for every pair, each device would need as much
    memory as one that is alone.
    """
    plan, pairs = plan_of(inputs, sizes)

    def body(tile, total):
        output, _ = tile_outputs(inputs, pairs, tile, activation)
        return add_rows(total, tokens_of(inputs, pairs, tile), output)

    total = for_each_tile(plan, body, ops.zeros(inputs.x.shape, "float32"))
    return ops.cast(total, inputs.x.dtype)


def _gradients(
    inputs: ExpertInputs,
    d_output: Annotated[Tensor, "N D"],
    sizes: tuple[int, ...],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, `gate_up`, `down` and `weights`; gate and up are computed again."""
    plan, pairs = plan_of(inputs, sizes)

    def body(tile, carry):
        d_x, *d_kernels, d_weights = carry
        _, gated = tile_outputs(inputs, pairs, tile, activation)
        found = tile_gradients(inputs, pairs, tile, gated, d_output, activation)
        d_x = add_rows(d_x, tokens_of(inputs, pairs, tile), found.d_tokens)
        d_kernels = add_to_kernels(d_kernels, tile, found)
        return d_x, *d_kernels, write_tile(d_weights, tile, found.d_weight)

    carry = (
        ops.zeros(inputs.x.shape, "float32"),
        ops.zeros(inputs.gate_up.shape, "float32"),
        ops.zeros(inputs.down.shape, "float32"),
        ops.zeros(ops.shape(pairs), inputs.weights.dtype),
    )
    d_x, d_gate_up, d_down, d_weights = for_each_tile(plan, body, carry)
    return (
        ops.cast(d_x, inputs.x.dtype),
        ops.cast(d_gate_up, inputs.gate_up.dtype),
        ops.cast(d_down, inputs.down.dtype),
        ops.take(d_weights, inputs.inverse_sort, axis=0),
    )


def _by_kernels(activation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same two for a GPU, which a loop over tiles would not fill.

    They take the memory that `_outputs` saves: a row for every pair, also of others' experts.
    """
    import jax

    def outputs(inputs):
        return grouped_experts.run(inputs, activation, "pallas")

    def gradients(inputs, d_output):
        floats, rest = inputs[:4], inputs[4:]
        _, pull = jax.vjp(lambda *floats: outputs(ExpertInputs(*floats, *rest)), *floats)
        return pull(d_output)

    return outputs, gradients


def _shards(how: Spread) -> Shards:
    rows, experts, gathered = spec(how.rows), spec(how.experts), spec(how.row_only)
    kernels = spec(how.experts, how.columns), spec(how.experts, (), how.columns)
    own = spec((*how.row_only, *how.experts))  # different on every device
    inputs = rows, *kernels, rows, rows
    kept = ExpertInputs(gathered, *kernels, gathered, own, own, own)
    return Shards(how.devices.mesh, inputs, (rows, experts), kept, (*inputs[:4], None))
