"""The activations of a gated expert with their derivatives."""

from math import pi, sqrt

from keras import ops


def _silu_slope(x):
    gate = ops.sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


def _gelu(x):
    return ops.gelu(x, approximate=False)


def _gelu_slope(x):
    density = ops.exp(-0.5 * ops.square(x)) / sqrt(2 * pi)
    return 0.5 * (1.0 + ops.erf(x / sqrt(2.0))) + x * density


ACTIVATIONS = {"silu": (ops.silu, _silu_slope), "gelu": (_gelu, _gelu_slope)}
