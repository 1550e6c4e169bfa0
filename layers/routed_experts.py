"""The experts of a mixture, run on the tokens routed to them and on nothing else."""

import keras
from keras import ops

from .initializers import Normal
from .ops import expert_mlp
from .swiglu import GATED_ACTIVATIONS, gated_activation


@keras.saving.register_keras_serializable(package="qwen3_next")
class RoutedExperts(keras.layers.Layer):
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
        `(y (N, D), load (E,) int32)`, the load being the number of tokens of every expert.
    """

    def __init__(
        self,
        num_experts,
        moe_intermediate_size,
        ffn_type="swiglu",
        initializer_range=0.02,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.num_experts = num_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.ffn_type = ffn_type
        self.initializer_range = initializer_range
        gated_activation(ffn_type)  # raises where it is unknown

    def build(self, input_shape, experts_shape=None, weights_shape=None):
        experts, width, inner = self.num_experts, input_shape[-1], self.moe_intermediate_size
        self.gate_up = self._stack("gate_up", (experts, width, 2 * inner))
        self.down = self._stack("down", (experts, inner, width))

    def _stack(self, name, shape):
        return self.add_weight(name=name, shape=shape, initializer=Normal(self.initializer_range))

    def call(self, x, experts, weights):
        x = ops.cast(x, self.compute_dtype)
        gate_up, down = ops.convert_to_tensor(self.gate_up), ops.convert_to_tensor(self.down)
        activation = GATED_ACTIVATIONS[self.ffn_type]
        return expert_mlp(x, gate_up, down, experts, weights, activation=activation)

    def compute_output_shape(self, input_shape, experts_shape=None, weights_shape=None):
        return input_shape, (self.num_experts,)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "moe_intermediate_size": self.moe_intermediate_size,
            "ffn_type": self.ffn_type,
            "initializer_range": self.initializer_range,
        }
