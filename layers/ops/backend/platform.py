"""Which implementation of an op runs where."""

from collections.abc import Sequence

import keras

BACKEND = keras.backend.backend()


def platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: where the active backend puts new tensors."""
    if BACKEND == "jax":
        import jax

        return jax.default_backend()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def choose(implementation: str | None, names: Sequence[str], default: str) -> str:
    """`implementation`, or `default` if it is `None`; `ValueError` if it is not one of `names`."""
    if implementation is None:
        return default
    if implementation not in names:
        raise ValueError(
            f"`implementation` must be None or one of {names}. Received: {implementation=}"
        )
    return implementation
