"""A loop whose number of steps may be computed and which can be differentiated.

A program holds the step once, however often it runs, forward and backward.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from ..tensor_types import Tensor

BACKEND = keras.backend.backend()


def iterate(
    step: Callable[[Tensor, Any], Any],
    state: Any,
    count: int | Tensor,
    maximum: int,
    going: Callable[[Any], Tensor] | None = None,
) -> Any:
    """Runs `state = step(i, state)` for i = 0 .. count - 1, as long as `going(state)` holds.

    Args:
        step: `step(i, state) -> state`, i a `()` int32 tensor. It must not assign variables.
        state: Nest of tensors whose shapes and dtypes stay as they are.
        count: Number of steps, at most `maximum`; an integer or a `()` int32 tensor.
        maximum: Integer for which gradients make room.
        going: `going(state) -> ()` bool, asked before every step; `None` for always.

    Returns:
        The last state.
    """
    if BACKEND == "jax":
        return _jax(step, state, count, maximum, going)
    if BACKEND == "tensorflow":
        return _tensorflow(step, state, count, maximum, going)
    for i in range(int(count)):
        if going is not None and not bool(going(state)):
            break
        state = step(ops.convert_to_tensor(i, "int32"), state)
    return state


def _jax(step, state, count, maximum, going):
    import jax

    # A `while_loop` cannot be differentiated backwards: a scan skips the steps that are too many.
    always = isinstance(count, int) and going is None

    def body(state, i):
        if always:
            return step(i, state), None
        more = i < count
        if going is not None:
            more = more & going(state)
        return jax.lax.cond(more, step, lambda i, state: state, i, state), None

    numbers = ops.arange(count if always else maximum, dtype="int32")
    return jax.lax.scan(body, state, numbers)[0]


def _tensorflow(step, state, count, maximum, going):
    import tensorflow as tf

    def more(i, state):
        left = i < count
        return left if going is None else tf.logical_and(left, going(state))

    def body(i, state):
        return i + 1, step(i, state)

    # Without `maximum_iterations` XLA could not tell how much the backward pass has to keep.
    start = (tf.zeros((), "int32"), state)
    return tf.while_loop(more, body, start, maximum_iterations=maximum)[1]
