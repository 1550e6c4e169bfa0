"""Causal depthwise convolution over the real tokens of a row, with a state for the next call.

causal_conv1d          the convolution
CausalConv1DOutput     what it returns
"""

from .api import CausalConv1DOutput, causal_conv1d

__all__ = ["CausalConv1DOutput", "causal_conv1d"]
