"""Saving a model whose weights several processes hold together: one writes, all gather.

A weight in shards is gathered by all processes at once, so all of them must ask for the same
weights in the same order, and none may leave before the others, whatever happens to the disk. The
weights pass through the host one by one.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from qwen3_next.layers.ops.backend.shards import (
    is_first_process,
    is_shared,
    told_by_first,
    whole_array,
)
from qwen3_next.models.values import require_values


def save_once(
    save: Callable[[Iterator[np.ndarray]], None], variables: list[keras.Variable]
) -> None:
    """`save(arrays)` with the values of the variables, each fetched when it is asked for.

    A model that is shared by several processes is saved by the first of them; the others return
    when the files are there.

    Args:
        save: Writes the arrays, which come in the order of the variables.
        variables: The variables to save.

    Raises:
        OSError: in the other processes, where the first could not save.
        ValueError: variables whose values Keras has taken.
    """
    require_values(variables)
    if is_shared(variables):
        _save_by_first(save, variables)
    else:
        save(map(whole_array, variables))


def save_by_keras(
    save: Callable[[], None], write: Callable[[Path], Any], variables: list[keras.Variable]
) -> None:
    """`save()`, a function of Keras', with variables whose values are fetched when they are read.

    Args:
        save: Saves the model.
        write: `write(path)` writes a file with the same weights, to find the order in which Keras
            reads them.
        variables: All that Keras may read. What every device has a copy of is read as it is.

    Raises:
        ValueError: variables whose values Keras has taken.
    """
    require_values(variables)
    if not is_shared(variables):
        save()
        return
    divided = [variable for variable in variables if not variable.value.is_fully_replicated]
    order: list[keras.Variable] = []

    def note(variable):
        order.append(variable)
        return np.zeros(0)

    with tempfile.TemporaryDirectory() as folder, _read_by(note, divided):
        write(Path(folder))

    def save_with(arrays):
        expected = zip(order, arrays, strict=True)

        def next_array(variable):
            known, array = next(expected)
            if known is not variable:
                raise RuntimeError(f"Keras read {variable.path} where it had read {known.path}.")
            return array

        with _read_by(next_array, divided):
            save()

    _save_by_first(save_with, order)


def _save_by_first(save, variables):
    arrays, error = map(whole_array, variables), None
    if is_first_process():
        try:
            save(arrays)
        except Exception as caught:  # the others wait for this process to gather with them
            error = caught
    for _ in arrays:
        pass
    failed = told_by_first(error is not None)
    if error is not None:
        raise error
    if failed:
        raise OSError("The first process could not save the model: see its error.")


class _OnDemand:
    """Stands for the value of a variable until NumPy asks for it."""

    def __init__(self, variable, read):
        self.variable, self.value, self.read = variable, variable.value, read
        self.shape, self.dtype = self.value.shape, self.value.dtype

    def __array__(self, dtype=None, copy=None):
        self.variable._value = self.value
        return self.read(self.variable)


@contextlib.contextmanager
def _read_by(read, variables):
    """Within it NumPy gets `read(variable)` for a variable, once.

    What variables Keras makes of its own to compare with are no affair of other processes.
    """
    stand_ins = [_OnDemand(variable, read) for variable in variables]
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        for stand_in in stand_ins:
            stand_in.variable._value = stand_in
        yield
    finally:
        keras.distribution.set_distribution(distribution)
        for stand_in in stand_ins:
            stand_in.variable._value = stand_in.value
