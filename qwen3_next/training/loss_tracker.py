"""The loss that `fit` and `evaluate` report."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import keras

from qwen3_next.layers.ops.tensor_types import Tensor

# Replicas take turns in threads, each with a number of its own.
_labels: ContextVar[Tensor | None] = ContextVar("labels of a loss", default=None)


@contextlib.contextmanager
def loss_over(labels: Tensor | None) -> Iterator[None]:
    """Within it a loss is the mean over that many labels, or over rows for `None`."""
    token = _labels.set(labels)
    try:
        yield
    finally:
        _labels.reset(token)


class LossTracker(keras.metrics.Mean):
    """Mean of the losses of batches, each as often as it has labels that count.

    Keras counts rows: rows with few labels would weigh as much as full ones, and the loss would
    depend on which rows share a batch.
    """

    def __init__(self) -> None:
        super().__init__(name="loss")

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        labels = _labels.get()
        super().update_state(values, sample_weight=sample_weight if labels is None else labels)
