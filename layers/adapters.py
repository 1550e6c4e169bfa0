"""What LoRA experts add to the projections of a decoder layer."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import keras
from keras import ops

from .lora_experts import LoRAExperts
from .ops.tensor_types import Tensor
from .shapes import Shape

BLOCK_OUTPUT = "block_output"


@dataclasses.dataclass(frozen=True, eq=False)  # no tuple: Keras would look inside of it
class Adapters:
    """The experts of a decoder layer, as a call of the layer takes them.

    Attributes:
        experts: `LoRAExperts` by the name of the projection that they change, or `block_output`.
        weights: `(B, 1, N)` or `(B, T, N)` float32, the weight of every expert.
        seeds: Dropout seed tensors by the same names; without one nothing is dropped.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import Adapters, GatedAttention, LoRAExperts

        mixer = GatedAttention(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        experts = {"v_proj": LoRAExperts(num_experts=2, rank=1, output_shape=(1, 8))}
        first = np.array([[[1.0, 0.0]]], "float32")  # the first expert for the only row
        x = np.ones((1, 3, 16), "float32")
        assert mixer(x, adapters=Adapters(experts, first, {})).shape == (1, 3, 16)
        ```
    """

    experts: Mapping[str, LoRAExperts]
    weights: Annotated[Tensor, "B T N"]
    seeds: Mapping[str, Any]

    def delta(self, name: str, x: Tensor) -> Tensor | None:
        """What they add to the output of a projection of x; `None` where they change none."""
        if name not in self.experts:
            return None
        seed = self.seeds.get(name)
        return self.experts[name](x, self.weights, dropout_seed=seed, training=seed is not None)


def project(layer: keras.layers.Layer, x: Tensor, name: str, adapters: Adapters | None) -> Tensor:
    """The output of a layer's projection `name`, with what experts add to it."""
    y = getattr(layer, name)(x)
    delta = None if adapters is None else adapters.delta(name, x)
    return y if delta is None else y + ops.cast(delta, y.dtype)


def build_experts(
    experts: Mapping[str, LoRAExperts],
    projections: Mapping[str, keras.layers.EinsumDense],
    shape: Shape,
) -> None:
    """Builds the experts of a layer for its projections, and for its output of this `shape`.

    Raises:
        ValueError: experts of something that the layer does not have.
    """
    for name, expert in experts.items():
        if name != BLOCK_OUTPUT and name not in projections:
            raise ValueError(
                f"`experts` must change projections of their layers, {[*projections]}, or "
                f"{BLOCK_OUTPUT!r}. Received: {name!r}"
            )
        if expert.built:
            continue
        if name != BLOCK_OUTPUT:
            kernel = projections[name].kernel.shape
            expert.build((None, None, *kernel[: len(kernel) - len(expert.dims)]))
        else:
            expert.build(shape)
