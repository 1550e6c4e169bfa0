"""Sparse mixture of experts (MoE) with a shared expert."""

from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from qwen3_next.config.validation import Rule, is_list_of, require

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .ops.backend.autodiff import full_precision
from .ops.backend.sharding import devices, on_shards, spec
from .ops.checks import as_mask
from .ops.tensor_types import Tensor
from .projection import dense
from .routed_experts import RoutedExperts
from .shapes import Shape, spec_like
from .swiglu import SwiGLU


class Routing(NamedTuple):
    """Router statistics over the real tokens of a batch.

    Attributes:
        tokens_per_expert: `(E,)` float32, tokens sent to every expert.
        probability: `(E,)` float32, sum of the router's probabilities.
        tokens: `()` float32, number of tokens.
    """

    tokens_per_expert: Annotated[Tensor, "E"]
    probability: Annotated[Tensor, "E"]
    tokens: Tensor


ROUTINGS = Rule(
    "one or more Routing statistics",
    lambda value: bool(value) and is_list_of(value, lambda one: isinstance(one, Routing)),
)


def load_balancing_loss(routings: Iterable[Routing], by_layer: bool = False) -> Tensor:
    """The load-balancing loss, as published pooled over layers, or the mean of their own.

        loss = E * sum_e f_e P_e
        f_e = tokens_per_expert_e / tokens        P_e = probability_e / tokens

    f sums to the number of experts per token, so perfect balance gives `num_experts_per_tok`, not
    1. The counts carry no gradient. Source: Switch Transformers, arXiv 2101.03961, eq. 4, in the
    convention of the `transformers` library (all layers' tokens pooled before the product). Pooled,
    layers that favour different experts make up for one another and none of them gets balanced.

    Args:
        routings: `Routing` statistics, one per MoE layer.
        by_layer: Whether every layer is balanced by itself.

    Returns:
        `()` float32.

    Raises:
        ValueError: no `Routing` statistics, or something else among them.
    """
    routings = list(routings)  # a generator could be read only once
    require(ROUTINGS, "routings", routings)
    if by_layer:
        return sum(load_balancing_loss([one]) for one in routings) / len(routings)
    tokens_per_expert = sum(routing.tokens_per_expert for routing in routings)
    probability = sum(routing.probability for routing in routings)
    tokens = ops.maximum(sum(routing.tokens for routing in routings), 1.0)
    fraction = ops.stop_gradient(tokens_per_expert / tokens)
    return tokens_per_expert.shape[0] * ops.sum(fraction * (probability / tokens))


@keras.saving.register_keras_serializable(package="qwen3_next")
class SparseMoE(CheckedLayer):
    """Gated feed-forward experts of which a router picks k, plus one that sees every token.

        p = softmax(x W_gate)                        float32, over all E experts
        y = sum over the top k of w_e expert_e(x)    w = p, or p / sum(p) with norm_topk_prob
          + sigmoid(x w_shared) * shared_expert(x)

    Only the chosen experts run. With one expert per token and `norm_topk_prob` the weight is 1
    whatever p is; its gradient is taken as if the sum were constant, so that the router learns.

    Args:
        num_experts: Experts E.
        num_experts_per_tok: Experts k per token.
        moe_intermediate_size: Width of an expert.
        shared_expert_intermediate_size: Width of the shared expert, 0 for none.
        norm_topk_prob: Whether the k weights are divided by their sum.
        ffn_type: `"swiglu"` or `"geglu"`.
        initializer_range: Standard deviation of the normal initial weights.

    Call arguments:
        x: `(B, T, D)`.
        padding_mask: `(B, T)` bool; padding is routed nowhere and counted nowhere. Or `None`.
        return_routing: Whether to return the `Routing` statistics as well.

    Returns:
        `(B, T, D)`, with `return_routing` `(output, Routing)`.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import SparseMoE

        layer = SparseMoE(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
        y, routing = layer(np.ones((1, 3, 8), "float32"), return_routing=True)
        assert y.shape == (1, 3, 8)
        assert float(sum(routing.tokens_per_expert)) == 3 * 2
        ```

    Reference: Outrageously Large Neural Networks, arXiv 1701.06538; Qwen3-Next (2025).
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        moe_intermediate_size: int,
        shared_expert_intermediate_size: int = 0,
        norm_topk_prob: bool = True,
        ffn_type: str = "swiglu",
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        # Inputs are cast by hand: an autocast scope would reach the router's float32 weights.
        super().__init__(autocast=False, **kwargs)
        if num_experts_per_tok > num_experts:
            raise ValueError(
                "`num_experts_per_tok` must be at most `num_experts`. "
                f"Received: {num_experts_per_tok=}, {num_experts=}"
            )
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.ffn_type = ffn_type
        self.initializer_range = initializer_range

    def build(self, input_shape: Shape) -> None:
        width, policy, std = input_shape[-1], self.dtype_policy, self.initializer_range
        # The router is float32 under every policy: rounding its logits changes the choice.
        self.gate = dense(self.num_experts, std, "gate", "float32")
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
            self.shared_expert_gate = dense(1, std, "shared_expert_gate", policy)
            self.shared_expert_gate.build((None, width))

    def call(
        self,
        x: Annotated[Tensor, "B T D"],
        padding_mask: Annotated[Tensor, "B T"] | None = None,
        return_routing: bool = False,
    ) -> Annotated[Tensor, "B T D"] | tuple[Annotated[Tensor, "B T D"], Routing]:
        rows = ops.reshape(ops.cast(x, self.compute_dtype), (-1, x.shape[-1]))  # (N, D)
        real = as_mask(padding_mask)
        real = None if real is None else ops.reshape(real, (-1, 1))  # (N, 1)
        with full_precision():
            scores = self.gate(rows)
        probabilities = ops.softmax(scores, axis=-1)  # (N, E) float32
        experts, weights = self._choose(probabilities, real)
        output, tokens_per_expert = self.experts(rows, experts, weights)
        if self.shared_expert_intermediate_size:
            gate = ops.sigmoid(self.shared_expert_gate(rows))
            output = output + gate * self.shared_expert(rows)
        output = ops.reshape(output, ops.shape(x))
        if not return_routing:
            return output
        if real is None:
            tokens = ops.cast(ops.shape(rows)[0], "float32")
        else:
            probabilities = ops.where(real, probabilities, 0.0)
            tokens = ops.sum(ops.cast(real, "float32"))
        tokens_per_expert = ops.cast(tokens_per_expert, "float32")
        return output, Routing(tokens_per_expert, ops.sum(probabilities, axis=0), tokens)

    def _choose(self, probabilities: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """The experts of every token and their weights, `(N, K)` each; E and 0 at padding."""
        weights, experts = self._largest(probabilities)
        if self.norm_topk_prob:
            total = ops.sum(weights, axis=-1, keepdims=True)
            weights = weights / (
                ops.stop_gradient(total) if self.num_experts_per_tok == 1 else total
            )
        if real is not None:
            experts = ops.where(real, experts, self.num_experts)
            weights = ops.where(real, weights, 0.0)
        return experts, weights

    def _largest(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The largest probabilities of every token and their experts, `(N, K)` each."""
        found, chosen = devices(), self.num_experts_per_tok
        if found is None:
            return ops.top_k(probabilities, chosen)
        # The compiler would gather the probabilities of all tokens.
        rows = spec(found.rows(probabilities.shape[0]))
        choose = on_shards(lambda x: ops.top_k(x, chosen)[1], found.mesh, (rows,), rows)
        experts = choose(ops.stop_gradient(probabilities))
        return ops.take_along_axis(probabilities, experts, axis=-1), experts

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def compute_output_spec(
        self, x: Any, padding_mask: Any = None, return_routing: bool = False
    ) -> Any:
        output = spec_like(x, self.compute_dtype)
        if not return_routing:
            return output
        counts = keras.KerasTensor((self.num_experts,), "float32")
        return output, Routing(counts, spec_like(counts), keras.KerasTensor((), "float32"))

    def get_config(self) -> dict[str, Any]:
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
