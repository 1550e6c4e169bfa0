"""Plain decoding: one token per row and step."""

import dataclasses
from typing import Any, NamedTuple

from keras import ops

from qwen3_next.generation.decoding import Caches, Newest, Request, first_token, logits_of
from qwen3_next.generation.sampling import Mode, is_stop, sample
from qwen3_next.generation.thinking_totals import no_totals, thinking_stats, with_tokens
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.cache import Cache


class PlainCarry(NamedTuple):
    """The carry of plain decoding.

    Attributes:
        cache: `Cache` of all tokens but the newest.
        token: `(B,)` int32, the newest token.
        finished: `(B,)` bool.
        new_tokens: `(B, M)` int32.
        count: `()` int32, columns of `new_tokens` that are written.
        thinking: `ThinkingTotals`, or `()` without a think loop.
    """

    cache: Cache
    token: Tensor
    finished: Tensor
    new_tokens: Tensor
    count: Tensor
    thinking: Any = ()


@dataclasses.dataclass(frozen=True)
class PlainDecoding:
    """Reads the newest token of every row and samples the next one."""

    mode: Mode
    think_iterations: int | None = None
    lookahead: int = dataclasses.field(default=0, init=False)

    def init(
        self, model: Any, caches: Caches, newest: Newest, request: Request, new_tokens: Tensor
    ) -> PlainCarry:
        token, finished, new_tokens = first_token(
            model, newest.hidden, request, new_tokens, self.mode
        )
        one, totals = ops.ones((), "int32"), no_totals(model)
        return PlainCarry(caches.model, token, finished, new_tokens, one, totals)

    def step(self, model: Any, carry: PlainCarry, request: Request) -> PlainCarry:
        active = ops.logical_not(carry.finished)[:, None]
        inputs = {"token_ids": carry.token[:, None], "padding_mask": active}
        output = model.backbone(inputs, cache=carry.cache)
        logits = logits_of(model, output.hidden[:, 0], request)
        token = sample(logits, request.sampling, carry.count, self.mode)
        count = carry.count + 1
        return PlainCarry(
            cache=output.cache,
            token=token,
            finished=carry.finished | is_stop(token, request.sampling) | (count >= request.limit),
            new_tokens=ops.slice_update(carry.new_tokens, (0, carry.count), token[:, None]),
            count=count,
            thinking=with_tokens(carry.thinking, output.thinking, active),
        )

    def stats(self, carry: PlainCarry) -> dict:
        steps = int(ops.convert_to_numpy(carry.count))
        return {"steps": steps, **thinking_stats(carry.thinking, carry.cache)}
