"""What Keras knows of a tensor before it has values."""

from typing import Any

import keras

Shape = tuple[Any, ...]  # integers, `None` where a dim is unknown


def spec_like(x: Any, dtype: str | None = None) -> keras.KerasTensor:
    """A symbolic tensor with the shape of `x` and its dtype, or another one."""
    return keras.KerasTensor(x.shape, x.dtype if dtype is None else dtype)
