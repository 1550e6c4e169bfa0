"""Recompute in the backward pass instead of keeping."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

BACKEND = keras.backend.backend()


def remat(function: Callable[..., Any], layers: Sequence[keras.layers.Layer]) -> Callable[..., Any]:
    """`function(*tensors)`, of which only these are kept for the backward pass.

    Args:
        function: Assigns no variable, reads those of `layers` alone, and is given every tensor that
            has a gradient.
        layers: What it calls.
    """
    if BACKEND != "tensorflow":
        return keras.remat(function)
    import tensorflow as tf

    # TensorFlow cannot differentiate a loop whose backward pass reads variables that the forward
    # pass did not: they are read here, and handed in.
    variables = [variable for layer in layers for variable in layer.variables]

    @tf.recompute_grad
    def recomputed(*tensors):
        given, values = tensors[: -len(variables)], tensors[-len(variables) :]
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*given)

    return lambda *given: recomputed(*given, *(tf.convert_to_tensor(v.value) for v in variables))
