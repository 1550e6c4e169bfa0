"""Values of variables: without some, as on JAX while a model runs over data, and told apart."""

import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

_TAKEN = (
    "On JAX a model can be neither called nor saved or read while `fit`, `evaluate` or `predict` "
    "runs over data, neither by another thread nor by a callback between two batches: Keras keeps "
    "the values of its variables until the end of the epoch. "
)


def without_values(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    """The variables that have no value at the moment."""
    return [variable for variable in variables if not _has_value(variable)]


@contextlib.contextmanager
def values_needed(model: keras.Model) -> Iterator[None]:
    """Says what is the matter where an error comes of variables without values.

    Raises:
        ValueError: the model runs over data elsewhere.
    """
    try:
        yield
    except Exception as error:
        if not without_values(model.variables):
            raise
        raise ValueError(f"{_TAKEN}Received: a call of {model.name!r} during such a run") from error


def require_values(variables: Iterable[keras.Variable]) -> None:
    """Raises `ValueError` for variables that are to be read and have no value."""
    missing = without_values(variables)
    if missing:
        raise ValueError(
            f"{_TAKEN}Received: {len(missing)} variables without a value, the first of them "
            f"{missing[0].path}"
        )


def checksum(arrays: Iterable, *settings: Any) -> int:
    """CRC-32 of arrays or variables, their shapes and dtypes, and of what JSON can hold."""
    total = zlib.crc32(json.dumps(settings).encode())
    for array in arrays:
        array = np.ascontiguousarray(keras.ops.convert_to_numpy(array))
        total = zlib.crc32(f"{array.dtype}{array.shape}".encode(), total)
        total = zlib.crc32(array.view("uint8").reshape(-1).data, total)
    return total


def _has_value(variable):
    try:
        return variable.value is not None
    except TypeError:  # without a value there is none to return, nor an initializer
        return False
