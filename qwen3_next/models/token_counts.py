"""How often every token of a vocabulary was learned from, for drafting from the frequent ones."""

from typing import Annotated, Any

import keras
import numpy as np
from keras import ops

from qwen3_next.layers.ops.backend.replicas import sum_over_replicas
from qwen3_next.layers.ops.tensor_types import Tensor

MOST = 2**31 - 1


class TokenCounts(keras.layers.Layer):
    """Counts tokens in an int32 variable that no count leaves: it stops at 2**31 - 1.

    It is a layer of its own, so that files from before tokens were counted load: they have nothing
    for it, and the counts stay 0.

    Args:
        vocab_size: Tokens V of the vocabulary.
    """

    def __init__(self, vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.counts = self.add_weight(
            name="counts", shape=(vocab_size,), dtype="int32", initializer="zeros", trainable=False
        )
        self.built = True

    def add(self, labels: Annotated[Tensor, "B T"]) -> None:
        """Counts all labels that are tokens, once each."""
        labels, size = ops.reshape(labels, (-1,)), self.counts.shape[0]
        real = (labels >= 0) & (labels < size)
        new = ops.segment_sum(
            ops.cast(real, "int32"), ops.where(real, labels, 0), num_segments=size
        )
        new = sum_over_replicas(new)
        # Never `counts + new`, which would wrap around.
        self.counts.assign_add(ops.minimum(new, MOST - self.counts))

    def most_frequent(self, size: int) -> Annotated[np.ndarray, "size"] | None:
        """The `size` most frequent tokens in order of their ids, or `None` before any was counted.

        Of equally frequent ones the lower ids come first.
        """
        counts = ops.convert_to_numpy(self.counts.value)
        if not counts.any():
            return None
        return np.sort(np.argsort(-counts, kind="stable")[:size])

    def load_own_variables(self, store: Any) -> None:
        if len(store.keys()):
            super().load_own_variables(store)
