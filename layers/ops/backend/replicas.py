"""Sums over the replicas of `tf.distribute.MirroredStrategy`, on TensorFlow.

Every replica runs the step on its rows of the batch, and the optimizer adds up their gradients. So
that a batch on several replicas trains as it does on one, whatever is divided by a number of tokens
is summed over the replicas before: then every replica knows the loss L of the whole batch, hands
its share L / N on, and the gradients of the shares add up to that of L.

Everywhere else there is one replica, and sums over it are what they were.
"""

import contextlib
from typing import Any

import keras

from ..tensor_types import Tensor


def replica_count() -> int:
    """Replicas N that run this step side by side; 1 outside of a step of theirs."""
    context = _replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def sum_over_replicas(tensors: Any) -> Any:
    """The sum of every tensor of a nest over the replicas; to be called by all of them.

        y = sum over r of x_r        dL / dx_r = sum over replicas of dL / dy

    The replicas must go on alike from here, so that dL / dy is the same on all of them: its sum is
    then N times their own, which takes no second exchange.

    Not within a loop, a branch or a function that is compiled by itself, where TensorFlow lets
    replicas exchange nothing; nor within the call of a model, as it is the turn of the next replica
    with every exchange, and what a call leaves in the model, such as `add_loss`, is there for all.

    Args:
        tensors: Nest of tensors of one dtype, of the same shapes on every replica.
    """
    context, flat = _replica_context(), keras.tree.flatten(tensors)
    if context is None or not flat:
        return tensors
    import tensorflow as tf

    fixed = [tf.stop_gradient(x) for x in flat]
    sums = context.all_reduce(tf.distribute.ReduceOp.SUM, fixed)
    count = context.num_replicas_in_sync
    found = [total + count * (x - own) for total, x, own in zip(sums, flat, fixed, strict=True)]
    return keras.tree.pack_sequence_as(tensors, found)


def share_of_replica(loss: Tensor) -> Tensor:
    """`loss / N`: what a replica hands on of a loss that all of them have computed."""
    count = replica_count()
    return loss if count == 1 else loss / count


def already_summed() -> contextlib.AbstractContextManager:
    """Within it, on a replica, an optimizer takes gradients for sums over replicas."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()

    class AlreadySummed(type(context)):  # type: ignore[misc]
        def all_reduce(self, reduce_op, value, options=None):
            return value

    return AlreadySummed(context.strategy, context.replica_id_in_sync_group)


def _replica_context():
    """The context of TensorFlow where several replicas run this, else `None`."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return None if context is None or context.num_replicas_in_sync == 1 else context
