"""Which strategies of `tf.distribute` a model may be built, compiled and run under."""

from typing import Any

import keras


def require_mirrored_strategy(model: str) -> None:
    """Raises `ValueError` within the scope of a strategy of TensorFlow that is not supported.

    Args:
        model: What is built, as the error names it.
    """
    strategy = active_strategy()
    if strategy is None:
        return
    import tensorflow as tf

    if type(strategy) is not tf.distribute.MirroredStrategy:
        raise ValueError(
            f"{model} trains on TensorFlow under `tf.distribute.MirroredStrategy` alone, one "
            "process with a copy of the model per device. For anything else use JAX and "
            f"`keras.distribution`. Received: the scope of a {type(strategy).__name__}"
        )


def strategy_of(model: Any) -> Any:
    """The strategy in whose scope a model was built, or `None`."""
    return getattr(model, "_distribute_strategy", None)


def require_strategy_of(model: keras.Model, doing: str, outside: bool = True) -> None:
    """Raises `ValueError` within the scope of another strategy than the model was built in.

    Args:
        model: A model that is built.
        doing: What is done with it, as the error names it.
        outside: Whether it may also be done outside of every scope.
    """
    built, here = strategy_of(model), active_strategy()
    if here is not built and not (outside and here is None):
        raise ValueError(
            f"A model is built and compiled within the same `strategy.scope()`, and does not run "
            f"within another. Received: `{doing}` under {_name(here)}, of a model built under "
            f"{_name(built)}"
        )


def require_no_strategy(doing: str, *models: Any) -> None:
    """Raises `ValueError` within a scope, or for models that were built in one.

    Args:
        doing: What is done, as the error names it.
        *models: What it is done with.
    """
    found = [active_strategy(), *(strategy_of(model) for model in models)]
    strategy = next((one for one in found if one is not None), None)
    if strategy is not None:
        raise ValueError(
            f"{doing} trains on one replica: build it and its models outside of every "
            f"`strategy.scope()`. Received: {_name(strategy)}"
        )


def _name(strategy):
    return "no strategy" if strategy is None else type(strategy).__name__


def active_strategy() -> Any:
    """The strategy of `tf.distribute` whose scope this is, or `None`."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
