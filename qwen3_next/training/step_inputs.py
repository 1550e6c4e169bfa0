"""How a model knows that it is called by a train or test step.

Within a step it is called with `StepInputs` and returns what the loss and the metrics need; that
may be more than what it returns everywhere else.
"""

from typing import Any, NamedTuple

import keras


class StepInputs(NamedTuple):
    """What a train or test step calls the model with.

    Attributes:
        inputs: Token ids `(B, T)` or a dict, as a model takes them.
        labels: What the step trains on, where the model needs to know: a prompt is what comes
            before the first label.
    """

    inputs: Any
    labels: Any = None


def with_step_inputs(args: tuple, labels: bool = False) -> tuple:
    """The arguments of a step, a state first on JAX, with the inputs of its data wrapped, and
    perhaps the labels."""
    *state, data = args
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return *state, (StepInputs(x, y if labels else None), y, sample_weight)
