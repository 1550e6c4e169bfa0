"""Lossless speculative decoding: the MTP modules draft, the model verifies.

One step of every row, with x_n its newest token, which the backbone has not read yet:

1. The modules read what the last step made certain, pairs of the backbone's hidden state at a
   token and the token after it, and draft d_1 .. d_k, each behind the ones before.
2. The backbone reads x_n, d_1 .. d_k in one replayable pass; the head gives the target
   distributions p_0 .. p_k of the tokens behind each.
3. Rejection sampling accepts some of the drafts and adds one token of the model's own.
4. The backbone's cache is committed to x_n and the accepted drafts.

Every token follows the distribution of plain decoding whatever the modules draft; with
`temperature=0` it is the same token.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

from keras import ops

from qwen3_next.generation.decoding import Caches, Newest, Request, first_token, logits_of
from qwen3_next.generation.drafting import (
    Draft,
    PendingPairs,
    StepSeeds,
    draft_tokens,
    extend_modules,
)
from qwen3_next.generation.rejection_sampling import Verdict, greedy_verdict, sampled_verdict
from qwen3_next.generation.sampling import GREEDY, Mode, is_stop
from qwen3_next.generation.thinking_totals import no_totals, thinking_stats, with_tokens
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.backbone import BackboneOutput
from qwen3_next.models.inputs import last_hidden


class Counters(NamedTuple):
    """Counts over a call, int32.

    Attributes:
        steps: `()`, steps of the loop.
        row_steps: `()`, steps of rows that had not finished.
        accepted: `(k,)`, in how many of those the drafts up to each position were accepted.
    """

    steps: Tensor
    row_steps: Tensor
    accepted: Tensor


class SpeculativeCarry(NamedTuple):
    """The carry of speculative decoding.

    Attributes:
        caches: `Caches`, the backbone's with all tokens but the newest.
        pairs: `(B,)` int32, pairs in the caches of the modules.
        pending: `PendingPairs` for the modules to read next.
        token: `(B,)` int32, the newest token.
        finished: `(B,)` bool.
        new_tokens: `(B, M)` int32.
        count: `(B,)` int32, columns of `new_tokens` that are written.
        counters: `Counters`.
        thinking: `ThinkingTotals`, or `()` without a think loop.
    """

    caches: Caches
    pairs: Tensor
    pending: PendingPairs
    token: Tensor
    finished: Tensor
    new_tokens: Tensor
    count: Tensor
    counters: Counters
    thinking: Any = ()


@dataclasses.dataclass(frozen=True)
class SpeculativeDecoding:
    """Drafts `lookahead` tokens per step; a `lossy` one accepts likely drafts in any case."""

    mode: Mode
    lookahead: int
    lossy: bool = False
    think_iterations: int | None = None

    def init(
        self, model: Any, caches: Caches, newest: Newest, request: Request, new_tokens: Tensor
    ) -> SpeculativeCarry:
        token, finished, new_tokens = first_token(
            model, newest.hidden, request, new_tokens, self.mode
        )
        # The newest pair, in a window as wide as what later steps make certain.
        ahead = [[0, 0], [0, self.lookahead]]
        pending = PendingPairs(
            hidden=ops.pad(newest.mtp_input[:, None], [*ahead, [0, 0]]),
            token_ids=ops.pad(token[:, None], ahead),
            mask=ops.pad(ops.ones_like(token, "bool")[:, None], ahead),
        )
        zero = ops.zeros((), "int32")
        return SpeculativeCarry(
            caches=caches,
            pairs=caches.model.lengths - 1,
            pending=pending,
            token=token,
            finished=finished,
            new_tokens=new_tokens,
            count=ops.ones_like(token),
            counters=Counters(zero, zero, ops.zeros((self.lookahead,), "int32")),
            thinking=no_totals(model),
        )

    def step(self, model: Any, carry: SpeculativeCarry, request: Request) -> SpeculativeCarry:
        seeds = StepSeeds(request.sampling, carry.counters.steps, self.lookahead)
        draft, module_caches, pairs = self.draft(model, carry, request, seeds)
        active = ops.logical_not(carry.finished)
        token_ids = ops.concatenate([carry.token[:, None], draft.token_ids], axis=1)  # (B, k+1)
        mask = ops.repeat(active[:, None], self.lookahead + 1, axis=1)
        output = model.backbone(
            {"token_ids": token_ids, "padding_mask": mask},
            cache=carry.caches.model,
            replayable=True,
        )
        logits = logits_of(model, output.hidden, request)
        verdict = self.verify(logits, draft, request, seeds)
        carry = carry._replace(caches=carry.caches._replace(modules=module_caches), pairs=pairs)
        return self.commit(model, carry, output, draft, verdict, request)

    def stats(self, carry: SpeculativeCarry) -> dict:
        counters = carry.counters
        row_steps = int(ops.convert_to_numpy(counters.row_steps))
        accepted = ops.convert_to_numpy(counters.accepted)
        # The first token of a row comes from its prompt.
        decoded = int(ops.convert_to_numpy(carry.count).sum()) - len(carry.count)
        rates = [float(n) / row_steps if row_steps else 0.0 for n in accepted]
        tokens_per_step = decoded / row_steps if row_steps else 0.0
        steps = int(ops.convert_to_numpy(counters.steps))
        return {
            "steps": steps,
            "verify_steps": steps,
            "drafted": row_steps * self.lookahead,
            "accepted": int(accepted.sum()),
            "acceptance_rate_by_position": rates,
            "avg_acceptance_rate": sum(rates) / len(rates),
            "tokens_per_step": tokens_per_step,
            "lossy": self.lossy,
            **thinking_stats(carry.thinking, carry.caches.model),
        }

    def draft(
        self, model: Any, carry: SpeculativeCarry, request: Request, seeds: StepSeeds
    ) -> tuple[Draft, tuple, Tensor]:
        """Part 1 of a step: drafts, the caches of the modules, and the pairs in these."""
        modules = extend_modules(model, carry.caches.modules, carry.pairs, carry.pending)
        draft, caches = draft_tokens(
            model,
            modules,
            last_hidden(modules.hidden, carry.pending.mask),
            ops.logical_not(carry.finished),
            request.sampling,
            seeds,
            request.drafting.vocabulary,
            lookahead=self.lookahead,
            mode=self.mode,
        )
        return draft, caches, modules.pairs

    def verify(
        self,
        logits: Annotated[Tensor, "B k+1 V"],
        draft: Draft,
        request: Request,
        seeds: StepSeeds,
    ) -> Verdict:
        """Part 3 of a step: how many drafts are accepted, and the token behind them."""
        logits = ops.cast(logits, "float32")
        threshold = request.drafting.threshold if self.lossy else None
        if self.mode is GREEDY:
            return greedy_verdict(logits, draft, threshold)
        return sampled_verdict(logits, draft, request.sampling, seeds, threshold, self.mode)

    def commit(
        self,
        model: Any,
        carry: SpeculativeCarry,
        output: BackboneOutput,
        draft: Draft,
        verdict: Verdict,
        request: Request,
    ) -> SpeculativeCarry:
        """Part 4 of a step: emits the accepted drafts and the token behind them, up to the first
        stop token and the limit, and commits the cache to them."""
        accepted, width = verdict.accepted, self.lookahead + 1
        active = ops.logical_not(carry.finished)
        places = ops.arange(width, dtype="int32")
        drafts = ops.pad(draft.token_ids, [[0, 0], [0, 1]])
        candidates = ops.where(places < accepted[:, None], drafts, verdict.token[:, None])
        stops = is_stop(candidates, request.sampling) & (places <= accepted[:, None])
        first_stop = ops.min(ops.where(stops, places, width), axis=1)
        emitted = ops.minimum(ops.minimum(accepted, first_stop) + 1, request.limit - carry.count)
        emitted = ops.where(active, emitted, 0)
        count = carry.count + emitted
        newest = ops.maximum(emitted - 1, 0)[:, None]
        token = ops.take_along_axis(candidates, newest, axis=1)[:, 0]
        cache = model.backbone.commit(carry.caches.model, output.update, emitted)
        return SpeculativeCarry(
            caches=carry.caches._replace(model=cache),
            pairs=carry.pairs,
            pending=PendingPairs(model.mtp_input(output), candidates, places < emitted[:, None]),
            token=ops.where(active, token, carry.token),
            finished=carry.finished | (first_stop < emitted) | (count >= request.limit),
            new_tokens=_append(carry.new_tokens, carry.count, candidates, emitted),
            count=count,
            counters=_counted(carry.counters, active, accepted),
            thinking=with_tokens(carry.thinking, output.thinking, places < emitted[:, None]),
        )


def _append(new_tokens, count, candidates, emitted):
    """`new_tokens (B, M)` with the first `emitted (B,)` candidates written from `count (B,)` on."""
    columns = ops.arange(new_tokens.shape[1], dtype="int32") - count[:, None]
    last = candidates.shape[1] - 1
    written = ops.take_along_axis(candidates, ops.clip(columns, 0, last), axis=1)
    return ops.where((columns >= 0) & (columns < emitted[:, None]), written, new_tokens)


def _counted(counters, active, accepted):
    positions = ops.arange(1, counters.accepted.shape[0] + 1, dtype="int32")
    upto = (positions <= accepted[:, None]) & active[:, None]
    return Counters(
        counters.steps + 1,
        counters.row_steps + ops.sum(ops.cast(active, "int32")),
        counters.accepted + ops.sum(ops.cast(upto, "int32"), axis=0),
    )
