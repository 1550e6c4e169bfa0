"""The maths of the hot paths: pure functions on tensors, the same on every backend."""

from .attention import attention
from .causal_conv1d import causal_conv1d
from .cross_entropy import cross_entropy, linear_cross_entropy
from .expert_mlp import expert_mlp
from .gated_delta_rule import gated_delta_rule, gated_delta_rule_with_replay, replay
from .grouped_matmul import grouped_matmul

__all__ = [
    "attention",
    "causal_conv1d",
    "cross_entropy",
    "expert_mlp",
    "gated_delta_rule",
    "gated_delta_rule_with_replay",
    "grouped_matmul",
    "linear_cross_entropy",
    "replay",
]
