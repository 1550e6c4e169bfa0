"""Metrics as `compile` takes them, on logits: what Keras takes for probabilities by default.

Names, functions and classes of Keras are made for logits. An object that takes probabilities is
refused, as a loss is: whoever holds it reads its result.
"""

import inspect
from typing import Any

import keras

from qwen3_next.config.validation import shown

_ACCURACY = ("accuracy", "acc")


def metrics_from_logits(metrics: Any, loss: Any, outputs: int) -> Any:
    """The metrics that a list of them means for a model of logits, in the same nest.

    Thresholds are at 0 where the loss takes logits; the outputs of a regression are no logits.

    Raises:
        ValueError: a metric that takes its predictions for probabilities.
    """
    has_logits = getattr(loss, "from_logits", False)

    def on_logits(metric):
        named = metric.__name__ if inspect.isfunction(metric) else metric
        name = named if isinstance(named, str) else None
        if name in _ACCURACY:
            by_threshold = has_logits and outputs == 1
            return keras.metrics.BinaryAccuracy(name, threshold=0.0) if by_threshold else metric
        cls = _class_of(metric, name)
        options = {} if cls is None else _options_of(cls, has_logits)
        if options:
            return cls(**options, **({} if name is None else {"name": name}))
        if _takes_probabilities(metric, has_logits) or cls is keras.metrics.KLDivergence:
            raise ValueError(
                "The model returns logits, and metrics must take these: give a metric by name, "
                "with `from_logits=True` or with a threshold of 0, where it has one. "
                f"Received: metrics={shown(metrics)}"
            )
        return metric

    return metrics if metrics is None else keras.tree.map_structure(on_logits, metrics)


def _class_of(metric, name):
    """The class of Keras that a name, a function or a class means, or `None`."""
    if inspect.isclass(metric):
        return metric if metric in vars(keras.metrics).values() else None
    if inspect.isfunction(metric) and getattr(keras.metrics, name, None) is not metric:
        return None
    try:
        found = None if name is None else keras.metrics.get(name)
    except ValueError:  # no metric: Keras says so
        return None
    return type(found) if isinstance(found, keras.metrics.Metric) else None


def _options_of(cls, has_logits):
    """What makes a metric of this class one of logits."""
    parameters = inspect.signature(cls).parameters
    if "from_logits" in parameters:
        return {"from_logits": True}
    if has_logits and "thresholds" in parameters:
        return {"thresholds": 0.0}
    if has_logits and "threshold" in parameters and parameters["threshold"].default is not None:
        return {"threshold": 0.0}
    return {}


def _takes_probabilities(metric, has_logits):
    """Whether an object of a class of Keras takes its predictions for probabilities."""
    if type(metric) not in vars(keras.metrics).values():
        return False
    from_logits = metric.get_config().get("from_logits")
    if from_logits is not None:
        return not from_logits
    if isinstance(metric, keras.metrics.KLDivergence):
        return True
    thresholds = getattr(metric, "thresholds", None) or [getattr(metric, "threshold", None)]
    return has_logits and any(value is not None and 0 < value < 1 for value in thresholds)
