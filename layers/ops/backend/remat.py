"""Recompute in the backward pass instead of keeping."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from ..tensor_types import Tensor

BACKEND = keras.backend.backend()


def remat(
    function: Callable[[Tensor], Any], layers: Sequence[keras.layers.Layer]
) -> Callable[[Tensor], Any]:
    """`function(x)`, of which only x is kept for the backward pass.

    Args:
        function: Assigns no variable and reads those of `layers` alone.
        layers: What it calls.
    """
    if BACKEND != "tensorflow":
        return keras.remat(function)
    import tensorflow as tf

    # TensorFlow cannot differentiate a loop whose backward pass reads variables that the forward
    # pass did not: they are read here, and handed in.
    variables = [variable for layer in layers for variable in layer.variables]

    @tf.recompute_grad
    def recomputed(x, *values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(x)

    return lambda x: recomputed(x, *(tf.convert_to_tensor(v.value) for v in variables))
