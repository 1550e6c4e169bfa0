"""How long the tokens of a generation thought, summed inside of the decoding loop."""

from typing import Annotated, Any, NamedTuple

from keras import ops

from qwen3_next.layers import Thinking
from qwen3_next.layers.ops.tensor_types import Tensor


class ThinkingTotals(NamedTuple):
    """Sums over the tokens that decoding has read, `()` float32 each.

    Attributes:
        tokens: Their number.
        think_iterations: Their iterations.
        early_exit: How many of them left before the last iteration.
        exit_confidence: Their sums of halting probabilities.
    """

    tokens: Tensor
    think_iterations: Tensor
    early_exit: Tensor
    exit_confidence: Tensor


def no_totals(model: Any) -> ThinkingTotals | tuple[()]:
    """Zeros, or `()` for a model without a think loop."""
    if model.config.etd is None:
        return ()
    return ThinkingTotals(*(ops.zeros((), "float32") for _ in ThinkingTotals._fields))


def with_tokens(
    totals: ThinkingTotals | tuple[()],
    thinking: Thinking | None,
    read: Annotated[Tensor, "B T"],
) -> ThinkingTotals | tuple[()]:
    """The totals with the tokens that are `read`."""
    if not totals or thinking is None:
        return totals
    weight = ops.cast(read, "float32")
    found = (thinking.iterations, thinking.early_exit, thinking.exit_confidence)
    sums = [ops.sum(weight * ops.cast(x, "float32")) for x in found]
    return ThinkingTotals(*(a + b for a, b in zip(totals, (ops.sum(weight), *sums))))


def thinking_stats(totals: ThinkingTotals | tuple[()]) -> dict[str, float]:
    """Means per token; nothing where there is no loop or no token was read."""
    if not totals:
        return {}
    tokens, *sums = (float(ops.convert_to_numpy(x)) for x in totals)
    if not tokens:
        return {}
    return {name: total / tokens for name, total in zip(totals._fields[1:], sums, strict=True)}
