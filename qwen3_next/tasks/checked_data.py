"""Checks of training data on the host, before a compiled step meets them.

A compiled step cannot refuse a value: an id outside the vocabulary becomes NaN on one backend and
another token on the next. So everything that `fit`, `evaluate`, `predict` and the `*_on_batch`
methods take passes here: arrays at once, data sets and generators batch by batch.
"""

import contextlib
import copy
import inspect
import sys
import types
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from qwen3_next.config.validation import LARGEST, NOT_NEGATIVE, Rule, integer, require, shown
from qwen3_next.models.inputs import host_values
from qwen3_next.models.values import without_values

Check = Callable[[Any, Any], None]
_EPOCHS = Rule(
    "an integer of at least 1 or a list of epochs",
    lambda value: (
        integer(1).fits(value) or (isinstance(value, Container) and not isinstance(value, str))
    ),
)
# Keras takes a list for one of several inputs.
_WEIGHTS = Rule("an array of finite numbers of at least 0", lambda x: hasattr(x, "shape"))
STEPS_AT_ONCE = integer(1)


def by_name(method: str, first: int, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """What Keras' method is given behind its `first` arguments, by name, in Keras' order.

    Raises:
        TypeError: more arguments than Keras has, or one of them twice.
    """
    names = list(inspect.signature(getattr(keras.Model, method)).parameters)[1 + first :]
    if len(args) > len(names):
        raise TypeError(
            f"`{method}` takes at most {first + len(names)} arguments. "
            f"Received: {first + len(args)} arguments by position"
        )
    given = dict(zip(names, args, strict=False))
    twice = sorted(given.keys() & options.keys())
    if twice:
        raise TypeError(f"`{method}` takes an argument once. Received: {twice} twice")
    return {**given, **options}


def fit_options(args: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """`by_name` of `fit(x, y, batch_size, ...)`, checked as far as Keras does not."""
    given = by_name("fit", 3, args, options)
    require(_EPOCHS, "validation_freq", given.get("validation_freq", 1))
    return given


def refuse_class_weight(class_weight: Any) -> None:
    """Raises `ValueError` for weights of classes where a row has several labels: Keras takes these
    for one-hot, and weighs the row by the place of the largest."""
    if class_weight is not None:
        raise ValueError(
            "`class_weight` is for rows with one label each: weigh others by `sample_weight`. "
            f"Received: class_weight={shown(class_weight)}"
        )


def check_class_weight(class_weight: Any, outputs: int) -> None:
    """Raises `ValueError` for what is no dict of weights of classes: a weight of a class that there
    is not would be dropped. A single output may stand for any number of them."""
    classes = range(outputs if outputs > 1 else LARGEST)
    known = Rule(
        f"a dict from classes in [0, {classes.stop}) to finite numbers of at least 0",
        lambda given: (
            isinstance(given, dict)
            and all(k in classes and NOT_NEGATIVE.fits(v) for k, v in given.items())
        ),
    )
    if class_weight is not None:
        require(known, "class_weight", class_weight)


def checked(check: Check, x: Any, y: Any = None, *, name: str = "x", **weights: Any) -> Any:
    """`x` with `check(x, y)` done, or to be done for every batch as it comes.

    Raises:
        ValueError: nothing to run over, arrays without rows, or `weights` of arrays without labels,
            by the name of the argument: Keras drops them. `name` is that of `x`.
    """
    if x is None:
        raise ValueError(f"`{name}` must be arrays or a data set. Received: {name}=None")
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches == 0:
            raise ValueError(
                f"`{name}` must hold at least one batch. Received: {name}={x} of length 0"
            )
        return _CheckedDataset(check, x)
    if isinstance(x, types.GeneratorType):
        return _checked_batches(check, x)
    if _is_tensorflow_dataset(x):
        return _checked_dataset(check, x, name)
    if _is_torch_loader(x):
        return _checked_loader(check, x)
    shapes = [tuple(getattr(part, "shape", ())) for part in keras.tree.flatten(x)]
    if any(shape[:1] == (0,) for shape in shapes):
        raise ValueError(
            f"`{name}` must hold at least one row. Received: arrays of shapes {shapes}"
        )
    for weights_name, weight in weights.items():
        if y is None and weight is not None:
            raise ValueError(
                f"`{weights_name}` needs labels, `y`: Keras drops it without. A data set of "
                f"(x, None, sample_weight) keeps it. "
                f"Received: y=None, {weights_name}={shown(weight)}"
            )
    check_rows(check, x, y, weights.get("sample_weight"))
    return x


def check_rows(check: Check, x: Any, y: Any = None, sample_weight: Any = None) -> None:
    """Raises `ValueError` for arrays of which `check(x, y)` does, or that are no labels or no
    weights of them."""
    if isinstance(y, dict):
        raise ValueError(f"`y` must be an array of labels. Received: y={shown(y)}")
    check(x, y)
    if sample_weight is None:
        return
    require(_WEIGHTS, "sample_weight", sample_weight)
    values = host_values("sample_weight", sample_weight)
    if values is None:
        return
    is_number = values.dtype.kind in "buif" or values.dtype.name == "bfloat16"
    if not is_number or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            f"`sample_weight` must be {_WEIGHTS.what}. Received: sample_weight={shown(values)}"
        )
    token_ids = x.get("token_ids") if isinstance(x, dict) else x
    shape = getattr(token_ids if y is None else y, "shape", None)
    if shape is not None and values.shape not in (shape[:1], (*shape[:1], 1), tuple(shape)):
        raise ValueError(
            f"`sample_weight` must have one weight for each of the {shape[0]} rows or for each "
            f"label, {tuple(shape)}. Received: sample_weight.shape={values.shape}"
        )


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
    check_rows(check, *keras.utils.unpack_x_y_sample_weight(batch))


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


def _is_torch_loader(x):
    data = sys.modules.get("torch.utils.data")
    return data is not None and isinstance(x, data.DataLoader)


def _checked_loader(check, loader):
    kind = type(loader)

    def batches(self):
        for batch in kind.__iter__(self):
            _check_batch(check, keras.tree.map_structure(_on_host, batch))
            yield batch

    found = copy.copy(loader)
    found.__class__ = type(f"Checked{kind.__name__}", (kind,), {"__iter__": batches})
    return found


def _on_host(x):
    return np.asarray(x.cpu()) if hasattr(x, "cpu") else x


def _is_tensorflow_dataset(x):
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(x, tensorflow.data.Dataset)


def _checked_dataset(check, dataset, name):
    import tensorflow as tf

    specs = tf.nest.flatten(dataset.element_spec)
    others = [s for s in specs if isinstance(s, tf.RaggedTensorSpec | tf.SparseTensorSpec)]
    if others:
        raise ValueError(
            f"`{name}` must yield arrays: `pad` makes them of rows of different lengths. "
            f"Received: {name} of {others[0]}"
        )

    def checked_batch(*batch):
        def on_host(*arrays):
            _check_batch(check, tf.nest.pack_sequence_as(batch, arrays))
            return np.bool_(True)

        done = tf.numpy_function(on_host, tf.nest.flatten(batch), tf.bool)
        with tf.control_dependencies([done]):
            batch = tf.nest.map_structure(tf.identity, batch)
        return batch[0] if len(batch) == 1 else batch

    return dataset.map(checked_batch)
