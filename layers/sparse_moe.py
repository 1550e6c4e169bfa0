"""Sparse mixture of experts with a shared expert."""

from typing import NamedTuple

import keras
from keras import ops

from .initializers import Normal
from .ops.backend.autodiff import full_precision
from .routed_experts import RoutedExperts
from .swiglu import SwiGLU


class Routing(NamedTuple):
    """Router statistics over the real tokens of a batch, all float32.

    `load` `(E,)` tokens sent to every expert, `probability` `(E,)` sum of the router's
    probabilities, `tokens` `()` number of tokens.
    """

    load: object
    probability: object
    tokens: object


def load_balancing_loss(routings):
    """The published load-balancing loss, pooled over layers.

        loss = E * sum_e f_e P_e     f_e = load_e / tokens     P_e = probability_e / tokens

    f sums to the number of experts a token, so perfect balance gives `num_experts_per_tok`, not 1.
    The counts carry no gradient. Source: Switch Transformers, arXiv 2101.03961, eq. 4, in the
    convention of the `transformers` library (all layers' tokens pooled before the product).

    Args:
        routings: list of `Routing`, one a mixture layer.

    Returns:
        Scalar float32.
    """
    load = sum(routing.load for routing in routings)
    probability = sum(routing.probability for routing in routings)
    tokens = ops.maximum(sum(routing.tokens for routing in routings), 1.0)
    experts = load.shape[0]
    return experts * ops.sum(ops.stop_gradient(load / tokens) * (probability / tokens))


@keras.saving.register_keras_serializable(package="qwen3_next")
class SparseMoE(keras.layers.Layer):
    """Top-k mixture of gated feed-forward networks, plus one expert that sees every token.

        p = softmax(x W_gate)                        float32, over all E experts
        y = sum over the top k of w_e expert_e(x)    w = p, or p / sum(p) with norm_topk_prob
          + sigmoid(x w_shared) * shared_expert(x)

    Only the chosen experts run. With one expert a token and `norm_topk_prob` the weight is 1
    whatever p is; its gradient is taken as if the sum were constant, so that the router learns.

    Args:
        num_experts: Experts E.
        num_experts_per_tok: Experts k a token.
        moe_intermediate_size: Width of an expert.
        shared_expert_intermediate_size: Width of the shared expert, 0 for none.
        norm_topk_prob: Whether the k weights are divided by their sum.
        ffn_type: `"swiglu"` or `"geglu"`.
        initializer_range: Standard deviation of the normal initial weights.

    Call arguments:
        x: `(B, T, D)`.
        padding_mask: `(B, T)` bool; padding is routed nowhere and counted nowhere.
        return_routing: Whether to return the `Routing` statistics as well.

    Returns:
        `(B, T, D)`, with `return_routing` `(output, Routing)`.

    Reference: Outrageously Large Neural Networks, arXiv 1701.06538; Qwen3-Next (2025).
    """

    def __init__(
        self,
        num_experts,
        num_experts_per_tok,
        moe_intermediate_size,
        shared_expert_intermediate_size=0,
        norm_topk_prob=True,
        ffn_type="swiglu",
        initializer_range=0.02,
        **kwargs,
    ):
        # Inputs are cast by hand: an autocast scope would reach the router's float32 weights.
        super().__init__(autocast=False, **kwargs)
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(
                "`num_experts_per_tok` must be between 1 and `num_experts`. "
                f"Received: {num_experts_per_tok=}, {num_experts=}"
            )
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.ffn_type = ffn_type
        self.initializer_range = initializer_range

    def build(self, input_shape):
        width, policy, std = input_shape[-1], self.dtype_policy, self.initializer_range
        # The router is float32 under every policy: rounding its logits changes the choice.
        self.gate = _dense(self.num_experts, std, "gate", "float32")
        self.gate.build((None, width))
        self.experts = RoutedExperts(
            self.num_experts,
            self.moe_intermediate_size,
            self.ffn_type,
            std,
            name="experts",
            dtype=policy,
        )
        self.experts.build((None, width))
        if self.shared_expert_intermediate_size:
            self.shared_expert = SwiGLU(
                self.shared_expert_intermediate_size,
                self.ffn_type,
                std,
                name="shared_expert",
                dtype=policy,
            )
            self.shared_expert.build((None, width))
            self.shared_expert_gate = _dense(1, std, "shared_expert_gate", policy)
            self.shared_expert_gate.build((None, width))

    def call(self, x, padding_mask=None, return_routing=False):
        rows = ops.reshape(ops.cast(x, self.compute_dtype), (-1, x.shape[-1]))  # (N, D)
        with full_precision():
            scores = self.gate(rows)
        probabilities = ops.softmax(scores, axis=-1)  # (N, E) float32
        weights, experts = ops.top_k(probabilities, self.num_experts_per_tok)
        if self.norm_topk_prob:
            total = ops.sum(weights, axis=-1, keepdims=True)
            weights = weights / (
                ops.stop_gradient(total) if self.num_experts_per_tok == 1 else total
            )
        if padding_mask is not None:
            real = ops.reshape(padding_mask, (-1, 1))
            experts = ops.where(real, experts, self.num_experts)
            weights = ops.where(real, weights, 0.0)
        output, load = self.experts(rows, experts, weights)
        if self.shared_expert_intermediate_size:
            gate = ops.sigmoid(self.shared_expert_gate(rows))
            output = output + gate * self.shared_expert(rows)
        output = ops.reshape(output, ops.shape(x))
        if not return_routing:
            return output
        if padding_mask is None:
            tokens = ops.cast(ops.shape(rows)[0], "float32")
        else:
            probabilities = ops.where(real, probabilities, 0.0)
            tokens = ops.sum(ops.cast(real, "float32"))
        load = ops.cast(load, "float32")
        return output, Routing(load, ops.sum(probabilities, axis=0), tokens)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "moe_intermediate_size": self.moe_intermediate_size,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "ffn_type": self.ffn_type,
            "initializer_range": self.initializer_range,
        }


def _dense(units, initializer_range, name, dtype):
    return keras.layers.Dense(
        units,
        use_bias=False,
        kernel_initializer=Normal(initializer_range),
        name=name,
        dtype=dtype,
    )
