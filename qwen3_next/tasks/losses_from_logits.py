"""Losses as `compile` takes them: whatever their spelling, on logits."""

import inspect
import re
from typing import Any

import keras


def _snake_case(name):
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


# Every loss of Keras that can be taken from probabilities or from logits, by all its names.
_CLASSES: dict[str, Any] = {
    name: cls
    for cls in vars(keras.losses).values()
    if inspect.isclass(cls) and "from_logits" in inspect.signature(cls).parameters
    for name in (cls.__name__, _snake_case(cls.__name__))
}
_FUNCTIONS = {getattr(keras.losses, name): cls for name, cls in _CLASSES.items() if name.islower()}


def loss_from_logits(loss: Any) -> Any:
    """The loss that a name, a function or a list of one of them means for a model of logits.

    Raises:
        ValueError: several losses, or a loss that takes its predictions for probabilities.
    """
    if isinstance(loss, list | tuple) and len(loss) == 1:
        return loss_from_logits(loss[0])
    if isinstance(loss, list | tuple | dict):
        raise ValueError(f"A model with one output has one loss. Received: loss={loss}")
    if isinstance(loss, str) and loss in _CLASSES:
        return _CLASSES[loss](from_logits=True)
    if inspect.isfunction(loss) and loss in _FUNCTIONS:
        return _FUNCTIONS[loss](from_logits=True)
    if getattr(loss, "from_logits", True) is False:
        raise ValueError(
            "The model returns logits: give the loss by name or with `from_logits=True`. "
            f"Received: loss={loss}"
        )
    return loss
