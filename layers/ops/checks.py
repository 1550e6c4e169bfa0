"""Checks of shapes, as far as they are known before the values are, and of what a cast may lose."""

from collections.abc import Sequence

import keras
from keras import ops

from .tensor_types import Tensor


def require_shape(name: str, x: Tensor | None, expected: Sequence[int | None]) -> None:
    """Raises `ValueError` unless the known dims of `x` are `expected`; `None` there means any."""
    if x is None:
        return
    shape = tuple(x.shape)
    fits = len(shape) == len(expected) and all(
        have is None or want is None or have == want for have, want in zip(shape, expected)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"`{name}` must have shape ({wanted}). Received: {name}.shape={shape}")


def to_int32(x: Tensor) -> Tensor:
    """Integers as int32, -1 for those that int32 cannot hold: a cast makes 1 of 2**32 + 1."""
    x = ops.convert_to_tensor(x)
    narrow = ops.cast(x, "int32")
    if keras.backend.standardize_dtype(x.dtype) not in ("int64", "uint32", "uint64"):
        return narrow
    return ops.where(ops.cast(narrow, x.dtype) == x, narrow, -1)
