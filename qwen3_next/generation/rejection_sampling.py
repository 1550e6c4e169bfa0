"""Which drafts are accepted, and the token behind them.

With target probabilities p of the model and draft probabilities q, draft d_j is accepted with
probability min(1, p(d_j) / q(d_j)), as long as those before it were. The token behind the accepted
ones comes from the residual distribution, the normalised positive part of p - q, where a draft was
rejected, and from p where none was. Every token then follows p, whatever q is.

Source: Leviathan et al., arXiv 2211.17192, theorem 3.5.
"""

from typing import Annotated, NamedTuple

import keras
from keras import ops

from qwen3_next.generation.drafting import Draft, StepSeeds
from qwen3_next.generation.sampling import Mode, Sampling, warp
from qwen3_next.layers.ops.tensor_types import Tensor


class Verdict(NamedTuple):
    """What the model makes of its drafts.

    Attributes:
        accepted: `(B,)` int32, drafts of every row that are accepted.
        token: `(B,)` int32, the token behind them.
    """

    accepted: Annotated[Tensor, "B"]
    token: Annotated[Tensor, "B"]


def greedy_verdict(
    logits: Annotated[Tensor, "B k+1 V"], draft: Draft, threshold: Tensor | None
) -> Verdict:
    """Accepts drafts that are the model's own choice; `threshold` is that of a lossy method."""
    choice = ops.cast(ops.argmax(logits, axis=-1), "int32")
    acceptance_mask = draft.token_ids == choice[:, :-1]
    if threshold is not None:
        target = _at_drafts(ops.softmax(logits[:, :-1], axis=-1), draft)
        acceptance_mask = acceptance_mask | (target >= threshold)
    accepted = _count_leading(acceptance_mask)
    return Verdict(accepted, ops.take_along_axis(choice, accepted[:, None], axis=1)[:, 0])


def sampled_verdict(
    logits: Annotated[Tensor, "B k+1 V"],
    draft: Draft,
    sampling: Sampling,
    seeds: StepSeeds,
    threshold: Tensor | None,
    mode: Mode,
) -> Verdict:
    """Rejection sampling; `threshold` is that of a lossy method."""
    batch, width, vocabulary = ops.shape(logits)
    flat = ops.reshape(logits, (batch * width, vocabulary))
    target = ops.softmax(warp(flat, sampling, mode), axis=-1)
    target = ops.reshape(target, (batch, width, vocabulary))  # p
    p, q = _at_drafts(target[:, :-1], draft), _at_drafts(draft.probabilities, draft)
    lookahead = draft.token_ids.shape[1]
    uniform = keras.random.uniform((batch, lookahead), seed=seeds(lookahead))
    acceptance_mask = uniform * q < p
    if threshold is not None:
        acceptance_mask = acceptance_mask | (p >= threshold)
    accepted = _count_leading(acceptance_mask)
    # Behind the last draft nothing was drafted: q is 0 there and p is left whole.
    drafted = ops.pad(draft.probabilities, [[0, 0], [0, 1], [0, 0]])
    place = accepted[:, None, None]
    target = ops.take_along_axis(target, place, axis=1)[:, 0]
    residual = ops.maximum(target - ops.take_along_axis(drafted, place, axis=1)[:, 0], 0.0)
    # Where p and q are the same but for rounding, the residual is empty and nothing was rejected.
    empty = ops.sum(residual, axis=-1, keepdims=True) <= 0
    residual = ops.where(empty, target, residual)
    token = keras.random.categorical(ops.log(residual), 1, seed=seeds(lookahead + 1))
    return Verdict(accepted, ops.cast(token[:, 0], "int32"))


def _at_drafts(probabilities, draft):
    """The probability of every drafted token, `(B, k)`."""
    index = ops.expand_dims(draft.token_ids, -1)
    return ops.take_along_axis(probabilities, index, axis=-1)[..., 0]


def _count_leading(mask):
    """Number of true entries before the first false one, `(B, k)` -> `(B,)` int32."""
    return ops.sum(ops.cumprod(ops.cast(mask, "int32"), axis=1), axis=1)
