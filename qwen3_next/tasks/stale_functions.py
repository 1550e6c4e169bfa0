"""Compiled steps and optimizers do not outlive the variables that they were made for.

Keras keeps its compiled functions until `compile`, whatever becomes of the model meanwhile: LoRA
that was enabled, a layer that was frozen or replaced.
"""

from collections.abc import Sequence
from typing import Any

import keras


class MadeFor:
    """What the functions and the optimizer of a model were made for.

    An object of its own: Keras would take lists of variables for the model's own.
    """

    def __init__(self) -> None:
        self.variables: tuple[list, list] | None = None
        self.optimizer: Any = None
        self.trained: list = []


def drop_stale_functions(model: keras.Model) -> None:
    """Drops the compiled functions of a model with other variables, or other ones to train."""
    made_for = _made_for(model)
    variables = model.trainable_variables, model.non_trainable_variables
    known, made_for.variables = made_for.variables, variables
    if known is not None and not all(map(_same, known, variables)):
        model.train_function = model.test_function = model.predict_function = None


def check_trained_variables(model: keras.Model) -> None:
    """Raises `ValueError` where a model is to train others than its optimizer has state for."""
    made_for, trained = _made_for(model), model.trainable_variables
    if made_for.optimizer is not model.optimizer:
        made_for.optimizer, made_for.trained = model.optimizer, trained
    if not _same(made_for.trained, trained):
        names = [v.path for v in (*made_for.trained, *trained) if _in_one(v, made_for, trained)]
        raise ValueError(
            "The model's trainable variables have changed since its optimizer was made: call "
            f"`compile` again, with a new one. They differ by {names[:5]}"
            f"{f' and {len(names) - 5} others' if len(names) > 5 else ''}."
        )


def _in_one(variable, made_for, trained):
    return not all(any(variable is v for v in found) for found in (made_for.trained, trained))


def _made_for(model):
    if not hasattr(model, "_made_for"):
        model._made_for = MadeFor()
    return model._made_for


def _same(known: Sequence, found: Sequence) -> bool:
    return len(known) == len(found) and all(a is b for a, b in zip(known, found))
