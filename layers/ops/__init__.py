"""The maths of the hot paths: pure functions on tensors, the same on every backend."""

from .causal_conv1d import causal_conv1d
from .cross_entropy import cross_entropy, linear_cross_entropy
from .gated_delta_rule import gated_delta_rule
from .grouped_matmul import grouped_matmul

__all__ = [
    "causal_conv1d",
    "cross_entropy",
    "gated_delta_rule",
    "grouped_matmul",
    "linear_cross_entropy",
]
