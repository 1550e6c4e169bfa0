"""A model that trains another one: what it takes is checked, and no error costs a weight."""

from typing import Any

import keras

from qwen3_next.config.validation import Rule, optional_integer, require
from qwen3_next.tasks.checked_data import (
    STEPS_AT_ONCE,
    by_name,
    check_rows,
    checked,
    fit_options,
    refuse_class_weight,
    values_kept,
)
from qwen3_next.tasks.stale_functions import drop_stale_functions
from qwen3_next.tasks.task import build_optimizer

_VALIDATION = Rule(
    "(x,), (x, y) or (x, y, sample_weight), or a data set",
    lambda data: not isinstance(data, list | tuple) or 1 <= len(data) <= 3,
)


class CheckedTrainer(keras.Model):
    """A trainer whose `fit`, `evaluate`, `predict` and `*_on_batch` methods check their data.

    Arrays are checked at once, data sets and generators batch by batch.
    """

    def check_inputs(self, x: Any, y: Any = None) -> None:
        """Raises `ValueError` for inputs that the trained model does not take."""
        raise NotImplementedError

    def check_batch(self, x: Any, y: Any) -> None:
        """Raises `ValueError` for inputs or labels that cannot be learned from."""
        raise NotImplementedError

    def compile(self, *args, **kwargs):
        given = by_name("compile", 0, args, kwargs)
        require(STEPS_AT_ONCE, "steps_per_execution", given.get("steps_per_execution", 1))
        super().compile(**given)

    def fit(self, x=None, y=None, batch_size=None, *args, **kwargs):
        given = fit_options(args, kwargs)
        validation_data = given.pop("validation_data", None)
        require(optional_integer(1), "batch_size", batch_size)
        require(_VALIDATION, "validation_data", validation_data)
        if isinstance(validation_data, list | tuple):
            held_out, labels, weight = keras.utils.unpack_x_y_sample_weight(validation_data)
            self.check_data(held_out, labels, name="validation_data", sample_weight=weight)
        elif validation_data is not None:
            validation_data = self.check_data(validation_data, name="validation_data")
        weights = {name: given.get(name) for name in ("sample_weight", "class_weight")}
        x = self.check_data(x, y, **weights)
        refuse_class_weight(weights["class_weight"])
        drop_stale_functions(self)
        build_optimizer(self)
        with values_kept(self, self._stepped_variables()):
            return super().fit(x, y, batch_size, validation_data=validation_data, **given)

    def evaluate(
        self, x=None, y=None, batch_size=None, verbose="auto", sample_weight=None, *args, **kwargs
    ):
        require(optional_integer(1), "batch_size", batch_size)
        x = self.check_data(x, y, sample_weight=sample_weight)
        drop_stale_functions(self)
        with values_kept(self, self._stepped_variables()):
            return super().evaluate(x, y, batch_size, verbose, sample_weight, *args, **kwargs)

    def predict(self, x, batch_size=None, *args, **kwargs):
        require(optional_integer(1), "batch_size", batch_size)
        x = checked(self.check_inputs, x)
        drop_stale_functions(self)
        with values_kept(self, self._stepped_variables()):
            return super().predict(x, batch_size, *args, **kwargs)

    def train_on_batch(self, x, y=None, *args, **kwargs):
        given = by_name("train_on_batch", 2, args, kwargs)
        check_rows(self.check_batch, x, y, given.get("sample_weight"))
        refuse_class_weight(given.get("class_weight"))
        drop_stale_functions(self)
        build_optimizer(self)
        return super().train_on_batch(x, y, **given)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        given = by_name("test_on_batch", 2, args, kwargs)
        check_rows(self.check_batch, x, y, given.get("sample_weight"))
        drop_stale_functions(self)
        return super().test_on_batch(x, y, **given)

    def predict_on_batch(self, x):
        self.check_inputs(x)
        drop_stale_functions(self)
        return super().predict_on_batch(x)

    def check_data(self, x: Any, y: Any = None, **weights: Any) -> Any:
        """`x` with its batches checked, or to be checked as they come; see `checked`."""
        return checked(self.check_batch, x, y, **weights)

    def _stepped_variables(self):
        optimizer = getattr(self, "optimizer", None)
        own = optimizer.variables if optimizer is not None else []
        model = [*self.trainable_variables, *self.non_trainable_variables]
        return [*model, *own, *self.metrics_variables]
