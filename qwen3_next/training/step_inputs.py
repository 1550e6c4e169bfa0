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
    """

    inputs: Any


def with_step_inputs(args: tuple) -> tuple:
    """The arguments of a step, a state first on JAX, with the inputs of its data wrapped."""
    *state, data = args
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return *state, (StepInputs(x), y, sample_weight)
