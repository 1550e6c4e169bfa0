"""Compute something only where it is needed."""

from collections.abc import Callable
from typing import Any

import keras

from ..tensor_types import Tensor

BACKEND = keras.backend.backend()


def when(predicate: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
    """`run()` where `predicate`, a `()` bool, holds, else `skip()`; the other one is not computed.

    Both return nests of the same structure, shapes and dtypes, and assign no variable. Where the
    predicate has a value already it is asked: the functions then run as if there were no choice.
    """
    if BACKEND == "jax":
        import jax

        if isinstance(predicate, jax.core.Tracer):
            return jax.lax.cond(predicate, run, skip)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        if tf.is_symbolic_tensor(predicate):
            return tf.cond(predicate, run, skip)
    return run() if bool(predicate) else skip()
