"""The loss that `fit` and `evaluate` report."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from qwen3_next.layers.ops.tensor_types import Tensor


class LossTracker(keras.metrics.Mean):
    """Mean of the losses of batches, each as often as it has labels that count.

    Keras counts rows: rows with few labels would weigh as much as full ones, and the loss would
    depend on which rows share a batch.
    """

    def __init__(self) -> None:
        super().__init__(name="loss")
        self.labels: Tensor | None = None

    @contextlib.contextmanager
    def over(self, labels: Tensor | None) -> Iterator[None]:
        """Within it a loss is the mean of that many labels, or of rows for `None`."""
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        weight = sample_weight if self.labels is None else self.labels
        super().update_state(values, sample_weight=weight)
