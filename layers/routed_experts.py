"""The routed experts of an MoE layer, run on the tokens routed to them and on nothing else."""

from typing import Annotated, Any

import keras
from keras import ops

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .initializers import Normal
from .ops import expert_mlp
from .ops.tensor_types import Tensor
from .shapes import Shape, spec_like
from .swiglu import gate_activation


@keras.saving.register_keras_serializable(package="qwen3_next")
class RoutedExperts(CheckedLayer):
    """E gated feed-forward networks with stacked weights.

        y_n = sum_k weight_nk * down_e(act(gate_e(x_n)) * up_e(x_n)),   e = expert_nk

    The N K (token, expert) pairs are sorted by expert and multiplied group by group: the work
    grows with K, not with E, and no pair is dropped.

    Args:
        num_experts: Experts E.
        moe_intermediate_size: Width F of an expert.
        ffn_type: `"swiglu"` or `"geglu"`.
        initializer_range: Standard deviation of the normal initial weights.

    Call arguments:
        x: `(N, D)`.
        experts: `(N, K)` integers; E means no expert at all.
        weights: `(N, K)`; 0 where there is no expert.

    Returns:
        `(y (N, D), tokens_per_expert (E,) int32)`.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import RoutedExperts

        layer = RoutedExperts(num_experts=3, moe_intermediate_size=4)
        experts, weights = np.array([[0], [2]]), np.ones((2, 1), "float32")
        y, tokens_per_expert = layer(np.ones((2, 8), "float32"), experts, weights)
        assert y.shape == (2, 8)
        assert [int(count) for count in tokens_per_expert] == [1, 0, 1]
        ```
    """

    def __init__(
        self,
        num_experts: int,
        moe_intermediate_size: int,
        ffn_type: str = "swiglu",
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        super().__init__(autocast=False, **kwargs)
        self.num_experts = num_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.ffn_type = ffn_type
        self.initializer_range = initializer_range
        self.activation = gate_activation(ffn_type)

    def build(
        self,
        x_shape: Shape,
        experts_shape: Shape | None = None,
        weights_shape: Shape | None = None,
    ) -> None:
        experts, width, inner = self.num_experts, x_shape[-1], self.moe_intermediate_size
        self.gate_up = self._stack("gate_up", (experts, width, 2 * inner))
        self.down = self._stack("down", (experts, inner, width))

    def _stack(self, name: str, shape: Shape) -> keras.Variable:
        return self.add_weight(name=name, shape=shape, initializer=Normal(self.initializer_range))

    def call(
        self,
        x: Annotated[Tensor, "N D"],
        experts: Annotated[Tensor, "N K"],
        weights: Annotated[Tensor, "N K"],
    ) -> tuple[Annotated[Tensor, "N D"], Annotated[Tensor, "E"]]:
        x = ops.cast(x, self.compute_dtype)
        gate_up, down = ops.convert_to_tensor(self.gate_up), ops.convert_to_tensor(self.down)
        return expert_mlp(x, gate_up, down, experts, weights, activation=self.activation)

    def compute_output_shape(
        self,
        x_shape: Shape,
        experts_shape: Shape | None = None,
        weights_shape: Shape | None = None,
    ) -> tuple[Shape, Shape]:
        return x_shape, (self.num_experts,)

    def compute_output_spec(self, x: Any, experts: Any, weights: Any) -> Any:
        output = spec_like(x, self.compute_dtype)
        return output, keras.KerasTensor((self.num_experts,), "int32")

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "moe_intermediate_size": self.moe_intermediate_size,
            "ffn_type": self.ffn_type,
            "initializer_range": self.initializer_range,
        }
