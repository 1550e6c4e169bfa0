"""Every kind of data a model takes, as token sequences without padding."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from qwen3_next.config.validation import Rule, require
from qwen3_next.models.inputs import host_array, token_rows

MASK = Rule("an array of bools or numbers", lambda mask: mask.dtype.kind in "buif")


def token_sequences(data: Any) -> list[np.ndarray] | Iterator[np.ndarray]:
    """The sequences of a data set: a list where it is in memory, else one after the other.

    Args:
        data: Token ids `(N, T)`, a list of sequences, or a dict with `"token_ids"` and optionally
            `"padding_mask"`, alone or at the front of a tuple, as it stands before labels; or a
            `PyDataset` or an iterable of such batches.

    Raises:
        ValueError: data of another kind, packed rows, or an empty sequence; for batches when they
            come.
    """
    if isinstance(data, list | tuple | dict) or hasattr(data, "shape"):
        return _sequences_of(data)
    if isinstance(data, keras.utils.PyDataset):
        data = _batches_of(data)
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise ValueError(
            "`data` must be token ids, a dict with 'token_ids', a list of sequences, or batches of "
            f"these. Received: data={data!r}"
        )
    return (sequence for batch in data for sequence in _sequences_of(batch))


def _batches_of(dataset):
    if dataset.num_batches is None:
        raise ValueError(f"`data` must come to an end. Received: data={dataset!r} without a length")
    dataset.on_epoch_begin()
    yield from (dataset[index] for index in range(dataset.num_batches))
    dataset.on_epoch_end()


def _sequences_of(batch):
    if isinstance(batch, tuple) and batch:
        batch = batch[0]
    if isinstance(batch, list):
        return token_rows("sequence", batch)
    fields = batch if isinstance(batch, dict) else {"token_ids": batch}
    if fields.get("segment_ids") is not None:
        raise ValueError(
            "`data` must hold one sequence per row: `segment_ids` must be None, and packed rows "
            f"taken apart. Received keys: {sorted(fields, key=str)}"
        )
    if "token_ids" not in fields or set(fields) - {"token_ids", "padding_mask", "segment_ids"}:
        raise ValueError(
            "`data` must be a dict with 'token_ids' and optionally 'padding_mask'. "
            f"Received keys: {sorted(fields, key=str)}"
        )
    token_ids = host_array("token_ids", fields["token_ids"])
    mask = fields.get("padding_mask")
    mask = np.ones(token_ids.shape, bool) if mask is None else host_array("padding_mask", mask)
    require(MASK, "padding_mask", mask)
    if token_ids.ndim != 2 or mask.shape != token_ids.shape:
        raise ValueError(
            "`token_ids` in `data` must have shape (sequences, tokens) and `padding_mask` the "
            f"same. Received: token_ids.shape={token_ids.shape}, padding_mask.shape={mask.shape}"
        )
    return token_rows("sequence", (row[real] for row, real in zip(token_ids, mask.astype(bool))))
