"""How long and through what tokens think, as `fit` and `evaluate` log it, and what that costs."""

from typing import Annotated, Any

import keras
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.etd_config import THINKING_NAMES
from qwen3_next.layers import Thinking
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.training.losses import mean_of_sums

ACTIONS = ("skip", "execute", "repeat")


@keras.saving.register_keras_serializable(package="qwen3_next")
class RouterActions(keras.metrics.Metric):
    """How often rows skipped, ran and repeated every think layer.

    `result()` gives the shares over all layers, by the names that `fit` logs them under;
    `actions`, `(L, 3)`, are the counts.
    """

    names = tuple(f"router_{action}" for action in ACTIONS)

    def __init__(self, num_layers: int, name: str = "router_actions", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.num_layers = num_layers
        shape = (num_layers, len(ACTIONS))
        self.actions = self.add_variable(shape=shape, initializer="zeros", name="actions")

    def update_state(self, route: Annotated[Tensor, "B L"], rows: Annotated[Tensor, "B"]) -> None:
        """Adds the routes of the real `rows`."""
        found = route[..., None] == ops.arange(len(ACTIONS), dtype="int32")
        found = ops.cast(found, "float32") * ops.cast(rows, "float32")[:, None, None]
        self.actions.assign_add(ops.sum(found, axis=0))

    def result(self) -> dict[str, Tensor]:
        counts = ops.sum(ops.convert_to_tensor(self.actions), axis=0)
        shares = counts / ops.maximum(ops.sum(counts), 1.0)
        return {name: shares[action] for action, name in enumerate(self.names)}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_layers": self.num_layers}


@keras.saving.register_keras_serializable(package="qwen3_next")
class ExpertSelections(keras.metrics.Metric):
    """How often each LoRA expert was chosen.

    `result()` gives the share of the one that was chosen most; `selections`, `(N,)`, are the
    counts.
    """

    names = ("expert_share_max",)

    def __init__(self, num_experts: int, name: str = "expert_selections", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.num_experts = num_experts
        self.selections = self.add_variable(
            shape=(num_experts,), initializer="zeros", name="selections"
        )

    def update_state(self, selections: Annotated[Tensor, "B N"]) -> None:
        """Adds the counts of all rows."""
        self.selections.assign_add(ops.sum(selections, axis=0))

    def result(self) -> dict[str, Tensor]:
        counts = ops.convert_to_tensor(self.selections)
        return {self.names[0]: ops.max(counts) / ops.maximum(ops.sum(counts), 1.0)}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_experts": self.num_experts}


def make_thinking_metrics(config: Qwen3NextConfig) -> list[keras.metrics.Metric]:
    """One mean over real tokens per name and what counts decisions; none without a think loop."""
    etd = config.etd
    if etd is None:
        return []
    found: list[keras.metrics.Metric] = [keras.metrics.Mean(name=name) for name in THINKING_NAMES]
    if etd.use_layer_router:
        found.append(RouterActions(etd.n_think_layers))
    if etd.use_lora_experts:
        found.append(ExpertSelections(etd.num_lora_experts))
    return found


def update_thinking_metrics(metrics: list[Any], thinking: Thinking | None) -> None:
    """Adds the tokens of a batch."""
    if thinking is None:
        return
    real = thinking.iterations > 0
    for metric in metrics:
        if isinstance(metric, RouterActions):
            if not isinstance(thinking.route, tuple):
                metric.update_state(thinking.route, ops.any(real, axis=1))
        elif isinstance(metric, ExpertSelections):
            if not isinstance(thinking.selections, tuple):
                metric.update_state(thinking.selections)
        else:
            name = {"think_iterations": "iterations"}.get(metric.name, metric.name)
            value = ops.cast(getattr(thinking, name), "float32")
            metric.update_state(value, sample_weight=ops.cast(real, "float32"))


def names_of(metric: keras.metrics.Metric) -> tuple[str, ...]:
    """What a metric logs."""
    return getattr(metric, "names", (metric.name,))


def thinking_results(metrics: list[Any]) -> dict[str, Any]:
    """What the metrics found, as `get_metrics` tells it."""
    found: dict[str, Any] = {}
    for metric in metrics:
        if isinstance(metric, RouterActions):
            found[metric.name] = _counts(metric.actions)
        elif isinstance(metric, ExpertSelections):
            found[metric.name] = _counts(metric.selections)
        else:
            found[metric.name] = float(metric.result())
    return found


def _counts(variable):
    # As a tensor first: on replicas a value is the sum of several.
    return ops.convert_to_numpy(ops.convert_to_tensor(variable)).astype(int).tolist()


def ponder_loss(config: Qwen3NextConfig, thinking: Thinking | None) -> Annotated[Tensor, ""] | None:
    """`ponder_cost` times the mean over real tokens of iterations plus remainder.

    Source: Adaptive Computation Time, arXiv 1603.08983, section 2.1. `None` where it has no price.
    """
    if thinking is None or config.etd is None or not config.etd.ponder_cost:
        return None
    real = ops.cast(thinking.iterations > 0, "float32")
    return config.etd.ponder_cost * mean_of_sums(ops.sum(real * thinking.ponder), ops.sum(real))


def budget_loss(config: Qwen3NextConfig, thinking: Thinking | None) -> Annotated[Tensor, ""] | None:
    """`budget_weight max(0, passes - compute_budget)`, with the mean over real rows and think
    layers of the passes that the routers expect, `p(execute) + 2 p(repeat)`.

    `None` where the routers were not asked or have no budget.
    """
    if thinking is None or isinstance(thinking.route_logits, tuple) or config.etd is None:
        return None
    router = config.etd.layer_router
    if not router.budget_weight:
        return None
    rows = ops.cast(ops.any(thinking.iterations > 0, axis=1), "float32")
    passes = ops.softmax(thinking.route_logits) * ops.arange(len(ACTIONS), dtype="float32")
    by_row = ops.mean(ops.sum(passes, axis=-1), axis=-1)
    mean = mean_of_sums(ops.sum(by_row * rows), ops.sum(rows))
    return router.budget_weight * ops.maximum(mean - router.compute_budget, 0.0)


def thinking_loss(
    config: Qwen3NextConfig, thinking: Thinking | None
) -> Annotated[Tensor, ""] | None:
    """What thinking costs in training, depth and passes together; `None` where nothing."""
    terms = [loss(config, thinking) for loss in (ponder_loss, budget_loss)]
    found = [term for term in terms if term is not None]
    return sum(found[1:], found[0]) if found else None
