"""A function of a layer as a program of its own, so that eager calls do not compile it anew."""

from collections.abc import Callable
from typing import Any

import keras

BACKEND = keras.backend.backend()


def layer_program(layer: keras.layers.Layer, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(*nests of tensors)`, which may read the variables of `layer`, but assign none.

    On JAX a loop that is called eagerly is compiled at every call, since its body is a new
    function each time; here it is compiled once per set of shapes. Elsewhere `function` itself.
    """
    if BACKEND != "jax":
        return function
    import jax

    @jax.jit
    def compiled(values, *args):
        with keras.StatelessScope(state_mapping=list(zip(layer.variables, values, strict=True))):
            return function(*args)

    return lambda *args: compiled([variable.value for variable in layer.variables], *args)
