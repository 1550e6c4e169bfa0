"""Compiled functions of a model, outside of `fit`."""

from collections.abc import Callable
from typing import Any

import keras

from qwen3_next.layers.ops.backend.sharding import Devices, devices
from qwen3_next.models.values import values_needed


def compile_with_weights(
    model: keras.Model, function: Callable, donate: tuple[int, ...] = ()
) -> Callable:
    """Compiles `function(*args)`, which may call `model`, for the active backend.

    The weights are read at every call, so that training does not make the compiled code stale. A
    change of the set of variables (LoRA, another layer) drops what was compiled, as Keras drops
    its `train_function`; so do other devices, which layers ask for while they are traced.

    Args:
        model: The model whose variables the function uses.
        function: Takes and returns nests of tensors.
        donate: Positions of arguments that are consumed, so that their memory is reused.
    """
    return _CompiledFunction(model, function, donate)


class _CompiledFunction:
    def __init__(self, model, function, donate):
        self.model = model
        self.function = function
        self.donate = donate
        self._variables: list = []
        self._devices: Devices | None = None
        self._compiled: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        with values_needed(self.model):
            return self._call(args)

    def _call(self, args):
        variables, found = self.model.variables, devices()
        moved = found != self._devices
        if self._compiled is None or moved or _differ(variables, self._variables):
            compiler = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
            self._variables, self._devices = variables, found
            self._compiled = compiler[keras.backend.backend()](
                variables, self.function, self.donate
            )
        return self._compiled(*args)


def _differ(variables, others):
    return len(variables) != len(others) or any(a is not b for a, b in zip(variables, others))


def _jax(variables, function, donate):
    import jax

    def stateless(values, *args):
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return function(*args)

    compiled = jax.jit(stateless, donate_argnums=tuple(i + 1 for i in donate))
    return lambda *args: compiled([variable.value for variable in variables], *args)


def _tensorflow(variables, function, donate):
    import tensorflow as tf

    del variables, donate  # read where they are; buffers are reused inside the program
    compiled = tf.function(function, jit_compile=True, autograph=False)
    # One program per set of shapes is what is meant here, nothing to warn of.
    compiled._omit_frequent_tracing_warning = True
    return compiled


def _torch(variables, function, donate):
    import torch

    del variables, donate
    return torch.no_grad()(function)
