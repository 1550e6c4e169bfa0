"""Runs functions of tensors in the ways of the active backend, with NumPy arrays in and out.

    run(function, *arrays)                       -> outputs
    gradients(function, arrays, cotangents)      -> d sum(outputs * cotangents) / d array
    assert_close(actual, expected, tolerance)    largest difference, in units of the expected size
    assert_slopes(function, arrays, cotangents, grads)   grads against a float64 function

Functions are compiled once per (function, mode) and set of shapes, so tests that share a
module-level function and its shapes share a program.
"""

import contextlib
import functools

import keras
import numpy as np
from keras import tree

BACKEND = keras.backend.backend()
MODES = {"jax": ["jit"], "tensorflow": ["eager", "graph", "xla"], "torch": ["eager"]}[BACKEND]
DEFAULT = MODES[-1]
# The way with the fewest programs: one on JAX, which has one for every operation else.
CHEAPEST = MODES[0]
# Options of a model's `compile` that run its steps in that way.
CHEAPEST_STEPS = {"run_eagerly": CHEAPEST == "eager"}


def run(function, *arrays, mode=DEFAULT):
    """`function(*arrays)`; arrays and outputs are nests in which `None` may stand."""
    return to_numpy(run_to_tensors(function, *arrays, mode=mode))


def run_to_tensors(function, *arrays, mode=DEFAULT):
    """The same with outputs as the backend has them."""
    return _compile(function, mode)(*to_tensors(arrays))


def gradients(function, arrays, cotangents, mode=DEFAULT):
    """One gradient per float array, `None` for the others; a `None` cotangent drops an output."""
    wanted = tuple(i for i, x in enumerate(arrays) if _is_float(x))
    gradient = _compile(_gradient(function, wanted), mode)
    found = to_numpy(gradient(to_tensors(tuple(arrays)), to_tensors(_as_tuple(cotangents))))
    found = dict(zip(wanted, found, strict=True))
    return [found.get(i) for i in range(len(arrays))]


def assert_same_at_run_time(function, arrays, unknown, tolerance):
    """Gradients of a sum, on TensorFlow, where only the run tells `unknown[i]` axes of array i."""
    import tensorflow as tf

    cotangent = np.ones(function(*arrays).shape, "float32")
    expected = gradients(function, arrays, cotangent)

    specs = [
        tf.TensorSpec((*[None] * count, *x.shape[count:]), x.dtype)
        for x, count in zip(arrays, unknown, strict=True)
    ]

    @tf.function(input_signature=specs, autograph=False)
    def gradient(*arrays):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            value = tf.reduce_sum(function(*arrays))
        return tape.gradient(value, arrays)

    for actual, same in zip(to_numpy(gradient(*arrays)), expected, strict=True):
        assert_close(actual, same, tolerance)


def to_tensors(nest):
    return tree.map_structure(_to_tensor, nest)


def to_numpy(nest):
    return tree.map_structure(lambda x: None if x is None else _to_array(x), nest)


def with_weights(layer, call=None):
    """`f(*weights, *inputs)`: the layer, or `call`, as a function of its trainable weights."""
    weights = layer.trainable_variables
    call = layer if call is None else call

    def function(*arrays):
        values, inputs = arrays[: len(weights)], arrays[len(weights) :]
        with keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
            return call(*inputs)

    return function


def weight_arrays(layer):
    return [_to_array(v.value) for v in layer.trainable_variables]


def weight_gradients(layer, function, x, cotangent, mode=DEFAULT):
    """Gradients of `sum(function(x) * cotangent)` by the variables of a layer themselves."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        variables = [v.value for v in layer.trainable_variables]

        def gradient(x, cotangent):
            with tf.GradientTape() as tape:
                loss = keras.ops.sum(function(x) * cotangent)
            return tape.gradient(loss, variables)

        return run(gradient, x, cotangent, mode=mode)
    arrays = [*weight_arrays(layer), x]
    return gradients(with_weights(layer, function), arrays, cotangent, mode)[:-1]


def eagerly():
    """A context in which every operation runs by itself, loops and branches included."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.disable_jit()


def assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    if actual.size:
        error = np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())
        assert error <= tolerance, f"off by {error:.3g}, tolerance {tolerance:.3g}"


def assert_slopes(function, arrays, cotangents, grads, tolerance=2e-5, directions=3, step=1e-5):
    """Holds the directional derivatives of `grads` against central differences in NumPy float64."""
    rng = np.random.default_rng(11)
    arrays = [np.asarray(x, np.float64) if _is_float(x) else x for x in arrays]

    def loss(place, moved):
        outputs = _as_tuple(function(*arrays[:place], moved, *arrays[place + 1 :]))
        pairs = zip(outputs, _as_tuple(cotangents), strict=True)
        return sum((output * c).sum() for output, c in pairs if c is not None)

    for place, grad in enumerate(grads):
        if grad is None:
            continue
        x = arrays[place]
        assert grad.shape == x.shape
        assert np.isfinite(grad).all()
        for _ in range(directions):
            direction = rng.choice([-1.0, 1.0], x.shape)
            difference = loss(place, x + step * direction) - loss(place, x - step * direction)
            derivative = (np.asarray(grad, np.float64) * direction).sum()
            error = abs(derivative - difference / (2 * step)) / max(1.0, np.linalg.norm(grad))
            assert error <= tolerance, f"argument {place}: off by {error:.3g}"


@functools.cache
def _compile(function, mode):
    if mode == "jit":
        import jax

        return jax.jit(function)
    if mode in ("graph", "xla"):
        import tensorflow as tf

        return tf.function(function, jit_compile=mode == "xla", autograph=False)
    return function


@functools.cache
def _gradient(function, wanted):
    def loss(floats, arrays, cotangents):
        arrays = list(arrays)
        for place, value in zip(wanted, floats, strict=True):
            arrays[place] = value
        pairs = zip(_as_tuple(function(*arrays)), cotangents, strict=True)
        return sum(
            keras.ops.sum(keras.ops.cast(output, "float32") * cotangent)
            for output, cotangent in pairs
            if cotangent is not None
        )

    def jax_gradient(arrays, cotangents):
        import jax

        return jax.grad(loss)([arrays[i] for i in wanted], arrays, cotangents)

    def tensorflow_gradient(arrays, cotangents):
        import tensorflow as tf

        floats = [arrays[i] for i in wanted]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            value = loss(floats, arrays, cotangents)
        return tape.gradient(value, floats)

    def torch_gradient(arrays, cotangents):
        import torch

        floats = [arrays[i].detach().requires_grad_() for i in wanted]
        return torch.autograd.grad(loss(floats, arrays, cotangents), floats)

    return {
        "jax": jax_gradient,
        "tensorflow": tensorflow_gradient,
        "torch": torch_gradient,
    }[BACKEND]


def _to_tensor(x):
    return None if x is None else keras.ops.convert_to_tensor(x)


def _to_array(x):
    x = keras.ops.convert_to_numpy(keras.ops.stop_gradient(x))
    return x.astype("float32") if x.dtype.name == "bfloat16" else np.asarray(x)


def _is_float(x):
    return x is not None and np.issubdtype(np.asarray(x).dtype, np.floating)


def _as_tuple(value):
    return tuple(value) if isinstance(value, tuple | list) else (value,)
