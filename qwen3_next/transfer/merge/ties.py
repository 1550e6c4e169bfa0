"""TIES: trim task vectors, elect a sign for every entry, average the vectors that have it.

    trim      d_i     the round(density n) largest magnitudes of m_i - b, others 0
    elect     s     = sign(sum_i w_i d_i)
    merge     d     = sum_{i in A} w_i d_i / sum_{i in A} w_i,   A = {i: sign(w_i d_i) = s, s != 0}
    result    m     = b + scale d

entry by entry, n the entries of a tensor. Float32, one tensor at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3_next.checkpoints.interchange import table_of
from qwen3_next.config.validation import BOOLEAN, NOT_NEGATIVE, require
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.merge.merge_amounts import Amount, by_model, densities_by_model
from qwen3_next.transfer.merge.mergeable import named_models, require_mergeable, weighted_sum
from qwen3_next.transfer.merge.task_arithmetic import with_task_vectors


def merge_ties(
    base: Task,
    models: Sequence[Task],
    weights: Sequence[Amount],
    density: Amount | Sequence[Amount],
    normalize: bool = True,
    scale: float = 1.0,
) -> Any:
    """A base model plus what the task vectors of others agree on.

    Of every task vector m_i - b the largest magnitudes are kept, tensor by tensor. Every entry then
    takes the sign of the weighted sum, and the weighted mean of the vectors that have it:

        d = sum_{i in A} w_i d_i / sum_{i in A} w_i,    A = {i: sign(d_i) = sign(sum_j w_j d_j)}
        m = b + scale d

    Where the sum is 0, the base model stays. It is computed in float32, for every weight of the
    models alike. The models stay as they are.

    Args:
        base: `Qwen3Next` or `Qwen3NextClassifier` b that the others were trained from.
        models: One or more models m_i of the same configuration.
        weights: An amount w_i of at least 0 for each model: a number, a list of numbers along the
            decoder layers, or a dict from parts (`"experts"`) or regular expressions for paths to
            either, with `"*"` for all others.
        density: Fraction of a task vector that is kept, in (0, 1]: an amount for all models (no
            list), or a list with one for each. Of n entries `round(density * n)` are kept, at least
            one; among equal magnitudes the first ones.
        normalize: Whether to divide by the weights of the vectors in A; otherwise they are added.
        scale: Factor of the merged task vector, the paper's lambda.

    Returns:
        A model of the class, configuration and dtype policy of `base`.

    Raises:
        ValueError: models that differ in class, function or weights, or an argument out of range.

    Reference: TIES-Merging, arXiv 2306.01708.

    Example:

    ```python
    from qwen3_next import Qwen3Next, merge_ties

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_experts": 0}
    base, coder, poet = (Qwen3Next.from_variant("tiny", **sizes) for _ in range(3))
    both = merge_ties(base, [coder, poet], weights=[1, 0.5], density=0.2)
    rest = merge_ties(base, [coder, poet], [1, 1], density=[{"mlp": 0.5, "*": 0.2}, 0.1])
    assert both.config == rest.config == base.config
    ```
    """
    named = named_models(models)
    require_mergeable({"base": base, **named})
    require(BOOLEAN, "normalize", normalize)
    rows = table_of(base)
    each = by_model("weights", weights, len(models), rows, NOT_NEGATIVE)
    densities = densities_by_model(density, len(models), rows)

    def combine(row, deltas):
        for delta, fraction in zip(deltas, densities[row.path]):
            trim(delta, fraction)
        return agreed(deltas, each[row.path], normalize)

    return with_task_vectors(base, models, combine, scale)


def trim(delta: np.ndarray, density: float) -> None:
    """Sets all but the `round(density * n)` largest magnitudes of an array to 0, in place."""
    kept = max(1, round(density * delta.size))
    if kept == delta.size:
        return
    magnitude = np.abs(delta).ravel()
    threshold = np.partition(magnitude, -kept)[-kept]
    keep = magnitude > threshold
    # As many of those on the threshold as there is room for, so that the number is exact.
    keep[np.flatnonzero(magnitude == threshold)[: kept - np.count_nonzero(keep)]] = True
    delta[~keep.reshape(delta.shape)] = 0


def agreed(deltas: Sequence[np.ndarray], weights: Sequence[float], normalize: bool) -> np.ndarray:
    """The weighted mean, or sum, of the entries that have the sign of the weighted sum."""
    elected = np.sign(weighted_sum(deltas, weights))
    merged, mass = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        if weight:
            factor = (np.sign(delta) == elected) * delta.dtype.type(weight)
            merged += factor * delta
            mass += factor
    return np.divide(merged, mass, out=merged, where=mass > 0) if normalize else merged
