"""How long and how the tokens of a generation thought, summed inside of the decoding loop."""

from typing import Annotated, Any, NamedTuple

import numpy as np
from keras import ops

from qwen3_next.layers import Thinking
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.cache import Cache


class ThinkingTotals(NamedTuple):
    """Sums over the tokens that decoding has read, `()` float32 each.

    Attributes:
        tokens: Their number.
        think_iterations: Their iterations.
        early_exit: How many of them left before the last iteration.
        exit_confidence: Their sums of halting probabilities.
        selections: `(N,)` float32, in how many of their iterations each LoRA expert took part, or
            `()`.
    """

    tokens: Tensor
    think_iterations: Tensor
    early_exit: Tensor
    exit_confidence: Tensor
    selections: Any = ()


def no_totals(model: Any) -> ThinkingTotals | tuple[()]:
    """Zeros, or `()` for a model without a think loop."""
    etd = model.config.etd
    if etd is None:
        return ()
    selections = ops.zeros((etd.num_lora_experts,), "float32") if etd.use_lora_experts else ()
    zero = ops.zeros((), "float32")
    return ThinkingTotals(zero, zero, zero, zero, selections)


def with_tokens(
    totals: ThinkingTotals | tuple[()],
    thinking: Thinking | None,
    read: Annotated[Tensor, "B T"],
) -> ThinkingTotals | tuple[()]:
    """The totals with the tokens that are `read`."""
    if not totals or thinking is None:
        return totals
    weight = ops.cast(read, "float32")
    selections = totals.selections
    if not isinstance(selections, tuple):
        by_token = weight[..., None] * thinking.token_selections
        selections = selections + ops.sum(by_token, axis=(0, 1))

    def total(values: Tensor) -> Tensor:
        return ops.sum(weight * ops.cast(values, "float32"))

    return ThinkingTotals(
        totals.tokens + ops.sum(weight),
        totals.think_iterations + total(thinking.iterations),
        totals.early_exit + total(thinking.early_exit),
        totals.exit_confidence + total(thinking.exit_confidence),
        selections,
    )


def thinking_stats(totals: ThinkingTotals | tuple[()], cache: Cache) -> dict[str, Any]:
    """Means per token, and what was decided; nothing where there is no loop.

    Args:
        totals: `ThinkingTotals` of the tokens that were read behind the prompt.
        cache: `Cache` at the end.
    """
    if not totals:
        return {}
    found: dict[str, Any] = {}
    if cache.route is not None:
        route = ops.convert_to_numpy(cache.route)
        found["route"] = route
        found["router_actions"] = [np.bincount(of, minlength=3).tolist() for of in route.T]
    *means, selections = totals
    if not isinstance(selections, tuple):
        found["expert_selections"] = ops.convert_to_numpy(selections).astype(int).tolist()
    tokens, *sums = (float(ops.convert_to_numpy(x)) for x in means)
    if tokens:
        found |= {name: total / tokens for name, total in zip(totals._fields[1:4], sums)}
    return found
