"""A step on several replicas: the losses of Keras, the optimizer, and what it takes to agree.

Keras divides the mean over a replica's rows by the number of replicas. Where replicas have
different numbers of rows, as in the last batch of an epoch, that is another mean than the one over
the batch. And it lets every replica clip or accumulate the gradients of its own rows.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from qwen3_next.layers.ops.backend.replicas import replica_count, sum_over_replicas
from qwen3_next.layers.ops.tensor_types import Tensor

MEANS = ("sum_over_batch_size", "mean")


def weight_of_rows(loss: Any, rows: Tensor, sample_weight: Tensor | None) -> Tensor | None:
    """Sample weights with which Keras' share of a mean is that of the mean over the batch.

    Args:
        loss: What `compile` was given.
        rows: Any tensor with an entry per row of the replica.
        sample_weight: `(B,)` or `(B, T)`, or `None`.
    """
    count = replica_count()
    if count == 1 or getattr(loss, "reduction", "mean") not in MEANS:
        return sample_weight
    own = ops.cast(ops.shape(rows)[0], "float32")
    factor = own * count / sum_over_replicas(own)
    if sample_weight is None:
        return factor * ops.ones((ops.shape(rows)[0],), "float32")
    return factor * ops.cast(sample_weight, "float32")


def adds_up_first(optimizer: Any) -> bool:
    """Whether an optimizer does something to gradients, or now and then, beyond one update.

    Replicas would clip their own gradients before they are added up, and cannot exchange anything
    within a branch.
    """
    names = ("clipnorm", "global_clipnorm", "clipvalue", "gradient_accumulation_steps", "use_ema")
    return any(getattr(optimizer, name, None) for name in names)


def apply_sums(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Lets an optimizer of TensorFlow update once for all replicas, by the sums of gradients."""
    import tensorflow as tf

    def apply_once(strategy, gradients):
        first = strategy.extended.worker_devices[0]
        given = [g for g in gradients if g is not None]
        pairs = [(g, first) for g in given]
        sums = iter(strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, pairs))
        whole = [None if g is None else next(sums) for g in gradients]
        optimizer.apply(whole, variables)

    tf.distribute.get_replica_context().merge_call(apply_once, args=(gradients,))


def train_on_replica(model: keras.Model, data: Any) -> dict[str, Any]:
    """Keras' train step, with the gradients of all replicas added up before the optimizer."""
    import tensorflow as tf

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        loss = model.compute_loss(x, y, y_pred, sample_weight, training=True)
        scaled = model.optimizer.scale_loss(loss)
    rows = tf.shape(keras.tree.flatten(x)[0])[0]
    model._loss_tracker.update_state(loss * replica_count(), sample_weight=rows)
    variables = model.trainable_weights
    apply_sums(model.optimizer, tape.gradient(scaled, variables), variables)
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
