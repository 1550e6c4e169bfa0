"""The experts of a mixture, run on the tokens routed to them and on nothing else."""

import keras
from keras import ops

from .initializers import Normal
from .ops import grouped_matmul
from .ops.rows import take_rows
from .swiglu import gated_activation


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
        self.activation = gated_activation(ffn_type)

    def build(self, input_shape, experts_shape=None, weights_shape=None):
        experts, width, inner = self.num_experts, input_shape[-1], self.moe_intermediate_size
        self.gate_up = self._stack("gate_up", (experts, width, 2 * inner))
        self.down = self._stack("down", (experts, inner, width))

    def _stack(self, name, shape):
        return self.add_weight(name=name, shape=shape, initializer=Normal(self.initializer_range))

    def call(self, x, experts, weights):
        x = ops.cast(x, self.compute_dtype)
        choices = experts.shape[1]
        flat = ops.reshape(experts, (-1,))
        order = ops.cast(ops.argsort(flat), "int32")  # pair numbers, by expert
        places = ops.cast(ops.argsort(order), "int32")
        bounds = ops.searchsorted(ops.take(flat, order), ops.arange(self.num_experts + 1))
        bounds = ops.cast(bounds, "int32")
        load = bounds[1:] - bounds[:-1]

        inverse = ops.reshape(places, (-1, choices))
        rows = take_rows(x, order // choices, inverse)  # (N K, D)
        gate, up = ops.split(self._matmul(rows, self.gate_up, load), 2, axis=-1)
        rows = self._matmul(self.activation(gate) * up, self.down, load)
        rows = take_rows(rows, places, ops.expand_dims(order, -1))
        rows = ops.reshape(rows, (-1, choices, x.shape[1]))
        weights = ops.expand_dims(ops.cast(weights, rows.dtype), -1)
        return ops.sum(weights * rows, axis=1), load

    def _matmul(self, rows, weights, load):
        return grouped_matmul(rows, ops.cast(weights, self.compute_dtype), load)

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
