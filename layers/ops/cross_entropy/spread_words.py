"""Sums over a vocabulary of which every device may have only a part.

    log_sum_exp    log sum_v exp(z_v)
    logit_of       z_label
    argmax         the word with the largest z

A device has the columns of its own words; what crosses devices is one number per row, never a
logit. On one device, `Words()`, they are those of Keras.
"""

from typing import Annotated, Any, NamedTuple

from keras import ops

from ..backend.sharding import Axes, Devices, all_max, all_sum, devices, part_number
from ..sums import row_sums
from ..tensor_types import Tensor

MANY_WORDS = 2048  # fewer stay one part


class Words(NamedTuple):
    """How rows and words are spread.

    Attributes:
        devices: `Devices`, `None` for one.
        rows: Mesh axes of the rows.
        words: Mesh axes of the words.
        columns: Mesh axes of D of the kernel, axes of the rows alone: with FSDP.
    """

    devices: Devices | None = None
    rows: Axes = ()
    words: Axes = ()
    columns: Axes = ()

    def count(self, own: int) -> int:
        """All words, where a device has `own`."""
        return own if self.devices is None else own * self.devices.size(self.words)

    def first(self, own: int) -> Any:
        """Number of a device's first word."""
        return own * part_number(self.words)


def log_sum_exp(logits: Annotated[Tensor, "... V"], how: Words) -> Annotated[Tensor, "..."]:
    largest = all_max(ops.max(ops.stop_gradient(logits), axis=-1), how.words)
    largest = ops.where(ops.isfinite(largest), largest, 0.0)  # inf - inf is no number
    shifts = ops.expand_dims(largest, -1)
    # One expression over all parts: exponentials of all words are never held.
    exponentials = sum(ops.exp(part - shifts) for part in _parts(logits, how))
    return largest + ops.log(all_sum(row_sums(exponentials), how.words))


def _parts(logits: Tensor, how: Words) -> list[Tensor]:
    """At most 16 equal parts of many words; one where it is the compiler that spreads them."""
    words = logits.shape[-1]
    own = how.devices is not None or devices() is None
    most = 16 if own and words >= MANY_WORDS else 1
    count = next(n for n in range(most, 0, -1) if words % n == 0)
    return ops.split(logits, count, axis=-1)


def logit_of(
    logits: Annotated[Tensor, "... V"], labels: Annotated[Tensor, "..."], how: Words
) -> Annotated[Tensor, "..."]:
    """That of the label; of the nearest word where the label is none."""
    own = logits.shape[-1]
    place = ops.clip(labels, 0, how.count(own) - 1) - how.first(own)
    index = ops.expand_dims(ops.clip(place, 0, own - 1), -1)
    found = ops.take_along_axis(logits, index, axis=-1)[..., 0]
    if not how.words:
        return found
    return all_sum(ops.where((place >= 0) & (place < own), found, 0.0), how.words)


def argmax(logits: Annotated[Tensor, "... V"], how: Words) -> Annotated[Tensor, "..."]:
    """Int32; of equal ones the first."""
    own = logits.shape[-1]
    best = ops.cast(ops.argmax(logits, axis=-1), "int32")
    if not how.words:
        return best
    largest = ops.max(logits, axis=-1)
    is_best = largest == all_max(largest, how.words)
    word = ops.where(is_best, best + how.first(own), how.count(own))
    return -all_max(-word, how.words)
