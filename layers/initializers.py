"""Initial weights, drawn on the host.

Drawing with NumPy gives the same weights for a seed on every backend, and spares JAX the
compilation of a random-number program for each shape.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from .ops.backend.shards import in_shards, initial_sharding
from .ops.tensor_types import Tensor

_loading = False


@contextlib.contextmanager
def weights_to_be_loaded() -> Iterator[None]:
    """Within it new weights are zeros: for models whose weights are about to be replaced."""
    global _loading
    before, _loading = _loading, True
    try:
        yield
    finally:
        _loading = before


class _Drawn(keras.initializers.Initializer):
    """Draws with a generator seeded by Python's `random`, as Keras' own initialisers are."""

    def __call__(
        self, shape: tuple[int, ...], dtype: str | None = None, layout: Any = None
    ) -> Tensor:
        """Initial values, under `keras.distribution` in the shards of a `layout`.

        Without a layout Keras would compile the drawn values into a program for every device.
        """
        dtype = dtype or keras.config.floatx()
        if layout is None and _loading:
            return ops.zeros(shape, dtype)
        if _loading:
            return in_shards(np.broadcast_to(np.zeros((), dtype), shape), initial_sharding(layout))
        values = self.on_host(shape, dtype)
        if layout is None:
            return ops.convert_to_tensor(values, dtype)
        return in_shards(values, initial_sharding(layout))

    def on_host(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The values of the next draw as a NumPy array."""
        values = self.draw(np.random.default_rng(random.getrandbits(63)), shape)
        return values.astype(dtype, copy=False)

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="qwen3_next")
class Normal(_Drawn):
    """Normal with mean 0."""

    def __init__(self, stddev: float) -> None:
        self.stddev = stddev

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return generator.standard_normal(shape, "float32") * np.float32(self.stddev)

    def get_config(self) -> dict[str, Any]:
        return {"stddev": self.stddev}


@keras.saving.register_keras_serializable(package="qwen3_next")
class LogUniform(_Drawn):
    """Logarithm of a uniform draw from `[low, high)`."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.log(generator.uniform(self.low, self.high, shape)).astype("float32")

    def get_config(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high}
