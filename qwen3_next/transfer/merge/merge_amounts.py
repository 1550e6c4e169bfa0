"""Numbers of a merge that may differ from weight to weight.

An amount is one of

    0.5                                 the same for all weights
    [0.0, 0.5, 1.0]                     along the decoder layers, linear in between
    {"experts": 0.3, "*": [0.0, 1.0]}   by part of the model or by path

Of a list, the embedding has the first value and all that stands behind the decoder layers the last
one. A key of a dict is a name in `PARTS`, a regular expression that is searched for in the paths of
the weights, or `"*"` for all; the first key that fits a weight counts.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen3_next.checkpoints.coverage import listed
from qwen3_next.config.validation import Rule, number, require, shown
from qwen3_next.models.weight_rows import PARTS, Weight

Amount = float | Sequence[float] | Mapping[str, float | Sequence[float]]

ANY = number("a finite number", lambda value: True)
FRACTION = number("in [0, 1]", lambda value: 0 <= value <= 1)
DENSITY = number("in (0, 1]", lambda value: 0 < value <= 1)
REST = "*"
_LAYER = re.compile(r"model/layers_(\d+)/")


def by_weight(name: str, amount: Any, rows: Sequence[Weight], rule: Rule) -> dict[str, float]:
    """The number for every weight, by path.

    Args:
        name: Name of the argument.
        amount: An amount.
        rows: The weight table of the model.
        rule: What a number must be.

    Raises:
        ValueError: no amount, a number against the rule, a key that no weight is left for, or
            weights that no key fits.
    """
    if not isinstance(amount, dict):
        return _along_layers(name, amount, rows, rows, rule)
    numbers: dict[str, float] = {}
    for key, value in amount.items():
        fitting = [row for row in rows if _fits(name, key, row)]
        left = [row for row in fitting if row.path not in numbers]
        if not left and key != REST:
            raise ValueError(
                f"Every key of `{name}` must be one of {list(PARTS)}, {REST!r} or part of the path "
                f"of a weight that no key before it fits. Received: {name} with {key!r}"
            )
        numbers |= _along_layers(f"{name}[{key!r}]", value, left, rows, rule)
    missing = [row.path for row in rows if row.path not in numbers]
    if missing:
        raise ValueError(
            f"`{name}` must give a number for every weight, {REST!r} for all others. "
            f"Received: {name}={shown(amount)}, without {len(missing)} weights: {listed(missing)}"
        )
    return numbers


def by_model(
    name: str, amounts: Any, count: int, rows: Sequence[Weight], rule: Rule
) -> dict[str, list[float]]:
    """The numbers of all models for every weight, by path.

    Args:
        name: Name of the argument.
        amounts: A list with an amount for each model.
        count: Number of models.
        rows: The weight table of the models.
        rule: What a number must be.

    Raises:
        ValueError: another number of amounts, or what `by_weight` refuses.
    """
    if not isinstance(amounts, list | tuple) or len(amounts) != count:
        raise ValueError(
            f"`{name}` must be a list with one item for each of {count} models. "
            f"Received: {name}={shown(amounts)}"
        )
    each = [by_weight(f"{name}[{i}]", amount, rows, rule) for i, amount in enumerate(amounts)]
    return {row.path: [numbers[row.path] for numbers in each] for row in rows}


def densities_by_model(density: Any, count: int, rows: Sequence[Weight]) -> dict[str, list[float]]:
    """As `by_model` for the argument `density`, which may be one amount for all models."""
    each = density if isinstance(density, list | tuple) else [density] * count
    return by_model("density", each, count, rows, DENSITY)


def require_positive_sum(name: str, weights: Mapping[str, Sequence[float]]) -> None:
    """Raises `ValueError` for weights of models that cannot be divided by their sum.

    Args:
        name: Name of the argument.
        weights: The weights of all models for every weight, by path.
    """
    for path, values in weights.items():
        if sum(values) <= 0:
            raise ValueError(
                f"`{name}` must have a sum above 0 to be divided by. Received: {values} for {path}"
            )


def _fits(name, key, row):
    if key == REST or key == row.part:
        return True
    if key in PARTS:
        return False
    try:
        return re.search(key, row.path) is not None
    except (TypeError, re.error) as error:
        raise ValueError(
            f"A key of `{name}` that is no part must be a regular expression: {error}. "
            f"Received: {name} with {shown(key)}"
        ) from error


def _along_layers(name, value, wanted, rows, rule):
    if not isinstance(value, list | tuple):
        require(rule, name, value)
        return {row.path: float(value) for row in wanted}
    if not value:
        raise ValueError(f"`{name}` must be a number or a list of numbers. Received: {name}=[]")
    for index, item in enumerate(value):
        require(rule, f"{name}[{index}]", item)
    last = max(int(layer[1]) for row in rows if (layer := _LAYER.match(row.path)))
    places = np.linspace(0.0, 1.0, len(value))
    return {row.path: float(np.interp(_place(row, last), places, value)) for row in wanted}


def _place(row, last):
    """Where a weight stands between the first decoder layer, 0, and the last, 1."""
    layer = _LAYER.match(row.path)
    if layer:
        return int(layer[1]) / last if last else 0.0
    return 0.0 if row.part == "embedding" else 1.0
