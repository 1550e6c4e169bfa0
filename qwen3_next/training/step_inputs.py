"""How a model knows that it is called by a train or test step.

Within a step it is called with `StepInputs` and returns what the loss and the metrics need; that
may be more than what it returns everywhere else.
"""

from typing import Any, NamedTuple

import keras

from qwen3_next.layers import Routing, Thinking
from qwen3_next.layers.ops.tensor_types import Tensor


class StepInputs(NamedTuple):
    """What a train or test step calls the model with.

    Attributes:
        inputs: Token ids `(B, T)` or a dict, as a model takes them.
        labels: What the step trains on, where the model needs to know: a prompt is what comes
            before the first label.
    """

    inputs: Any
    labels: Any = None


class StepOutput(NamedTuple):
    """What a model returns for `StepInputs`.

    Attributes:
        hidden: `(B, T, D)`, which the head reads.
        mtp_input: `(B, T, D)`, which the first MTP step reads, or `None` without MTP modules.
        routings: `Routing` of every MoE layer, `()` for a dense model.
        thinking: `Thinking`, or `None` without a think loop.
    """

    hidden: Tensor
    mtp_input: Tensor | None
    routings: tuple[Routing, ...]
    thinking: Thinking | None


def with_step_inputs(args: tuple, labels: bool = False) -> tuple:
    """The arguments of a step, a state first on JAX, with the inputs of its data wrapped, and
    perhaps the labels."""
    *state, data = args
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return *state, (StepInputs(x, y if labels else None), y, sample_weight)
