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
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras

from ..tensor_types import Tensor
from .programs import identity, program, register_gradient
from .sharding import on_shards

BACKEND = keras.backend.backend()


def custom_gradient(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    primal: Callable[..., Any] | None = None,
    shards: "Shards | None" = None,
) -> Callable[..., Any]:
    """Returns `f(*inputs) -> outputs`, differentiated by `backward` instead of by tracing.

    `primal` is for residuals that cost something, as inputs do not; only JAX can tell when they are
    not needed. With `shards` every device runs the three functions on its own parts; sums over
    devices are theirs.
    """
    if BACKEND == "jax":
        return _jax(forward, backward, primal, shards)
    return {"tensorflow": _tensorflow, "torch": _torch}[BACKEND](forward, backward)


def dense_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient is a tensor and not a list of slices.

    TensorFlow gives a lookup table the gradients of the rows that were read, one by one, and
    optimizers that square them forget that a row may have been read twice.
    """
    if BACKEND != "tensorflow":
        return x
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    return program(_tensorflow_dense(), x)(x)


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


class Shards(NamedTuple):
    """How the tensors of a (forward, backward) pair are spread over devices.

    Attributes:
        mesh: `jax.sharding.Mesh`.
        inputs: A `spec` for each input.
        outputs: Those of the outputs, a tuple if there are several.
        residuals: Those of the residuals.
        gradients: Those of the gradients, `None` for integer inputs.
    """

    mesh: Any
    inputs: tuple
    outputs: Any
    residuals: Any
    gradients: tuple


def _jax(forward, backward, primal, shards):
    import jax

    if shards is not None:
        results = shards.outputs, shards.residuals
        forward = on_shards(forward, shards.mesh, shards.inputs, results)
        if primal is not None:
            primal = on_shards(primal, shards.mesh, shards.inputs, shards.outputs)

    @jax.custom_vjp
    def function(*inputs):
        return forward(*inputs)[0] if primal is None else primal(*inputs)

    def vjp(residuals, cotangents):
        cotangents = _as_tuple(cotangents)
        if shards is None:
            return tuple(backward(residuals, *cotangents))
        # Outputs that are integers have no cotangents.
        given = [
            (specs, x)
            for specs, x in zip(_specs(shards.outputs), cotangents)
            if x.dtype != jax.dtypes.float0
        ]
        specs, cotangents = zip(*given)
        inputs = shards.residuals, *specs
        run = on_shards(backward, shards.mesh, inputs, shards.gradients)
        return run(residuals, *cotangents)

    function.defvjp(forward, vjp)
    # A program of its own, so that layers of equal shapes are traced once and calls outside of a
    # compiled function do not compile the loops anew.
    return jax.jit(function)


def _tensorflow(forward, backward):
    import tensorflow as tf

    # For every trace of the forward half, which input a residual is, `None` for all others.
    inputs_among: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def half(function, *args):
        # XLA programs of their own: their loops update buffers in place whether the caller runs
        # eagerly, in a graph or under XLA. A plain TensorFlow loop would copy them.
        return program(function, *args, jit_compile=True)

    def kept(*inputs):
        """Outputs, and residuals but for inputs, of which the program would return copies."""
        outputs, residuals = forward(*inputs)
        numbers = {id(x): number for number, x in enumerate(inputs)}
        found = tf.nest.map_structure(lambda x: numbers.get(id(x)), residuals)
        inputs_among[tf.compat.v1.get_default_graph()] = found
        leaves = zip(tf.nest.flatten(residuals), tf.nest.flatten(found))
        return outputs, [x for x, number in leaves if number is None]

    @functools.cache
    def gradient_name(count):
        def gradient(op, *cotangents):
            # Results and inputs as this operation gives them: whoever asks for gradients of a
            # tensor in here, as a persistent tape does, comes back to it and never to the loops
            # before it.
            results, inputs = op.outputs[:-count], op.outputs[-count:]
            # How they are nested follows from the inputs.
            traced = half(kept, *inputs).get_concrete_function(*inputs)
            outputs, own = tf.nest.pack_sequence_as(traced.structured_outputs, results)
            where, own = inputs_among[traced.graph], iter(own)
            residuals = [next(own) if n is None else inputs[n] for n in tf.nest.flatten(where)]
            residuals = tf.nest.pack_sequence_as(where, residuals)
            cotangents = cotangents[: len(tf.nest.flatten(outputs))]
            args = residuals, *map(tf.convert_to_tensor, cotangents)
            found = list(half(backward, *args)(*args))
            given = iter(identity([x for x in found if x is not None], _refusing_gradient()))
            return [None] * len(results) + [None if x is None else next(given) for x in found]

        return register_gradient(gradient)

    def differentiable(*inputs):
        outputs, own = half(kept, *inputs)(*inputs)
        results = tf.nest.flatten((outputs, own))
        marked = identity([*results, *inputs], gradient_name(len(inputs)))
        return tf.nest.pack_sequence_as(outputs, marked[: len(tf.nest.flatten(outputs))])

    def call(*inputs):
        inputs = tuple(tf.convert_to_tensor(x) for x in inputs)
        # TensorFlow adds what a gradient within a graph needs to the outputs of the function that
        # it differentiates there. An eager tape would take those for outputs that have gradients.
        context = tf.executing_eagerly()
        return program(differentiable, *inputs, context=context)(*inputs)

    return call


@functools.cache
def _refusing_gradient():
    def gradient(op, *cotangents):
        raise ValueError(
            "Gradients of gradients are not available: take gradients outside of other tapes, and "
            f"of a persistent one outside of its own context. Received: gradients of {op.name}"
        )

    return register_gradient(gradient)


@functools.cache
def _tensorflow_dense():
    import tensorflow as tf

    name = register_gradient(lambda _, cotangent: tf.convert_to_tensor(cotangent))

    def dense(x):
        return identity([x], name)[0]

    return dense


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


def _specs(outputs):
    # A spec is a tuple itself.
    return outputs if type(outputs) is tuple else (outputs,)
