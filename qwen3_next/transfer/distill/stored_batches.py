"""Batches of what a model reads, with what was stored of a teacher beside it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from qwen3_next.config.validation import shown
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.inputs import host_values

KEYS = ("teacher_ids", "teacher_log_probs")
# What a batch is checked by wherever it comes from, `(B,)` each as all that is cut into batches.
SETTINGS = {"vocab_size": "teacher_vocab_size", "temperature": "teacher_temperature"}


class TopLogits(NamedTuple):
    """What a batch holds of a teacher.

    Attributes:
        ids: `(B, T, n)` int32.
        log_probs: `(B, T, n)`.
    """

    ids: Tensor
    log_probs: Tensor


def split_stored(inputs: Any) -> tuple[Any, TopLogits | None]:
    """The inputs of a model, and what a batch of `StoredLogits` holds beside them."""
    if not isinstance(inputs, Mapping) or not set(KEYS) & set(inputs):
        return inputs, None
    if not set(KEYS) <= set(inputs):
        raise ValueError(f"Stored logits come as {KEYS}. Received keys: {sorted(inputs)}")
    others = (*KEYS, *SETTINGS.values())
    rest = {name: value for name, value in inputs.items() if name not in others}
    return rest, TopLogits(*(inputs[name] for name in KEYS))


def check_settings(inputs: Any, wanted: dict[str, Any]) -> None:
    """Raises `ValueError` for a batch whose logits were stored with other settings; those that it
    does not hold, or that have no values yet, are not looked at."""
    for name, value in wanted.items():
        key = SETTINGS[name]
        found = host_values(key, inputs.get(key)) if isinstance(inputs, Mapping) else None
        if found is not None and (found != np.asarray(value, found.dtype)).any():
            raise ValueError(
                f"Stored logits must have the `{name}` of the trainer and its student, {value}. "
                f"Received: {key}={shown(found)}"
            )


class StoredLogitsDataset(keras.utils.PyDataset):
    """The batches of `StoredLogits.dataset`.

    Args:
        stored: `StoredLogits`.
        arrays: What a model reads, by name.
        others: `"y"` and `"sample_weight"`, arrays or `None`.
        batch_size: Rows of a batch.
        order: Draws the order of every epoch; `None` for that of the rows.
    """

    def __init__(
        self,
        stored: Any,
        arrays: dict[str, np.ndarray],
        others: dict[str, Any],
        batch_size: int,
        order: np.random.Generator | None,
    ) -> None:
        super().__init__()
        self.stored = stored
        self.batch_size = batch_size
        self._arrays, self._others, self._order = arrays, others, order
        self._rows = np.arange(stored.rows)
        self.on_epoch_end()

    @property
    def num_batches(self) -> int:
        return -(-self.stored.rows // self.batch_size)

    def on_epoch_end(self) -> None:
        if self._order is not None:
            self._rows = self._order.permutation(self.stored.rows)

    def __getitem__(self, index: int) -> tuple:
        rows = self._rows[index * self.batch_size : (index + 1) * self.batch_size]
        stored = dict(zip(KEYS, self.stored.read(rows), strict=True))
        settings = {
            key: np.full(len(rows), getattr(self.stored, name), dtype)
            for (name, key), dtype in zip(SETTINGS.items(), ("int32", "float32"))
        }
        read = {name: array[rows] for name, array in self._arrays.items()}
        x = {**read, **stored, **settings}
        y, weight = (None if v is None else v[rows] for v in self._others.values())
        if y is None and weight is None:
            return (x,)
        return (x, y) if weight is None else (x, y, weight)
