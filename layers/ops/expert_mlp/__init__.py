"""The routed experts of an MoE layer: every token goes through the experts it was sent to.

expert_mlp    weighted sum of the experts' outputs, and the tokens per expert
"""

from .api import expert_mlp

__all__ = ["expert_mlp"]
