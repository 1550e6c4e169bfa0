"""A step on several replicas: the losses of Keras, the optimizer, and what it takes to agree.

Keras divides the mean over a replica's rows by the number of replicas. Where replicas have
different numbers of rows, as in the last batch of an epoch, that is another mean than the one over
the batch. And it lets every replica clip or accumulate the gradients of its own rows.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from qwen3_next.layers.ops.backend.replicas import (
    already_summed,
    replica_count,
    sum_over_replicas,
)
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
    """Whether an optimizer needs the gradients of the whole batch: it clips or accumulates them."""
    names = ("clipnorm", "global_clipnorm", "clipvalue", "gradient_accumulation_steps")
    return any(getattr(optimizer, name, None) for name in names)


def apply_sums(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Lets an optimizer of TensorFlow update by the sums of the gradients over replicas."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    pairs = [pair for pair in zip(gradients, variables, strict=True) if pair[0] is not None]
    given, variables = [g for g, _ in pairs], [v for _, v in pairs]
    sums = context.all_reduce(tf.distribute.ReduceOp.SUM, given)
    if optimizer.gradient_accumulation_steps:
        context.merge_call(_accumulate, args=(sums, optimizer, variables))
        optimizer._iterations.assign_add(1)
    else:
        with already_summed():
            optimizer.apply(sums, variables)


def _accumulate(strategy, gradients, optimizer, variables):
    """What Keras does on one replica, but with the branch around the replicas: within one of
    theirs they could not exchange anything."""
    steps = optimizer.gradient_accumulation_steps
    totals = [optimizer._accumulated_gradients[optimizer._get_variable_index(v)] for v in variables]

    def update(gradients):
        scale = steps * (optimizer.loss_scale_factor or 1.0)
        means = [(g + total) / scale for g, total in zip(gradients, totals, strict=True)]
        means = optimizer._clip_gradients(means)
        optimizer._apply_weight_decay(variables)
        with already_summed():
            optimizer._backend_update_step(means, variables, optimizer.learning_rate)
        optimizer._backend_reset_gradient_accumulators()

    def add(gradients):
        for gradient, total in zip(gradients, totals, strict=True):
            total.assign_add(gradient)

    def on_replicas(function):
        return lambda: strategy.extended.call_for_each_replica(function, args=(gradients,))

    due = ops.equal((optimizer._iterations + 1) % steps, 0)
    ops.cond(due, on_replicas(update), on_replicas(add))


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
