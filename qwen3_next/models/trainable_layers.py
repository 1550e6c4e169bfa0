"""Which layers of a model learn, as its configuration keeps it.

    {"/model": False, "/model/layers_0": True}    all of the backbone is frozen but its first layer

A layer stands there, under the names of the layers that lead to it, where it differs from the
layer that holds it. The model itself is `""`, and differs where it does not learn.
"""

from collections.abc import Iterator
from typing import Any

import keras

FIELD = "trainable_by_layer"


def trainable_by_layer(model: keras.Model) -> dict[str, bool]:
    """The layers that differ in `trainable` from the layer that holds them."""
    flags = {path: layer.trainable for path, layer in _layers(model)}
    return {path: flag for path, flag in flags.items() if flag != _inherited(flags, path)}


def set_trainable_by_layer(model: keras.Model, saved: Any) -> None:
    """Sets `trainable` of every layer to what `trainable_by_layer` found.

    Raises:
        ValueError: no dict of bools, or a layer that the model has not.
    """
    layers = dict(_layers(model))
    fits = isinstance(saved, dict) and set(saved) <= set(layers)
    if not fits or not all(isinstance(flag, bool) for flag in saved.values()):
        raise ValueError(
            f"`{FIELD}` must map paths of layers to bools. Received: {FIELD}={saved!r}"
        )
    flags: dict[str, bool] = {}
    for path, layer in layers.items():  # from above, as each sets all that it holds
        flags[path] = saved.get(path, _inherited(flags, path))
        layer.trainable = flags[path]


def set_trainable_like(model: keras.Model, other: keras.Model) -> None:
    """Sets `trainable` of every layer to that of the layer of the same path in another model."""
    saved, known = trainable_by_layer(other), dict(_layers(model))
    set_trainable_by_layer(model, {path: saved[path] for path in saved if path in known})


def _layers(layer: keras.layers.Layer, path: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """Every layer with weights, and the names that lead to it; what holds others comes first."""
    yield path, layer
    for child in layer._layers:
        if child.weights:
            yield from _layers(child, f"{path}/{child.name}")


def _inherited(flags: dict[str, bool], path: str) -> bool:
    return flags[path.rpartition("/")[0]] if path else True
