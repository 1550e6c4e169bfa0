"""Runs over data with another number of iterations of the think loop than the configuration's.

Keras compiles one function for `evaluate` and one for `predict`. The number of iterations is
compiled into them, so that each number has functions of its own, kept until the model is compiled
anew or gets other variables, or other ones to train.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

STEPS = {"test_function": "test_step", "predict_function": "predict_step"}


class Functions:
    """Compiled functions by name and number of iterations."""

    def __init__(self) -> None:
        self._variables: list = []
        self._known: dict[tuple[str, int], Any] = {}

    def of(self, variables: list) -> dict[tuple[str, int], Any]:
        """Those of a model with these variables in this order; others are dropped."""
        known = self._variables
        if len(known) != len(variables) or any(a is not b for a, b in zip(known, variables)):
            self._variables, self._known = variables, {}
        return self._known


class IterationsOfRun:
    """A mixin of models with a `backbone`.

    Attributes:
        iterations_of_run: Iterations of the step at hand, `None` for those of the configuration.
    """

    backbone: Any
    trainable_variables: Any
    non_trainable_variables: Any
    iterations_of_run: int | None = None

    def forget_functions(self) -> None:
        """Drops the compiled functions, as `compile` does with Keras' own."""
        self._functions_by_iterations = Functions()

    def iterations_of(self, think_iterations: int | None) -> int | None:
        """Those that a call asks for, else those of the step at hand."""
        return self.iterations_of_run if think_iterations is None else think_iterations

    @contextlib.contextmanager
    def iterating(self, name: str, think_iterations: int | None) -> Iterator[None]:
        """Within it the compiled function of this name is that of so many iterations.

        Raises:
            ValueError: a number of iterations out of range.
        """
        self.backbone.schedule.check_iterations(think_iterations)
        if think_iterations is None:
            yield
            return
        if not hasattr(self, "_functions_by_iterations"):
            self.forget_functions()
        # In the order in which a function of JAX is given them: frozen ones stand behind.
        variables = [*self.trainable_variables, *self.non_trainable_variables]
        known = self._functions_by_iterations.of(variables)
        usual, step = getattr(self, name), getattr(self, STEPS[name])

        # A function of its own: JAX takes two compilations of one method for the same.
        def iterated(*args):
            self.iterations_of_run = think_iterations
            try:
                return step(*args)
            finally:
                self.iterations_of_run = None

        setattr(self, name, known.get((name, think_iterations)))
        setattr(self, STEPS[name], iterated)
        try:
            yield
        finally:
            known[name, think_iterations] = getattr(self, name)
            delattr(self, STEPS[name])
            setattr(self, name, usual)
