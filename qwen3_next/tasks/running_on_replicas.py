"""Models under `tf.distribute.MirroredStrategy`: what Keras leaves to them."""

from typing import Any

import keras
import numpy as np

from qwen3_next.config.validation import require
from qwen3_next.models.strategies import require_strategy_of, strategy_of
from qwen3_next.tasks.checked_data import STEPS_AT_ONCE
from qwen3_next.training.replicas_of_step import MEANS, adds_up_first


class Replicas(keras.Model):
    """A part of a model: training and running on one or several replicas."""

    backbone: Any

    def check_compilation(self, loss: Any, options: dict[str, Any]) -> None:
        """Raises `ValueError` for what `compile` cannot have, also under a strategy."""
        require(STEPS_AT_ONCE, "steps_per_execution", options.get("steps_per_execution", 1))
        for model in (self, self.backbone):  # one may be shared with another model
            require_strategy_of(model, "compile", outside=False)
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

    def check_optimizer(self) -> None:
        """Raises `ValueError` for an optimizer that does not work on replicas."""
        if strategy_of(self) is None:
            return
        frequency = getattr(self.optimizer, "ema_overwrite_frequency", None)
        if getattr(self.optimizer, "use_ema", False) and (frequency or self.adds_up_first()):
            raise ValueError(
                "On replicas `use_ema` goes without `ema_overwrite_frequency`, clipping and "
                f"gradient accumulation. Received: {self.optimizer.get_config()}"
            )
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "A `LossScaleOptimizer` tells by the gradients of the first replica whether those "
                "of all are finite. Take 'bfloat16' or 'mixed_bfloat16', which need no scale. "
                f"Received: a {self.dtype_policy.name} model with a LossScaleOptimizer"
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

    def _make_function(self, *args, **kwargs):
        function = super()._make_function(*args, **kwargs)
        strategy = strategy_of(self)
        if strategy is None:
            return function
        import tensorflow as tf

        def divided(data):
            if isinstance(data, tf.data.Iterator | tf.distribute.DistributedIterator):
                return function(data)
            logs = function(divided_rows(strategy, batch) for batch in data)
            return self._get_metrics_result_or_logs(logs)  # not the mean of those of replicas

        return divided

    def predict_on_batch(self, x):
        strategy = strategy_of(self)
        return super().predict_on_batch(x if strategy is None else divided_rows(strategy, x))


def divided_rows(strategy: Any, batch: Any) -> Any:
    """A batch of arrays with a part of its rows for each replica, where Keras would give all of
    them to everyone; the last ones may get fewer."""
    count = strategy.num_replicas_in_sync
    arrays = [None if x is None else np.asarray(x) for x in keras.tree.flatten(batch)]
    parts = [None if x is None else np.array_split(x, count) for x in arrays]

    def part(context):
        number = context.replica_id_in_sync_group
        flat = [None if x is None else keras.ops.convert_to_tensor(x[number]) for x in parts]
        return keras.tree.pack_sequence_as(batch, flat)

    with strategy.scope():
        return strategy.experimental_distribute_values_from_function(part)


def _first_spec(specs):
    """What one replica is given of a batch, as `tf.TensorSpec`."""
    import tensorflow as tf

    def of_one(spec):
        flat = tf.nest.flatten(spec, expand_composites=True)
        return flat[0] if isinstance(flat[0], tf.TensorSpec) else None

    return keras.tree.map_structure(of_one, specs)
