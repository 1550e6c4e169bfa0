"""Weighted sums of models, and of task vectors on a base model.

    linear           m = sum_i w_i m_i / sum_i w_i
    task arithmetic  m = b + scale sum_i w_i (m_i - b)

Both in float32 whatever the dtype of the weights, one tensor at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen3_next.checkpoints.interchange import table_of
from qwen3_next.config.validation import BOOLEAN, require
from qwen3_next.models.weight_rows import Weight
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.merge.merge_amounts import ANY, Amount, by_model, require_positive_sum
from qwen3_next.transfer.merge.mergeable import (
    merged,
    named_models,
    require_mergeable,
    weighted_sum,
)


def merge_linear(models: Sequence[Task], weights: Sequence[Amount], normalize: bool = True) -> Any:
    """The weighted mean of models.

        m = sum_i w_i m_i / sum_i w_i

    with `normalize=False` without the division. With equal weights it is a model soup. It is
    computed in float32, for every weight of the models alike. The models stay as they are.

    Args:
        models: One or more `Qwen3Next` or `Qwen3NextClassifier` of the same configuration.
        weights: An amount w_i for each model: a number, a list of numbers along the decoder layers,
            or a dict from parts (`"experts"`) or regular expressions for paths to either, with
            `"*"` for all others.
        normalize: Whether to divide by the sum of the weights, which must then be above 0.

    Returns:
        A model of the class, configuration and dtype policy of the first one.

    Raises:
        ValueError: models that differ in class, function or weights, or an argument out of range.

    Reference: Model soups, arXiv 2203.05482.

    Example:

    ```python
    from qwen3_next import Qwen3Next, merge_linear

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_experts": 0}
    models = [Qwen3Next.from_variant("tiny", **sizes) for _ in range(3)]
    soup = merge_linear(models, weights=[1, 1, 1])
    ours = merge_linear(models[:2], weights=[{"embedding": 0.9, "*": 0.5}, [0.1, 0.8]])
    assert ours.count_params() == soup.count_params()
    ```
    """
    named = named_models(models)
    require_mergeable(named)
    require(BOOLEAN, "normalize", normalize)
    each = by_model("weights", weights, len(models), table_of(models[0]), ANY)
    if normalize:
        require_positive_sum("weights", each)

    def combine(row, arrays):
        return total(arrays, each[row.path], normalize)

    return merged(models, combine)


def merge_task_arithmetic(
    base: Task,
    models: Sequence[Task],
    weights: Sequence[Amount],
    normalize: bool = False,
    scale: float = 1.0,
) -> Any:
    """A base model plus the weighted sum of what others learned beyond it, their task vectors.

        m = b + scale sum_i w_i (m_i - b)

    The sum is not divided by the number of models. A negative weight takes a task away. It is
    computed in float32, for every weight of the models alike. The models stay as they are.

    Args:
        base: `Qwen3Next` or `Qwen3NextClassifier` b that the others were trained from.
        models: One or more models m_i of the same configuration.
        weights: An amount w_i for each model: a number, a list of numbers along the decoder layers,
            or a dict from parts (`"experts"`) or regular expressions for paths to either, with
            `"*"` for all others.
        normalize: Whether to divide by the sum of the weights, which must then be above 0.
        scale: Factor of the merged task vector.

    Returns:
        A model of the class, configuration and dtype policy of `base`.

    Raises:
        ValueError: models that differ in class, function or weights, or an argument out of range.

    Reference: Editing models with task arithmetic, arXiv 2212.04089.

    Example:

    ```python
    from qwen3_next import Qwen3Next, merge_task_arithmetic

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_experts": 0}
    base, coder, poet = (Qwen3Next.from_variant("tiny", **sizes) for _ in range(3))
    both = merge_task_arithmetic(base, [coder, poet], weights=[0.8, 0.4])
    assert both.config == base.config
    ```
    """
    named = named_models(models)
    require_mergeable({"base": base, **named})
    require(BOOLEAN, "normalize", normalize)
    each = by_model("weights", weights, len(models), table_of(base), ANY)
    if normalize:
        require_positive_sum("weights", each)

    def combine(row, deltas):
        return total(deltas, each[row.path], normalize)

    return with_task_vectors(base, models, combine, scale)


def with_task_vectors(
    base: Task,
    models: Sequence[Task],
    combine: Callable[[Weight, list[np.ndarray]], np.ndarray],
    scale: float,
) -> Any:
    """A base model plus a task vector that is made of those of models.

    Args:
        base: The base model, whose weights the models have.
        models: The others.
        combine: Gives the merged task vector for a row and the task vectors of the models, which
            it may change.
        scale: Factor of the merged task vector.
    """
    require(ANY, "scale", scale)

    def add(row, arrays):
        start, *others = arrays
        return start + start.dtype.type(scale) * combine(row, [x - start for x in others])

    return merged([base, *models], add)


def total(arrays: Sequence[np.ndarray], weights: Sequence[float], normalize: bool) -> np.ndarray:
    """The weighted sum of arrays, with `normalize` divided by the sum of the weights."""
    divisor = sum(weights) if normalize else 1.0
    return weighted_sum(arrays, [weight / divisor for weight in weights])
