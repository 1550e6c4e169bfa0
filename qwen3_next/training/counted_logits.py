"""Logits that tell the losses and metrics of Keras which labels count."""

import functools
from typing import Annotated

import keras

from qwen3_next.layers.ops.tensor_types import Tensor


def counted_logits(
    logits: Annotated[Tensor, "B T V"], counts: Annotated[Tensor, "B T"]
) -> Annotated[Tensor, "B T V"]:
    """Logits with Keras' mask: means over labels are of those where `counts` is true."""
    return _with_mask()([logits, counts])


class _WithMask(keras.layers.Layer):
    """Keras takes the mask of a tensor from the layer that it comes from."""

    def __init__(self):
        super().__init__(name="with_mask", autocast=False)

    def call(self, inputs):
        return inputs[0]

    def compute_mask(self, inputs, previous_mask):
        return inputs[1]


@functools.cache
def _with_mask():
    return _WithMask()
