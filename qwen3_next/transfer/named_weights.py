"""The weights of models by name, and models made of named weights.

Whatever turns models into another one goes through here: names and shapes are compared with the
weight table of the new configuration before anything is allocated or written.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from keras import ops

from qwen3_next.checkpoints.coverage import listed
from qwen3_next.checkpoints.interchange import require_no_other_weights, table_of
from qwen3_next.config import Qwen3NextConfig
from qwen3_next.layers.initializers import weights_to_be_loaded
from qwen3_next.models.assembly import require_unquantized
from qwen3_next.models.values import require_values
from qwen3_next.models.weight_rows import Weight
from qwen3_next.models.weight_table import weight_table
from qwen3_next.tasks.task import Task


class NamedWeights(Mapping[str, np.ndarray]):
    """The weights of a model as arrays by their path in the weight table, read when asked for.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier`.
        name: The argument it came in.

    Raises:
        ValueError: a model with weights that the table does not know, or that is quantized.
    """

    def __init__(self, model: Task, name: str = "model") -> None:
        require_values(model.weights)
        require_unquantized(name, model)
        found = {variable.path: variable for variable in model.weights}
        self.rows = {row.path: row for row in table_of(model)}
        require_no_other_weights(name, model)
        self._variables = {path: found[path] for path in self.rows}

    def __getitem__(self, path: str) -> np.ndarray:
        return np.asarray(ops.convert_to_numpy(self._variables[path].value))

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def rebuilt(
    model: Task,
    config: Qwen3NextConfig,
    make: Callable[[Weight], np.ndarray],
    name: str | None = None,
) -> Any:
    """A new model of the class and options of another, with another configuration and weights.

    What training counted, steps of warm-ups and tokens, goes on from where it is.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier`; it is left as it is.
        config: Configuration of the new model.
        make: Gives the array for a row of its weight table, in any float dtype. Called once per
            row, in the order of the table; one array is held at a time.
        name: Name of the new model, `None` for Keras' choice.

    Raises:
        ValueError: an array that has not the shape of its row.
    """
    fields = {option: getattr(model, option) for option in _options(model)}
    with weights_to_be_loaded():
        made = type(model)(config, name=name, dtype=model.dtype_policy, **fields)
    variables = {variable.path: variable for variable in made.weights}
    for row in weight_table(config, getattr(model, "num_labels", None)):
        assign(variables[row.path], make(row))
    counters = _counters(model)
    for name, variable in _counters(made).items():
        if name in counters and counters[name].shape == variable.shape:
            variable.assign(ops.copy(counters[name].value))
    return made


def assign(variable: Any, array: np.ndarray) -> None:
    """Gives a variable the values of an array of the same shape, in its own dtype."""
    if tuple(array.shape) != tuple(variable.shape):
        raise ValueError(
            f"{variable.path} has the shape {tuple(variable.shape)}. "
            f"Received: an array of shape {tuple(array.shape)}"
        )
    variable.assign(ops.cast(ops.convert_to_tensor(np.ascontiguousarray(array)), variable.dtype))


def require_model(name: str, model: Any) -> None:
    """Raises `ValueError` unless an argument is a model with a head."""
    if not isinstance(model, Task):
        raise ValueError(
            f"`{name}` must be a Qwen3Next or a Qwen3NextClassifier. "
            f"Received: {name} of type {type(model).__name__}"
        )


def require_same_weights(models: Mapping[str, Task]) -> None:
    """Raises `ValueError` unless all models have weights of the same names and shapes.

    Args:
        models: Models by the name of the argument they came in.
    """
    for name, model in models.items():
        require_model(name, model)
    (first, reference), *others = models.items()
    expected = {row.path: row.shape for row in table_of(reference)}
    for name, model in others:
        found = {row.path: row.shape for row in table_of(model)}
        if found == expected:
            continue
        differing = sorted({path for path, _ in expected.items() ^ found.items()})
        raise ValueError(
            f"`{name}` must have weights of the names and shapes of `{first}`. "
            f"Received: models that differ in {len(differing)} weights: {listed(differing)}"
        )


def _counters(model: Task) -> dict[str, Any]:
    """What training counts in a model, by its path within it."""
    counters = (variable for variable in model.weights if "int" in variable.dtype)
    return {variable.path.removeprefix(f"{model.name}/"): variable for variable in counters}


def _options(model: Task) -> list[str]:
    """Constructor arguments to carry over; a new model is not frozen."""
    return [option for option in type(model).constructor_options() if option != "freeze_backbone"]
