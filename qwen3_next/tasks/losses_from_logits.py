"""Losses as `compile` takes them: whatever their spelling, on logits."""

import inspect
from typing import Any

import keras

# The losses of Keras by their functions and their classes.
_FUNCTIONS = {
    name.replace("_", ""): found
    for name, found in vars(keras.losses).items()
    if inspect.isfunction(found)
}
_CLASSES: dict[Any, Any] = {
    known: cls
    for cls in vars(keras.losses).values()
    if inspect.isclass(cls) and cls is not keras.losses.Loss
    for known in (cls, _FUNCTIONS.get(cls.__name__.lower()))
}
# These take probabilities and have no form for logits.
_OF_PROBABILITIES = ("CategoricalGeneralizedCrossEntropy", "Dice", "KLDivergence", "Tversky")
# Their labels are indices, or sequences of them.
_OF_INDICES = ("CTC", "Circle", "SparseCategoricalCrossentropy")


def loss_from_logits(loss: Any, of_indices: bool = False) -> Any:
    """The loss that a name, a function, a class or a list of one of them means for logits.

    Args:
        loss: What `compile` is given.
        of_indices: Whether labels are indices of outputs, so that no loss can compare them.

    Raises:
        ValueError: several losses, a name that Keras has not, a loss that takes its predictions
            for probabilities, or one that compares indices with outputs.
    """
    if isinstance(loss, list | tuple) and len(loss) == 1:
        return loss_from_logits(loss[0], of_indices)
    if isinstance(loss, list | tuple | dict):
        raise ValueError(f"A model with one output has one loss. Received: loss={loss}")
    if of_indices and compares_elements(loss):
        raise ValueError(
            "Labels of the model are indices, so its loss is a sparse categorical cross-entropy or "
            f"one of your own. Received: loss={loss}"
        )
    cls = _class_of(loss)
    chosen = cls is not None and type(loss) is not cls  # not made by the caller
    if chosen and "from_logits" in inspect.signature(cls).parameters:
        return cls(from_logits=True)
    found = keras.losses.get(loss) if isinstance(loss, str) or inspect.isclass(loss) else loss
    no_logits = cls is not None and cls.__name__ in _OF_PROBABILITIES
    if no_logits or getattr(found, "from_logits", True) is False:
        raise ValueError(
            "The model returns logits: give the loss by name or with `from_logits=True`, and none "
            f"that needs probabilities, as {', '.join(_OF_PROBABILITIES)}. Received: loss={loss}"
        )
    return loss if isinstance(loss, str) else found


def compares_elements(loss: Any) -> bool:
    """Whether a loss of Keras compares every output with a label of its own."""
    cls = _class_of(loss)
    return cls is not None and cls.__name__ not in _OF_INDICES


def takes_one_hot(loss: Any) -> bool:
    """Whether a loss of Keras takes one of a row's outputs for the right one."""
    cls = _class_of(loss)
    return cls is not None and "Categorical" in cls.__name__


def _class_of(loss):
    """The class of Keras that a loss is or stands for, or `None`."""
    found = keras.losses.get(loss) if isinstance(loss, str) else loss
    is_kind = inspect.isclass(found) or inspect.isfunction(found)
    return _CLASSES.get(found if is_kind else type(found))
