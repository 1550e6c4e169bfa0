"""Checks of shapes and dtypes, which are known before the values are, and of what a cast may lose.

require_shape     a shape, as far as it is known
require_tokens    rows with tokens
require_floats    a float dtype
as_mask           a mask of any dtype as bool
to_integers       integers as int32, nothing else
to_int32          the same, of what is known to be integers
"""

from collections.abc import Sequence

import keras
import numpy as np
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


def require_tokens(name: str, x: Tensor) -> None:
    """Raises `ValueError` for rows `(B, T, ...)` that are known to hold no token."""
    if x.shape[1] == 0:
        raise ValueError(
            f"`{name}` must hold at least one token per row. "
            f"Received: {name}.shape={tuple(x.shape)}"
        )


def require_floats(name: str, x: Tensor) -> None:
    """Raises `ValueError` unless `x` is of a float dtype."""
    if "float" not in keras.backend.standardize_dtype(x.dtype):
        raise ValueError(f"`{name}` must be floats. Received: {name}.dtype={x.dtype}")


def as_mask(x: Tensor | None) -> Tensor | None:
    """A mask as bool, true where it is not 0: of other numbers `~` and sums make something else."""
    return None if x is None else ops.cast(x, "bool")


def to_integers(name: str, x: Tensor) -> Tensor:
    """`to_int32` of integers; `ValueError` for other dtypes, of which a cast would lose a part."""
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if "int" not in keras.backend.standardize_dtype(x.dtype):
        raise ValueError(f"`{name}` must be integers. Received: {name}.dtype={x.dtype}")
    return to_int32(x)


def to_int32(x: Tensor) -> Tensor:
    """Integers as int32, -1 for those that int32 cannot hold: a cast makes 1 of 2**32 + 1."""
    if isinstance(x, np.ndarray):  # JAX would cast it on the way to a tensor
        narrow = x.astype("int32")
        return ops.convert_to_tensor(np.where(narrow == x, narrow, np.int32(-1)))
    x = ops.convert_to_tensor(x)
    narrow = ops.cast(x, "int32")
    if keras.backend.standardize_dtype(x.dtype) not in ("int64", "uint32", "uint64"):
        return narrow
    return ops.where(ops.cast(narrow, x.dtype) == x, narrow, -1)
