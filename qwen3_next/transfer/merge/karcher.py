"""Spherical mean of any number of models, tensor by tensor: what slerp is for two of them."""

from collections.abc import Sequence
from typing import Any

from qwen3_next.checkpoints.interchange import table_of
from qwen3_next.config.validation import NOT_NEGATIVE
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.merge.merge_amounts import Amount, by_model, require_positive_sum
from qwen3_next.transfer.merge.mergeable import (
    merged,
    named_models,
    require_mergeable,
    weighted_sum,
)
from qwen3_next.transfer.merge.spherical import cosines, karcher_coefficients


def merge_karcher(models: Sequence[Task], weights: Sequence[Amount]) -> Any:
    """The weighted spherical mean of two or more models, tensor by tensor.

        u = argmin_u sum_i w_i angle(u, v_i)^2 = sum_i c_i v_i / |v_i|,    |u| = 1
        m = sum_i c_i v_i

    u is the Karcher mean of the directions of the tensors v_i, and m the same combination of the
    tensors with their lengths. Two models with the weights (1 - t, t) give `merge_slerp` at t.
    Where a tensor is zero, or the directions cancel out or are opposite, it is the weighted mean.
    Angles are float64, sums float32; every weight of the models is treated alike. The models stay
    as they are.

    Args:
        models: Two or more `Qwen3Next` or `Qwen3NextClassifier` of the same configuration.
        weights: An amount w_i of at least 0 for each model: a number, a list of numbers along the
            decoder layers, or a dict from parts (`"experts"`) or regular expressions for paths to
            either, with `"*"` for all others. They are divided by their sum.

    Returns:
        A model of the class, configuration and dtype policy of the first one.

    Raises:
        ValueError: models that differ in class, function or weights, or an argument out of range.

    Reference: Karcher, Riemannian center of mass and mollifier smoothing (1977).

    Example:

    ```python
    from qwen3_next import Qwen3Next, merge_karcher

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_experts": 0}
    models = [Qwen3Next.from_variant("tiny", **sizes) for _ in range(3)]
    mean = merge_karcher(models, weights=[1, 1, 2])
    assert mean.config == models[0].config
    ```
    """
    named = named_models(models, least=2)
    require_mergeable(named)
    each = by_model("weights", weights, len(models), table_of(models[0]), NOT_NEGATIVE)
    require_positive_sum("weights", each)

    def combine(row, arrays):
        shares = [weight / sum(each[row.path]) for weight in each[row.path]]
        cosine = cosines(arrays)
        if cosine is None:
            return weighted_sum(arrays, shares)
        return weighted_sum(arrays, karcher_coefficients(cosine, shares).tolist())

    return merged(models, combine)
