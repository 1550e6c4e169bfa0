"""Mean cross-entropies over the labels that count."""

from typing import Annotated, Any

from keras import ops

from qwen3_next.layers.ops import linear_cross_entropy
from qwen3_next.layers.ops.backend.replicas import replica_count, sum_over_replicas
from qwen3_next.layers.ops.cross_entropy import IGNORE
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.training.replicas_of_step import MEANS


def masked_mean(
    values: Annotated[Tensor, "B T"],
    labels: Annotated[Tensor, "B T"],
    sample_weight: Tensor | None = None,
) -> Annotated[Tensor, ""]:
    """Sum of the values, each times its sample weight, over the number of labels that count.

    Args:
        values: `(B, T)` float32, 0 where the label is -100.
        labels: `(B, T)` int32.
        sample_weight: `(B,)` or `(B, T)`, or `None` for ones.
    """
    if sample_weight is not None:
        values = values * per_token(sample_weight)
    count = ops.sum(ops.cast(labels != IGNORE, "float32"))
    return mean_of_sums(ops.sum(values), count)


def mean_of_sums(total: Annotated[Tensor, ""], count: Annotated[Tensor, ""]) -> Tensor:
    """`total / max(count, 1)`, both summed over the replicas of the batch."""
    total, count = sum_over_replicas((total, count))
    return total / ops.maximum(count, 1.0)


def fused_losses(
    hidden: Annotated[Tensor, "B T D"],
    kernel: Annotated[Tensor, "D V"],
    labels: Annotated[Tensor, "B T"],
) -> tuple[Annotated[Tensor, "B T"], Annotated[Tensor, "B T"]]:
    """Cross-entropies and hits (1 where the largest logit is the label's), without all logits."""
    flat, labels_of_rows = ops.reshape(hidden, (-1, hidden.shape[-1])), ops.reshape(labels, (-1,))
    found = linear_cross_entropy(
        flat, kernel, labels_of_rows, keep_logits=False, return_correct=True
    )
    losses, hits = (ops.reshape(x, ops.shape(labels)) for x in found)
    return losses, hits


def label_weight(labels: Annotated[Tensor, "B T"], sample_weight: Tensor | None) -> Tensor:
    """The sample weights with 0 at ignored labels."""
    weight = ops.cast(labels != IGNORE, "float32")
    return weight if sample_weight is None else weight * per_token(sample_weight)


def weight_on_replica(
    loss: Any, labels: Annotated[Tensor, "B T"], sample_weight: Tensor | None
) -> Annotated[Tensor, "B T"] | None:
    """Sample weights with which Keras' share of a mean is that of the mean over the batch.

    Args:
        loss: What `compile` was given.
        labels: `(B, T)` int32 of the replica, -100 where ignored.
        sample_weight: `(B,)` or `(B, T)`, or `None` for ones.
    """
    weight = None if sample_weight is None else label_weight(labels, sample_weight)
    if replica_count() == 1 or getattr(loss, "reduction", MEANS[0]) not in MEANS:
        return weight
    own = counted_labels(loss, labels)
    factor = own * replica_count() / ops.maximum(sum_over_replicas(own), 1.0)
    return factor * label_weight(labels, sample_weight)


def counted_labels(loss: Any, labels: Annotated[Tensor, "B T"]) -> Annotated[Tensor, ""]:
    """How many labels count for a loss of Keras."""
    ignored = getattr(loss, "ignore_class", None)
    counts = labels != IGNORE if ignored is None else (labels != IGNORE) & (labels != ignored)
    return ops.sum(ops.cast(counts, "float32"))


def weight_of_loss(
    loss: Any, labels: Annotated[Tensor, "B T"], sample_weight: Tensor | None
) -> Annotated[Tensor, ""] | None:
    """What the loss of a batch was divided by, or `None` where it is no mean."""
    reduction = getattr(loss, "reduction", MEANS[0])
    if reduction == "mean_with_sample_weight":
        return ops.sum(label_weight(labels, sample_weight))
    return counted_labels(loss, labels) if reduction in MEANS else None


def per_token(sample_weight: Tensor) -> Tensor:
    """Weights of rows `(B,)` as `(B, 1)`, weights of tokens as they are."""
    sample_weight = ops.cast(sample_weight, "float32")
    return sample_weight[:, None] if len(sample_weight.shape) == 1 else sample_weight
