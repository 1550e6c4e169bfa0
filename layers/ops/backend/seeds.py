"""Random numbers from a seed tensor, where a `SeedGenerator` would have to assign its state."""

from typing import Any

import keras
from keras import ops

from ..tensor_types import Tensor


class DrawnSeed(keras.random.SeedGenerator):
    """Hands out one seed that was drawn before.

    `keras.random` takes an integer or a generator. Inside a rematerialised function or a compiled
    loop a generator's state must not be assigned, so its seed is drawn outside and passed in.
    """

    def __init__(self, seed: Tensor) -> None:
        # No state of its own: the parent would create a variable.
        self._seed = seed
        self._initial_seed = seed  # torch leaves a generator without one unused

    def next(self, ordered: bool = True) -> Tensor:
        return self._seed


def folded(seeds: Any, number: int | Tensor) -> Any:
    """Other seeds for every number, those given for 0; `None` stays what it is."""
    # A generator counts up the second half of its seeds: the first tells the numbers apart.
    shift = ops.stack([ops.cast(number, "uint32") * 7919, ops.zeros((), "uint32")])

    def fold(seed: Tensor | None) -> Tensor | None:
        return None if seed is None else ops.cast(seed, "uint32") + shift

    return keras.tree.map_structure(fold, seeds)
