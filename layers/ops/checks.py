"""Checks of shapes and dtypes, which are known before the values are, and of what a cast may lose.

require_shape     a shape, as far as it is known
require_tokens    rows with tokens
require_words     rows with words
as_array          numbers, lists of them as tensors
as_floats         the same, of a float dtype
as_mask           a mask of any dtype as bool
exact_int32       integers that int32 can hold, nothing else
to_integers       integers as int32, nothing else
to_int32          the same, of what is known to be integers
if_given          one of these for an argument that may be `None`
known_values      the values of what has some already
require_floatx    the default dtype of Keras
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from qwen3_next.config.validation import shown

from .tensor_types import Tensor

_OF_NUMBERS = re.compile("bool|u?int[0-9]+|b?float[0-9]+.*")


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


def require_words(name: str, x: Tensor) -> None:
    """Raises `ValueError` for rows `(..., V)` that are known to hold no word."""
    if x.shape[-1] == 0:
        raise ValueError(
            f"`{name}` must hold at least one word. Received: {name}.shape={tuple(x.shape)}"
        )


def as_array(name: str, x: Any, convert: Callable[[Any], Tensor] = ops.convert_to_tensor) -> Tensor:
    """What has a shape and a dtype as it is, lists as tensors; `TypeError` for what is no array of
    real numbers."""
    found, error = x, None
    try:
        if not (hasattr(x, "dtype") and hasattr(x, "shape")):
            found = convert(x)
        dtype = keras.backend.standardize_dtype(found.dtype)
    except (AttributeError, OverflowError, TypeError, ValueError) as caught:
        dtype, error = "", caught
    if not _OF_NUMBERS.fullmatch(dtype):
        raise TypeError(
            f"`{name}` must be an array of numbers. Received: {name}={shown(x)}"
        ) from error
    return found


def as_floats(name: str, x: Any) -> Tensor:
    """The same; `ValueError` unless it is of a float dtype."""
    x = as_array(name, x)
    if "float" not in keras.backend.standardize_dtype(x.dtype):
        raise ValueError(f"`{name}` must be floats. Received: {name}.dtype={x.dtype}")
    return x


def if_given(check: Callable[[str, Any], Tensor], name: str, x: Any) -> Tensor | None:
    """`check(name, x)`, or `None` for no x."""
    return None if x is None else check(name, x)


def as_mask(x: Any, name: str = "padding_mask") -> Tensor | None:
    """A mask as bool, true where it is not 0: of other numbers `~` and sums make something else.

    Raises `ValueError` for NaN, where values are known: it is neither.
    """
    if x is None:
        return None
    x = as_array(name, x)
    if "float" in keras.backend.standardize_dtype(x.dtype):
        values = known_values(x)
        if values is not None and np.isnan(np.asarray(values, "float32")).any():
            raise ValueError(f"`{name}` must not hold NaN. Received: {name}={x}")
    return ops.cast(x, "bool")


def exact_int32(name: str, x: Any) -> Tensor:
    """`to_integers`; `ValueError` for what int32 cannot hold, too, where values are known."""
    x = as_array(name, x, np.asarray)
    if keras.backend.standardize_dtype(x.dtype) in ("int64", "uint32", "uint64"):
        values = known_values(x)
        wrong = np.zeros(0) if values is None else values[values != values.astype("int32")]
        if wrong.size:
            raise ValueError(f"`{name}` must fit in int32. Received: {name} with {wrong[0]}")
    return to_integers(name, x)


def to_integers(name: str, x: Any) -> Tensor:
    """`to_int32` of integers; `ValueError` for other dtypes, of which a cast would lose a part."""
    x = as_array(name, x, np.asarray)
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


def known_values(x: Any) -> np.ndarray | None:
    """The values of an array or a tensor, `None` where this process has none yet, or a share."""
    if isinstance(x, np.ndarray):
        return x
    if not ops.is_tensor(x) or isinstance(x, keras.KerasTensor) or _is_traced(x):
        return None
    return ops.convert_to_numpy(x) if getattr(x, "is_fully_addressable", True) else None


def _is_traced(x):
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(x, jax.core.Tracer)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.is_symbolic_tensor(x)
    return False


def require_floatx() -> None:
    """Raises `ValueError` where Keras' default dtype is not float32.

    It is the dtype of constants and of random numbers in the middle of an op, too, and those that
    choose tokens and experts need float32 whatever a model computes in.
    """
    given = keras.config.floatx()
    if given != "float32":
        raise ValueError(
            "`keras.config.floatx()` must be 'float32'. Other dtypes are policies: give `dtype=` "
            f"or `keras.config.set_dtype_policy({given!r})`. Received: floatx={given!r}"
        )
