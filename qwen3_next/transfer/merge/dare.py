"""DARE: drop entries of task vectors at random, rescale the rest, and merge them.

    d_i = z_i (m_i - b) / density,    z_i ~ Bernoulli(density) for every entry
    m   = b + scale merge(d_1 .. d_N)

where `merge` is the weighted sum of task arithmetic, or TIES' mean of the vectors with the elected
sign. Float32, one tensor at a time.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3_next.checkpoints.interchange import table_of
from qwen3_next.config.validation import BOOLEAN, NOT_NEGATIVE, Rule, integer, one_of, require
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.merge.merge_amounts import (
    ANY,
    Amount,
    by_model,
    densities_by_model,
    require_positive_sum,
)
from qwen3_next.transfer.merge.mergeable import named_models, require_mergeable
from qwen3_next.transfer.merge.task_arithmetic import total, with_task_vectors
from qwen3_next.transfer.merge.ties import agreed

LINEAR, TIES = "linear", "ties"
_NORMALIZE = Rule("None or a bool", lambda value: value is None or BOOLEAN.fits(value))


def merge_dare(
    base: Task,
    models: Sequence[Task],
    weights: Sequence[Amount],
    density: Amount | Sequence[Amount],
    rescale: bool = True,
    combine: str = LINEAR,
    normalize: bool | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Any:
    """A base model plus the task vectors of others, of which random entries were dropped.

        d_i = z_i (m_i - b) / density,    z_i ~ Bernoulli(density) for every entry
        m   = b + scale merge(d_1 .. d_N)

    It is computed in float32, for every weight of the models alike. The models stay as they are.

    Args:
        base: `Qwen3Next` or `Qwen3NextClassifier` b that the others were trained from.
        models: One or more models m_i of the same configuration.
        weights: An amount w_i for each model: a number, a list of numbers along the decoder layers,
            or a dict from parts (`"experts"`) or regular expressions for paths to either, with
            `"*"` for all others. At least 0 with `combine="ties"`.
        density: Probability that an entry is kept, in (0, 1]: an amount for all models (no list),
            or a list with one for each.
        rescale: Whether to divide what is kept by the density, so that its expectation stays.
        combine: `"linear"`, the weighted sum, or `"ties"`, the weighted mean of the vectors with
            the sign of that sum, as in `merge_ties`.
        normalize: Whether to divide by the sum of the weights, with `"ties"` of those that have the
            sign. `None` for what the two methods do by themselves: not with `"linear"`, but with
            `"ties"`.
        scale: Factor of the merged task vector.
        seed: Which entries are dropped depends on it, on the path of the weight and on the place of
            the model in `models`, and on nothing else.

    Returns:
        A model of the class, configuration and dtype policy of `base`.

    Raises:
        ValueError: models that differ in class, function or weights, or an argument out of range.

    Reference: Language Models are Super Mario, arXiv 2311.03099.

    Example:

    ```python
    from qwen3_next import Qwen3Next, merge_dare

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_experts": 0}
    base, coder, poet = (Qwen3Next.from_variant("tiny", **sizes) for _ in range(3))
    both = merge_dare(base, [coder, poet], weights=[0.5, 0.5], density=0.1, seed=7)
    elected = merge_dare(base, [coder, poet], [1, 1], density=0.1, combine="ties")
    assert both.config == elected.config == base.config
    ```
    """
    named = named_models(models)
    require_mergeable({"base": base, **named})
    require(BOOLEAN, "rescale", rescale)
    require(one_of((LINEAR, TIES)), "combine", combine)
    require(_NORMALIZE, "normalize", normalize)
    require(integer(0), "seed", seed)
    normalize = combine == TIES if normalize is None else normalize
    rows = table_of(base)
    rule = NOT_NEGATIVE if combine == TIES else ANY
    each = by_model("weights", weights, len(models), rows, rule)
    densities = densities_by_model(density, len(models), rows)
    if normalize and combine == LINEAR:
        require_positive_sum("weights", each)
    merge = agreed if combine == TIES else total

    def dropped_and_merged(row, deltas):
        for place, (delta, fraction) in enumerate(zip(deltas, densities[row.path])):
            drop(delta, fraction, rescale, random_stream(seed, row.path, place))
        return merge(deltas, each[row.path], normalize)

    return with_task_vectors(base, models, dropped_and_merged, scale)


def drop(delta: np.ndarray, density: float, rescale: bool, stream: np.random.Generator) -> None:
    """Keeps every entry of an array with the probability `density`, in place."""
    if density == 1:
        return
    delta[stream.random(delta.shape, "float32") >= density] = 0
    if rescale:
        delta /= delta.dtype.type(density)


def random_stream(seed: int, path: str, place: int) -> np.random.Generator:
    """The random numbers for one weight of one model, whatever was drawn before."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, place, int.from_bytes(digest, "little")])
