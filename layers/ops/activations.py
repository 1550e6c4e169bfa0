"""The activations on the gate of a feed-forward network, each with its derivative.

    silu(x) = x sigmoid(x)        silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))
    gelu(x) = x Phi(x)            gelu'(x) = Phi(x) + x phi(x)

Phi and phi are the distribution and the density of the standard normal: the exact GELU, as the
published `hidden_act: "gelu"` means it.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Annotated, NamedTuple

from keras import ops

from .tensor_types import Tensor


class Activation(NamedTuple):
    """An elementwise function and its derivative.

    Attributes:
        function: `x -> act(x)`, of the shape and dtype of `x`.
        derivative: `x -> act'(x)`, of the shape and dtype of `x`.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def silu(x: Annotated[Tensor, "..."]) -> Annotated[Tensor, "..."]:
    """`x sigmoid(x)`, of the shape and dtype of `x`.

    TensorFlow's own, which `keras.ops.silu` calls, keeps each graph that it was traced in.
    """
    return x * ops.sigmoid(x)


def _silu_derivative(x: Tensor) -> Tensor:
    gate = ops.sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


def _gelu(x: Tensor) -> Tensor:
    return ops.gelu(x, approximate=False)


def _gelu_derivative(x: Tensor) -> Tensor:
    density = ops.exp(-0.5 * ops.square(x)) / sqrt(2 * pi)
    return 0.5 * (1.0 + ops.erf(x / sqrt(2.0))) + x * density


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(silu, _silu_derivative),
    "gelu": Activation(_gelu, _gelu_derivative),
}
