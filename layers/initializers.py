"""Initial weights, drawn on the host.

Drawing with NumPy gives the same weights for a seed on every backend, and spares JAX the
compilation of a random-number program for each shape.
"""

import contextlib
import random

import keras
import numpy as np
from keras import ops

_loading = False


@contextlib.contextmanager
def weights_to_be_loaded():
    """Within it new weights are zeros: for models whose weights are about to be replaced."""
    global _loading
    before, _loading = _loading, True
    try:
        yield
    finally:
        _loading = before


class _Drawn(keras.initializers.Initializer):
    """Draws with a generator seeded by Python's `random`, as Keras' own initialisers are."""

    def __call__(self, shape, dtype=None):
        dtype = dtype or keras.config.floatx()
        if _loading:
            return ops.zeros(shape, dtype)
        values = self.draw(np.random.default_rng(random.getrandbits(63)), shape)
        return ops.cast(ops.convert_to_tensor(values), dtype)


@keras.saving.register_keras_serializable(package="qwen3_next")
class Normal(_Drawn):
    """Normal with mean 0."""

    def __init__(self, stddev):
        self.stddev = stddev

    def draw(self, generator, shape):
        return generator.standard_normal(shape, "float32") * np.float32(self.stddev)

    def get_config(self):
        return {"stddev": self.stddev}


@keras.saving.register_keras_serializable(package="qwen3_next")
class LogUniform(_Drawn):
    """Logarithm of a uniform draw from `[low, high)`."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def draw(self, generator, shape):
        return np.log(generator.uniform(self.low, self.high, shape)).astype("float32")

    def get_config(self):
        return {"low": self.low, "high": self.high}
