"""Multi-token prediction: the modules behind a backbone, their losses, and what trains them.

At token i step k reads what step k - 1 left (the backbone's hidden state for k = 1) and the embedding
of token i + k, and predicts token i + k + 1. Tokens are counted within a sequence: padding is
skipped, and nothing crosses from one packed segment to the next.
"""

from typing import NamedTuple

from keras import ops

from qwen3_next.layers import MultiTokenPrediction, SwiGLU
from qwen3_next.layers.ops import linear_cross_entropy
from qwen3_next.layers.ops.cross_entropy import correct, cross_entropy
from qwen3_next.layers.ops.rows import permute_tokens
from qwen3_next.layers.ops.sequence import compaction, segment_index
from qwen3_next.models.backbone import make_decoder_layer
from qwen3_next.models.inputs import IGNORE
from qwen3_next.models.weight_table import mtp_name


class StepLosses(NamedTuple):
    """`losses` and `accuracies`, one float32 scalar a step, over the labels that count."""

    losses: tuple
    accuracies: tuple


def make_modules(config, gradient_checkpointing, dtype):
    """The built modules of a configuration, one or one a step."""
    modules = []
    for number in range(config.mtp.modules):
        module = MultiTokenPrediction(
            _body(config, gradient_checkpointing, dtype),
            normalization_type=config.normalization_type,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            name=mtp_name(number),
            dtype=dtype,
        )
        module.build((None, None, config.hidden_size))
        modules.append(module)
    return modules


def _body(config, gradient_checkpointing, dtype):
    kind = config.mtp.mtp_head_type
    if kind == "transformer":
        return make_decoder_layer(
            config,
            "full_attention",
            config.num_experts > 0,
            gradient_checkpointing,
            name="layers_0",
            dtype=dtype,
        )
    if kind == "mlp":
        return SwiGLU(
            config.intermediate_size,
            config.ffn_type,
            config.initializer_range,
            name="mlp",
            dtype=dtype,
        )
    return None


def step_losses(model, hidden, inputs, labels, sample_weight=None, training=None):
    """Loss and accuracy of every step.

    Args:
        model: `Qwen3Next` with modules.
        hidden: `(B, T, D)`, what the first step reads of the backbone.
        inputs: `Inputs` of the batch.
        labels: `(B, T)` int32 that line up with the logits of the backbone, -100 where ignored: step k
            at token i has the label of token i + k.
        sample_weight: `(B, T)` float32 or `None`.
        training: Whether to apply dropout and checkpointing.

    Returns:
        `StepLosses`.
    """
    token_ids, mask, segments = inputs
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
        valid = _ahead(real, step, False)
        if segments is not None:
            valid = valid & (_ahead(segments, step, -1) == segments)
        hidden = model.mtp_module(step)(
            _ahead(embedded, step, 0),
            hidden,
            padding_mask=valid,
            segment_ids=segments,
            training=training,
        ).hidden
        targets = ops.where(valid, _ahead(labels, step, IGNORE), IGNORE)
        weights = None if sample_weight is None else _ahead(sample_weight, step, 0)
        loss, accuracy = _mean_loss(model, hidden, targets, weights)
        losses.append(loss)
        accuracies.append(accuracy)
    return StepLosses(tuple(losses), tuple(accuracies))


def _mean_loss(model, hidden, labels, weights):
    if model.config.mtp.sequential_forward:
        flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
        found = linear_cross_entropy(
            flat, model.head_kernel(), ops.reshape(labels, (-1,)), return_correct=True
        )
        losses, hits = (ops.reshape(x, ops.shape(labels)) for x in found)
    else:
        logits = model.logits(hidden)
        losses, hits = cross_entropy(logits, labels), correct(logits, labels)
    if weights is not None:
        losses = losses * weights
    counted = ops.cast(labels != IGNORE, "float32")
    count = ops.maximum(ops.sum(counted), 1.0)
    return ops.sum(losses) / count, ops.sum(hits * counted) / count


def _ahead(x, step, fill):
    """`y[:, i] = x[:, i + step]`, `fill` behind the end."""
    length = x.shape[1]
    step = step if length is None else min(step, length)
    tail = ops.cast(ops.full_like(x[:, :step], fill), x.dtype)
    return ops.concatenate([x[:, step:], tail], axis=1)
