"""Checks of training data on the host, before a compiled step meets them.

A compiled step cannot refuse a value: an id outside the vocabulary becomes NaN on one backend and
another token on the next. So everything that `fit`, `evaluate`, `predict` and the `*_on_batch`
methods take passes here: arrays at once, data sets and generators batch by batch.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from qwen3_next.config.validation import shown
from qwen3_next.models.values import without_values

Check = Callable[[Any, Any], None]


def checked(check: Check, x: Any, y: Any = None, **weights: Any) -> Any:
    """`x` with `check(x, y)` done, or to be done for every batch as it comes.

    Raises:
        ValueError: nothing to run over, arrays without rows, or `weights` of arrays without labels,
            by the name of the argument: Keras drops them.
    """
    if x is None:
        raise ValueError("`x` must be arrays or a data set. Received: x=None")
    if isinstance(x, keras.utils.PyDataset):
        return _CheckedDataset(check, x)
    if isinstance(x, types.GeneratorType):
        return _checked_batches(check, x)
    if _is_tensorflow_dataset(x):
        return _checked_dataset(check, x)
    shapes = [tuple(getattr(part, "shape", ())) for part in keras.tree.flatten(x)]
    if any(shape[:1] == (0,) for shape in shapes):
        raise ValueError(f"`x` must hold at least one row. Received: arrays of shapes {shapes}")
    for name, weight in weights.items():
        if y is None and weight is not None:
            raise ValueError(
                f"`{name}` needs labels, `y`: Keras drops it without. A data set of "
                f"(x, None, sample_weight) keeps it. Received: y=None, {name}={shown(weight)}"
            )
    check(x, y)
    return x


@contextlib.contextmanager
def values_kept(model: keras.Model, variables: Iterable[keras.Variable]) -> Iterator[None]:
    """Gives variables their values back where an error left them without.

    On JAX Keras takes the values out of a model while it runs over data and puts them back at the
    end; an error on the way, such as that of a check, would lose them.
    """
    before = [(variable, variable.value) for variable in variables]
    try:
        yield
    except BaseException:
        if hasattr(model, "jax_state_sync"):
            model.jax_state_sync()
        lost = {id(variable) for variable in without_values(v for v, _ in before)}
        for variable, value in before:
            if id(variable) in lost:
                variable.assign(value)
        raise


def _check_batch(check, batch):
    x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
    check(x, y)


def _checked_batches(check, batches):
    for batch in batches:
        _check_batch(check, batch)
        yield batch


class _CheckedDataset(keras.utils.PyDataset):
    """A data set that checks the batches of another."""

    def __init__(self, check, dataset):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self.check, self.dataset = check, dataset

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __getitem__(self, index):
        batch = self.dataset[index]
        _check_batch(self.check, batch)
        return batch

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


def _is_tensorflow_dataset(x):
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(x, tensorflow.data.Dataset)


def _checked_dataset(check, dataset):
    import tensorflow as tf

    def checked_batch(*batch):
        def on_host(*arrays):
            _check_batch(check, tf.nest.pack_sequence_as(batch, arrays))
            return np.bool_(True)

        done = tf.numpy_function(on_host, tf.nest.flatten(batch), tf.bool)
        with tf.control_dependencies([done]):
            batch = tf.nest.map_structure(tf.identity, batch)
        return batch[0] if len(batch) == 1 else batch

    return dataset.map(checked_batch)
