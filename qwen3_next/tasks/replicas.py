"""Models under `tf.distribute.MirroredStrategy`: what Keras leaves to them."""

from typing import Any

import keras

from qwen3_next.models.strategies import require_strategy_of, strategy_of
from qwen3_next.training.replicas_of_step import MEANS, adds_up_first


class Replicas:
    """A mixin of `keras.Model` for training and running on one or several replicas."""

    optimizer: Any

    def check_compilation(self, loss: Any, options: dict[str, Any]) -> None:
        """Raises `ValueError` for what `compile` cannot have under the strategy of the model."""
        require_strategy_of(self, "compile", outside=False)
        if strategy_of(self) is None:
            return
        if options.get("jit_compile") is True:
            raise ValueError(
                "XLA compiles for one device, not for all replicas of a strategy: leave "
                "`jit_compile` alone; the operations of a model are compiled by themselves. "
                "Received: jit_compile=True"
            )
        reduction = getattr(loss, "reduction", MEANS[0])
        if reduction not in (*MEANS, "sum"):
            raise ValueError(
                f"Replicas share a loss whose `reduction` is one of {(*MEANS, 'sum')}. "
                f"Received: loss={loss} with reduction={reduction!r}"
            )

    def adds_up_first(self) -> bool:
        """Whether a train step adds up gradients before the optimizer sees them."""
        return strategy_of(self) is not None and adds_up_first(self.optimizer)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras would take a batch off the data, which a generator does not give twice, and add up
        # the rows of replicas with different numbers of them.
        if iterator is not None and strategy_of(self) is not None:
            data_batch = _first_spec(iterator._get_iterator().element_spec)
            iterator = None
        super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)


def _first_spec(specs):
    """What one replica is given of a batch, as `tf.TensorSpec`."""
    import tensorflow as tf

    def of_one(spec):
        flat = tf.nest.flatten(spec, expand_composites=True)
        return flat[0] if isinstance(flat[0], tf.TensorSpec) else None

    return keras.tree.map_structure(of_one, specs)
