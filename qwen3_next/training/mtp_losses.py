"""What trains MTP modules: one cross-entropy per step, and their weighted sum.

At token i step k reads what step k - 1 left (the backbone's hidden state for k = 1) and the
embedding of token i + k, and predicts token i + k + 1. Tokens are counted within a sequence:
padding is skipped, and nothing crosses from one packed segment to the next.
"""

from typing import Annotated, Any, NamedTuple

from keras import ops

from qwen3_next.layers.ops.cross_entropy import IGNORE, correct, cross_entropy
from qwen3_next.layers.ops.rows import permute_tokens
from qwen3_next.layers.ops.sequence import compaction, segment_index
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.inputs import Inputs
from qwen3_next.training.losses import fused_losses, masked_mean


class StepLosses(NamedTuple):
    """What every step has over the labels that count.

    Attributes:
        losses: Mean cross-entropies, one float32 scalar per step.
        accuracies: Shares of labels with the largest logit, one float32 scalar per step.
    """

    losses: tuple[Tensor, ...]
    accuracies: tuple[Tensor, ...]


def step_losses(
    model: Any,
    hidden: Annotated[Tensor, "B T D"],
    inputs: Inputs,
    labels: Annotated[Tensor, "B T"],
    sample_weight: Annotated[Tensor, "B T"] | None = None,
    training: bool | None = None,
) -> StepLosses:
    """Loss and accuracy of every step.

    Args:
        model: `Qwen3Next` with MTP modules.
        hidden: `(B, T, D)`, what the first step reads of the backbone.
        inputs: `Inputs` of the batch.
        labels: `(B, T)` int32 that line up with the logits of the backbone, -100 where ignored:
            step k at token i has the label of token i + k.
        sample_weight: `(B, T)` float32 or `None`.
        training: Whether to apply dropout and checkpointing.

    Returns:
        `StepLosses`.
    """
    token_ids, mask, segments = inputs.token_ids, inputs.padding_mask, inputs.segment_ids
    if segments is not None:
        segments = segment_index(segments, mask)
    if mask is not None:
        # Real tokens to the front: then the next token is the next place.
        order, destination = compaction(mask)
        hidden = permute_tokens(hidden, order, destination)
        token_ids, labels, mask, segments, sample_weight = (
            None if x is None else ops.take_along_axis(x, order, axis=1)
            for x in (token_ids, labels, mask, segments, sample_weight)
        )
    embedded = model.backbone.embed_tokens(token_ids)
    real = ops.ones_like(token_ids, "bool") if mask is None else mask
    losses, accuracies = [], []
    for step in range(1, model.config.mtp.num_predict_tokens + 1):
        valid = _shift(real, step, False)
        if segments is not None:
            valid = valid & (_shift(segments, step, -1) == segments)
        hidden = model.mtp_module(step)(
            _shift(embedded, step, 0),
            hidden,
            padding_mask=valid,
            segment_ids=segments,
            training=training,
        )
        targets = ops.where(valid, _shift(labels, step, IGNORE), IGNORE)
        weights = None if sample_weight is None else _shift(sample_weight, step, 0)
        values, hits = _losses_and_hits(model, hidden, targets)
        losses.append(masked_mean(values, targets, weights))
        accuracies.append(masked_mean(hits, targets))
    return StepLosses(tuple(losses), tuple(accuracies))


def weighted_sum(model: Any, steps: StepLosses) -> Annotated[Tensor, ""]:
    """`w sum_k a_k CE_k`, with w on its way up during the warm-up."""
    mtp = model.config.mtp
    weight = mtp.mtp_loss_weight
    if model.mtp_steps is not None:
        done = ops.cast(model.mtp_steps, "float32") + 1.0
        weight = weight * ops.minimum(done / mtp.warmup_steps, 1.0)
    return weight * sum(a * loss for a, loss in zip(mtp.step_weights, steps.losses))


def _losses_and_hits(model, hidden, labels):
    if model.config.mtp.sequential_forward:
        return fused_losses(hidden, model.head_kernel(), labels)
    logits = model.logits(hidden)
    return cross_entropy(logits, labels), correct(logits, labels)


def _shift(x, step, fill):
    """`y[:, i] = x[:, i + step]`, `fill` behind the end."""
    length = x.shape[1]
    step = step if length is None else min(step, length)
    tail = ops.cast(ops.full_like(x[:, :step], fill), x.dtype)
    return ops.concatenate([x[:, step:], tail], axis=1)
