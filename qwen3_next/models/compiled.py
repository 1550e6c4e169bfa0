"""Compiled functions of a model, outside of `fit`."""

from collections.abc import Callable

import keras


def compile_with_weights(
    model: keras.Model, function: Callable, donate: tuple[int, ...] = ()
) -> Callable:
    """Compiles `function(*args)`, which may call `model`, for the active backend.

    The weights go in as arguments, so that training does not make the compiled code stale. Args
    are nests of tensors; those at the positions `donate` are consumed, their memory is reused.
    """
    return {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[keras.backend.backend()](
        model, function, donate
    )


def _jax(model, function, donate):
    import jax

    variables = model.variables

    def stateless(values, *args):
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return function(*args)

    compiled = jax.jit(stateless, donate_argnums=tuple(i + 1 for i in donate))
    return lambda *args: compiled([variable.value for variable in variables], *args)


def _tensorflow(model, function, donate):
    import tensorflow as tf

    del model, donate  # variables are read where they are, buffers are reused inside the program
    return tf.function(function, jit_compile=True, autograph=False)


def _torch(model, function, donate):
    import torch

    del model, donate
    return torch.no_grad()(function)
