"""TensorFlow functions that are traced once per set of static shapes, and gradients for them.

TensorFlow keeps some things for as long as the process lives, among them every gradient that
`tf.custom_gradient` registers: one for each place of each graph that is traced, and with it the
graph. Here a gradient is registered once per op, and a program lives as long as the session.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import keras

from ..tensor_types import Tensor

_COLLECTION = "qwen3_next/programs"
_PROGRAMS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def program(
    function: Callable[..., Any], *args: Any, context: Hashable = None, **options: Any
) -> Callable[..., Any]:
    """`tf.function(function, **options)` for arguments of the static shapes of `args`.

    One for all shapes would reuse a trace of unknown dims for known ones, and return shapes that
    no longer fit those of the inputs. Programs are freed by `keras.utils.clear_session`, once the
    models of the session are gone.

    Args:
        function: Takes and returns nests of tensors; one that lives as long as the process.
        *args: Its arguments.
        context: Programs of different contexts have nothing in common.
        **options: For `tf.function`.
    """
    import tensorflow as tf

    key = function, context, *((x.dtype, *x.shape) for x in tf.nest.flatten(args))
    found = _PROGRAMS.get(key)
    if found is None:
        found = _PROGRAMS[key] = tf.function(function, autograph=False, **options)
        # TensorFlow counts those of all shapes as one function, and would warn of its traces.
        found._omit_frequent_tracing_warning = True
    # What `clear_session` replaces holds them. Threads have a default graph each, and share.
    graph = tf.compat.v1.get_default_graph()
    while hasattr(graph, "outer_graph"):
        graph = graph.outer_graph
    held = graph.get_collection_ref(_COLLECTION)
    if not held:
        held.append({})
    held[0][key] = found
    return found


def register_gradient(gradient: Callable[..., Any]) -> str:
    """The name under which `identity` finds `gradient(op, *cotangents)`."""
    import tensorflow as tf

    name = f"Qwen3NextGradient{next(_NUMBERS)}"
    tf.RegisterGradient(name)(gradient)
    return name


def identity(tensors: Sequence[Tensor], gradient: str) -> list[Tensor]:
    """`tensors`, by an operation with that gradient. Only within a `program`: a tape ignores it."""
    import tensorflow as tf

    with tf.compat.v1.get_default_graph().gradient_override_map({"IdentityN": gradient}):
        return tf.identity_n(tensors)


def one_replica() -> contextlib.AbstractContextManager:
    """Within it optimizers leave gradients as they are where there is but one replica.

    They would sum them over replicas, differentiably, by a `tf.custom_gradient` in the graph of
    the training step.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    if tf.distribute.has_strategy():
        return contextlib.nullcontext()

    class OneReplica(tf.distribute.ReplicaContext):
        def all_reduce(self, reduce_op, value, options=None):
            return value

    return OneReplica(tf.distribute.get_strategy(), 0)
