"""The rows of a batch on several devices, as `keras.distribution` spreads them.

Keras cuts a batch into equal shares for the devices along the data axis before it reaches a step,
and so has no place for a last batch that does not divide. In one process every device is therefore
given all rows, which are token ids and small, and the step takes the shares where they are equal;
what does not divide, every device computes whole. So all batches give what one device gives,
whatever the loss.

Several processes each bring rows of their own: the batch is all of them, process by process, and
their numbers must be equal and divide. Processes that hold one replica of the model together bring
the same rows.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from qwen3_next.config.validation import optional_integer, require, shown


@contextlib.contextmanager
def all_rows_everywhere() -> Iterator[None]:
    """Within it Keras gives all rows of a batch to every device of a single process."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.num_processes > 1:
        yield
        return
    mesh = distribution.device_mesh
    feeding = copy.copy(distribution)
    feeding.get_data_layout = lambda shape: keras.distribution.TensorLayout(
        [None] * len(shape), mesh
    )
    with feeding.scope():
        yield


def rows_by_device(nest: Any) -> Any:
    """Tensors of a step with their rows spread over the data axis, where these divide."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return nest
    axis, size = distribution.batch_dim_name, distribution.num_model_replicas

    def spread(x):
        if not getattr(x, "shape", ()) or x.shape[0] % size:
            return x
        axes = [axis] + [None] * (len(x.shape) - 1)
        layout = keras.distribution.TensorLayout(axes, distribution.device_mesh)
        return keras.distribution.distribute_tensor(x, layout)

    return keras.tree.map_structure(spread, nest)


def check_batch_size(x: Any, batch_size: int | None = None, steps: int | None = None) -> None:
    """Raises `ValueError` for a size that is none, and for arrays that make batches which the
    devices cannot share evenly.

    A last batch that is smaller may have any number of rows in a single process. Batches that come
    one by one, as from a generator, are not known here.

    Args:
        x: What a run is given.
        batch_size: Rows of a batch, in this process.
        steps: Number of batches, where there is no `batch_size`.
    """
    require(optional_integer(1), "batch_size", batch_size)
    distribution = keras.distribution.distribution()
    rows = _rows(x)
    if distribution is None or rows is None:
        return
    processes, replicas = distribution.num_processes, distribution.num_model_replicas
    batch_size = batch_size or (math.ceil(rows / steps) if steps else 32)
    parts = max(replicas // processes, 1)
    sizes = {batch_size} if rows >= batch_size else set()
    if processes > 1:
        _check_agreement(rows, batch_size)
        sizes |= {rows % batch_size}
    if any(size % parts for size in sizes):
        own = f" ({parts} in every process)" if processes > 1 else ""
        last = " and leave a last batch that is one, too" if processes > 1 else ""
        raise ValueError(
            f"`batch_size` must be a multiple of the {replicas} devices{own} along the axis "
            f"{distribution.batch_dim_name!r}{last}, such as "
            f"{math.ceil(min(batch_size, rows) / parts) * parts}. "
            f"Received: batch_size={shown(batch_size)}, with {rows} rows"
        )


def _check_agreement(rows, batch_size):
    """Raises `ValueError` in all processes where they would not take the same steps."""
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.array([rows, batch_size]))
    if (found != found[0]).any():
        raise ValueError(
            "Every process must bring as many rows as the others, and the same `batch_size`. "
            f"Received: rows={found[:, 0].tolist()}, batch_size={found[:, 1].tolist()}"
        )


@contextlib.contextmanager
def refused_by_all() -> Iterator[None]:
    """Within it what one process refuses stops all of them: none would take a step alone.

    Raises:
        ValueError: what this process or another has raised.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.num_processes == 1:
        yield
        return
    from jax.experimental import multihost_utils

    error = None
    try:
        yield
    except ValueError as caught:
        error = caught
    refused = multihost_utils.process_allgather(np.int32(error is not None))
    if error is not None:
        raise error
    if refused.any():
        raise ValueError(
            f"Other processes refused their data, see their errors: {np.flatnonzero(refused)}"
        )


def check_steps_at_once(steps_per_execution: int) -> None:
    """Raises `ValueError` for several batches at once, where every process has a part of each."""
    distribution = keras.distribution.distribution()
    if distribution is not None and distribution.num_processes > 1 and steps_per_execution > 1:
        raise ValueError(
            "`predict` in several processes takes one batch at a time: compile with "
            f"`steps_per_execution=1`. Received: {steps_per_execution=}"
        )


def brought_together(x: Any) -> Any:
    """One batch of the rows that every process brings; in a single process `x` as it is."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.num_processes == 1:
        return x
    import jax

    def join(rows):
        if rows is None:
            return None
        layout = distribution.get_data_layout(rows.shape).backend_layout
        return jax.make_array_from_process_local_data(layout, np.asarray(rows))

    return keras.tree.map_structure(join, x)


def own_rows(predict: Callable) -> Callable:
    """A function `predict(state, iterator) -> outputs, state` with the rows of this process."""

    def predict_own(state, iterator):
        outputs, state = predict(state, iterator)
        return keras.tree.map_structure(_own_rows, outputs), state

    return predict_own


def _own_rows(x):
    if x.is_fully_addressable:
        return x
    shares = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([shares[start] for start in sorted(shares)])


def _rows(x):
    """Rows of an array or a dict of arrays, `None` for what comes batch by batch."""
    if isinstance(x, dict):
        return _rows(x.get("token_ids"))
    shape = getattr(x, "shape", ())
    return shape[0] if shape else None
