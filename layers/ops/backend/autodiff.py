"""Bind a pure (forward, backward) pair to the differentiation of the active backend.

    forward(*inputs)                 -> (outputs, residuals)
    backward(residuals, *cotangents) -> one gradient per input, `None` for integer inputs
    primal(*inputs)                  -> outputs, where nothing is differentiated (optional)

Inputs are a flat list of tensors, `outputs` is a tensor or a tuple of tensors, residuals are any
nest of tensors. Static options belong in closures, built once and cached, so that backends that
cache by function identity do not trace again.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from ..tensor_types import Tensor

BACKEND = keras.backend.backend()


def custom_gradient(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    primal: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns `f(*inputs) -> outputs`, differentiated by `backward` instead of by tracing.

    `primal` is for residuals that cost something; only JAX can tell when they are not needed.
    """
    if BACKEND == "jax":
        return _jax(forward, backward, primal)
    return {"tensorflow": _tensorflow, "torch": _torch}[BACKEND](forward, backward)


def dense_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient is a tensor and not a list of slices.

    TensorFlow gives a lookup table the gradients of the rows that were read, one by one, and
    optimizers that square them forget that a row may have been read twice.
    """
    if BACKEND != "tensorflow":
        return x
    import tensorflow as tf

    @tf.custom_gradient
    def function(x):
        return tf.identity(x), tf.convert_to_tensor

    return function(tf.convert_to_tensor(x))  # a variable read inside would want a gradient, too


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within it JAX multiplies float32 matrices as float32 on GPU and TPU, too.

    Its default there rounds the operands to 10 or 8 bits of mantissa: not enough for the inverse
    and the state of the delta rule, nor for a router's choice. TensorFlow has one switch for the
    whole process, `tf.config.experimental.enable_tensor_float_32_execution(False)`.
    """
    if BACKEND != "jax":
        yield
        return
    import jax

    with jax.default_matmul_precision("highest"):
        yield


def _jax(forward, backward, primal):
    import jax

    @jax.custom_vjp
    def function(*inputs):
        return forward(*inputs)[0] if primal is None else primal(*inputs)

    def vjp(residuals, cotangents):
        return tuple(backward(residuals, *_as_tuple(cotangents)))

    function.defvjp(forward, vjp)
    # A program of its own, so that layers of equal shapes are traced once and calls outside of a
    # compiled function do not compile the loops anew.
    return jax.jit(function)


def _tensorflow(forward, backward):
    import tensorflow as tf

    # Both halves are XLA programs of their own: their loops update buffers in place whether the
    # caller runs eagerly, in a graph or under XLA. A plain TensorFlow loop would copy them.
    # Each set of shapes has its own: TensorFlow would reuse a trace of unknown dims for known
    # ones, and return residuals whose shapes no longer fit those of the inputs beside them.
    @functools.cache
    def compiled(half, shapes):
        return tf.function(half, jit_compile=True, autograph=False)

    def run(half, *args):
        shapes = tuple((x.dtype, *x.shape) for x in tf.nest.flatten(args))
        return compiled(half, shapes)(*args)

    @tf.custom_gradient
    def function(*inputs):
        # Run eagerly, an outer tape would differentiate the program itself and not find how.
        outputs, residuals = run(forward, *map(tf.stop_gradient, inputs))

        def vjp(*cotangents):
            return list(run(backward, residuals, *cotangents))

        return outputs, vjp

    def call(*inputs):
        return function(*(tf.convert_to_tensor(x) for x in inputs))

    return call


def _torch(forward, backward):
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs, residuals = forward(*inputs)
            ctx.structure = residuals
            ctx.save_for_backward(*keras.tree.flatten(residuals))
            return outputs

        @staticmethod
        def backward(ctx, *cotangents):
            residuals = keras.tree.pack_sequence_as(ctx.structure, ctx.saved_tensors)
            return tuple(backward(residuals, *cotangents))

    return Function.apply


def _as_tuple(value):
    return value if isinstance(value, tuple) else (value,)
