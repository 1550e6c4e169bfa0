"""How long tokens think, as `fit` and `evaluate` log it, and what that costs."""

from typing import Annotated, Any

import keras
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.etd_config import THINKING_NAMES
from qwen3_next.layers import Thinking
from qwen3_next.layers.ops.tensor_types import Tensor


def make_thinking_metrics(config: Qwen3NextConfig) -> list[keras.metrics.Mean]:
    """One mean over real tokens per name, none for a model without a think loop."""
    return [] if config.etd is None else [keras.metrics.Mean(name=name) for name in THINKING_NAMES]


def update_thinking_metrics(metrics: list[Any], thinking: Thinking | None) -> None:
    """Adds the tokens of a batch."""
    if thinking is None:
        return
    real = ops.cast(thinking.iterations > 0, "float32")
    values = (thinking.iterations, thinking.early_exit, thinking.exit_confidence)
    for metric, value in zip(metrics, values, strict=True):
        metric.update_state(ops.cast(value, "float32"), sample_weight=real)


def ponder_loss(config: Qwen3NextConfig, thinking: Thinking | None) -> Annotated[Tensor, ""] | None:
    """`ponder_cost` times the mean over real tokens of iterations plus remainder.

    Source: Adaptive Computation Time, arXiv 1603.08983, section 2.1. `None` where it has no price.
    """
    if thinking is None or config.etd is None or not config.etd.ponder_cost:
        return None
    real = ops.cast(thinking.iterations > 0, "float32")
    mean = ops.sum(real * thinking.ponder) / ops.maximum(ops.sum(real), 1.0)
    return config.etd.ponder_cost * mean
