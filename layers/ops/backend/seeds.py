"""Random numbers from a seed tensor, where a `SeedGenerator` would have to assign its state."""

import keras

from ..tensor_types import Tensor


class DrawnSeed(keras.random.SeedGenerator):
    """Hands out one seed that was drawn before.

    `keras.random` takes an integer or a generator. Inside a rematerialised function or a compiled
    loop a generator's state must not be assigned, so its seed is drawn outside and passed in.
    """

    def __init__(self, seed: Tensor) -> None:
        # No state of its own: the parent would create a variable.
        self._seed = seed

    def next(self, ordered: bool = True) -> Tensor:
        return self._seed
