"""Which models can be merged, and the merged model of them, tensor by tensor.

Models are merged weight by weight, all parts alike: kernels, norms, `A_log`, `dt_bias` and router
weights go through the same equations as everything else. That makes sense for models that were
trained from the same one. All experts of a layer are one tensor, as in the weight table.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen3_next.checkpoints.coverage import listed
from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import shown
from qwen3_next.models.weight_rows import Weight
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.named_weights import (
    NamedWeights,
    rebuilt,
    require_model,
    require_same_weights,
)

# What a configuration may say differently of two models that compute the same function.
FREE_FIELDS = {
    "initializer_range",
    "router_aux_loss_coef",
    "router_aux_loss_scope",
    "attention_gate_bias",  # of one with a bias and one without, the weights differ
    "dropout",
    "attention_dropout",
    "max_position_embeddings",
    "mtp.loss_weight_decay",
    "mtp.mtp_loss_weight",
    "mtp.warmup_steps",
    "mtp.sequential_forward",
    "mtp.speculation_lookahead",
    "etd.ponder_cost",
    "etd.backprop_iterations",
    "etd.sample_iterations",
    "etd.warmup_steps",
    "etd.router_warmup_steps",
    "etd.expert_warmup_steps",
    "etd.layer_router.use_gumbel",
    "etd.layer_router.compute_budget",
    "etd.layer_router.budget_weight",
    "etd.lora_expert.dropout",
    "etd.lora_expert.bias_update_rate",
}

Combine = Callable[[Weight, list[np.ndarray]], np.ndarray]


def named_models(models: Any, least: int = 1) -> dict[str, Task]:
    """The items of the argument `models` by name; `ValueError` unless it is a list of models."""
    if not isinstance(models, list | tuple) or len(models) < least:
        raise ValueError(
            f"`models` must be a list of at least {least} models. Received: models={shown(models)}"
        )
    named = {f"models[{index}]": model for index, model in enumerate(models)}
    for name, model in named.items():
        require_model(name, model)
    return named


def require_mergeable(models: Mapping[str, Task]) -> None:
    """Raises `ValueError` unless models are of one class, function and set of weights.

    Args:
        models: Models by the name of the argument they came in.
    """
    for name, model in models.items():
        require_model(name, model)
    (first, reference), *others = models.items()
    for name, model in others:
        if type(model) is not type(reference):
            raise ValueError(
                f"`{name}` must be of the class of `{first}`, {type(reference).__name__}. "
                f"Received: {name} of type {type(model).__name__}"
            )
    require_same_function({name: model.config for name, model in models.items()})
    require_same_weights(models)
    for name, model in models.items():
        NamedWeights(model, name)


def require_same_function(configs: Mapping[str, Qwen3NextConfig]) -> None:
    """Raises `ValueError` unless configurations describe the same function of the weights.

    Args:
        configs: Configurations by the name of the model they belong to.
    """
    (first, reference), *others = configs.items()
    expected = _flat(reference.to_dict())
    for name, config in others:
        found = _flat(config.to_dict())
        differing = [
            f"{field}={shown(found.get(field))} instead of {shown(expected.get(field))}"
            for field in dict.fromkeys([*expected, *found])
            if field not in FREE_FIELDS and found.get(field) != expected.get(field)
        ]
        if differing:
            raise ValueError(
                f"`{name}` must have the configuration of `{first}`. Received: {listed(differing)}"
            )


def merged(models: Sequence[Task], combine: Combine) -> Any:
    """A new model like the first one, each of whose weights is made of theirs.

    Args:
        models: Mergeable models.
        combine: Gives the weight for its row and the weight of each model, float32 or wider. It
            must leave the arrays as they are and return a new one.

    Raises:
        ValueError: weights that are not finite.
    """
    sources = [NamedWeights(model) for model in models]

    def make(row):
        return combine(row, [_read(source, row.path) for source in sources])

    return rebuilt(models[0], models[0].config, make)


def weighted_sum(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """`sum_i w_i x_i`; one array with the weight 1 and others with 0 give that array exactly."""
    total = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights):
        if weight:
            total += array * array.dtype.type(weight)
    return total


def _read(source, path):
    """A weight as float32 unless it is wider; `ValueError` if it is not finite."""
    array = source[path]
    array = array if array.dtype == np.float64 else array.astype(np.float32, copy=False)
    if not np.isfinite([array.min(), array.max()]).all():  # which carry a NaN
        raise ValueError(f"Models to be merged must be finite. Received: NaN or infinity in {path}")
    return array


def _flat(fields, prefix=""):
    """Nested fields by dotted name."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
