"""Variables without values: on JAX Keras takes them while a model runs over data."""

import contextlib
from collections.abc import Iterable, Iterator

import keras


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
        raise ValueError(
            "On JAX a model cannot be called while `fit`, `evaluate` or `predict` runs over data, "
            "neither by another thread nor by a callback between two batches: Keras keeps the "
            "values of its variables until the end of the epoch. "
            f"Received: a call of {model.name!r} during such a run"
        ) from error


def _has_value(variable):
    try:
        return variable.value is not None
    except TypeError:  # without a value there is none to return, nor an initializer
        return False
