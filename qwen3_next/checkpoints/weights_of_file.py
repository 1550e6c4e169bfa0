"""Whether a `.weights.h5` file of Keras holds the weights of a model, before one is read.

Keras reads what it finds for each layer, so that it takes a file of more layers or of an untied
head without a word, and notices what is missing when half of the model is already replaced.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import keras

from qwen3_next.models.token_counts import TokenCounts

# Not of the model, or not in all files of it.
_LEFT_OUT = ("optimizer", "seed_generator", "token_counts")


def require_weights_of(model: keras.Model, filepath: str | Path) -> None:
    """Raises `ValueError` for a file whose arrays are not as many and as large as the model's."""
    found, expected = Counter(_shapes_in(filepath)), Counter(_shapes_of(model))
    if found != expected:
        more, fewer = (sorted((a - b).elements())[:5] for a, b in _both_ways(found, expected))
        raise ValueError(
            "`filepath` must hold the weights of this model, no others. Received: filepath="
            f"{str(filepath)!r} with {found.total()} arrays for {expected.total()} weights; too "
            f"many are of shapes such as {more}, missing are {fewer}"
        )


def _both_ways(found, expected):
    return (found, expected), (expected, found)


def _shapes_in(filepath):
    import h5py

    shapes: list[tuple[int, ...]] = []

    def visit(place, item):
        if isinstance(item, h5py.Dataset) and not any(n in _LEFT_OUT for n in place.split("/")):
            shapes.append(item.shape)

    with h5py.File(filepath) as file:
        file.visititems(visit)
    return shapes


def _shapes_of(model):
    for layer in model._flatten_layers():
        if not isinstance(layer, TokenCounts):
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            yield from (tuple(value.shape) for value in store.values())
