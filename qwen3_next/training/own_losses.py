"""What a language model adds to its cross-entropy: load balancing, thinking, looking ahead.

The terms of a step, and what it notes in metrics and counters, for the model's own `fit` and for
trainers with another loss.
"""

from typing import Annotated, Any, NamedTuple

from keras import ops

from qwen3_next.layers.ops.backend.replicas import sum_over_replicas
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.backbone import balance
from qwen3_next.models.inputs import unpack
from qwen3_next.training.losses import per_token
from qwen3_next.training.mtp_losses import StepLosses, step_losses, weighted_sum
from qwen3_next.training.step_inputs import StepOutput
from qwen3_next.training.thinking_metrics import thinking_loss, update_thinking_metrics


class OwnLosses(NamedTuple):
    """What a model adds to its cross-entropy.

    Attributes:
        loss: `()` float32, the sum of the terms; 0 outside of training.
        mtp: `StepLosses`, or `None` without MTP modules.
        expert_load: `(MoE layers, E)` float32, tokens per expert relative to an even load, or
            `None` for a dense model.
    """

    loss: Tensor
    mtp: StepLosses | None
    expert_load: Tensor | None


def own_losses(
    model: Any,
    inputs: Any,
    labels: Annotated[Tensor, "B T"],
    output: StepOutput,
    sample_weight: Tensor | None,
    training: bool,
) -> OwnLosses:
    """The terms of a step.

    Args:
        model: `Qwen3Next` whose step it is.
        inputs: What it was called with.
        labels: `(B, T)` int32 that line up with the logits, -100 where ignored.
        output: What it returned for `StepInputs`.
        sample_weight: `(B,)` or `(B, T)`, or `None`.
        training: Whether it trains.
    """
    loss, mtp = ops.zeros(()), None
    # A product of means over the batch, so not the mean of what replicas have.
    aux_loss, expert_load = balance(model.config, sum_over_replicas(output.routings))
    if aux_loss is not None and training:
        loss = loss + model.config.router_aux_loss_coef * aux_loss
    thinking = thinking_loss(model.config, output.thinking)
    if thinking is not None and training:
        loss = loss + thinking
    if output.mtp_input is not None:
        weight = None
        if sample_weight is not None:
            weight = ops.broadcast_to(per_token(sample_weight), ops.shape(labels))
        mtp = step_losses(model, output.mtp_input, unpack(inputs), labels, weight, training)
        loss = loss + weighted_sum(model, mtp) if training else loss
    return OwnLosses(loss, mtp, expert_load)


def note_step(
    model: Any,
    labels: Annotated[Tensor, "B T"],
    output: StepOutput,
    own: OwnLosses,
    training: bool,
) -> None:
    """Updates the metrics and the counters of a model, once the losses of a step are known."""
    update_thinking_metrics(model.thinking_metrics, output.thinking)
    if own.expert_load is not None:
        model.expert_load_max.update_state(ops.max(own.expert_load))
        model.expert_load_unused.update_state(ops.mean(ops.cast(own.expert_load == 0, "float32")))
    if own.mtp is not None:
        values = (*own.mtp.losses, *own.mtp.accuracies)
        for metric, value in zip(model.mtp_metrics, values, strict=True):
            metric.update_state(value)
    if not training:
        return
    model.backbone.update_expert_bias()
    if own.mtp is not None and model.mtp_steps is not None:
        model.mtp_steps.assign_add(1)
    if own.mtp is not None and model.token_counts is not None:
        model.token_counts.add(labels)
