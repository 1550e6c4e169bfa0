from .api import CausalConv1DOutput, causal_conv1d

__all__ = ["CausalConv1DOutput", "causal_conv1d"]
