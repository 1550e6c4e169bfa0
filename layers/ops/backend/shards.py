"""Arrays that lie in shards on several devices, of one process or of several.

    in_shards(values, sharding)     host array -> array of which every device holds its own slices
    set_values(variable, values)    the same, for a variable that has values already
    whole_array(variable)           variable -> host array, gathered where others hold a share
    is_shared(variables)            whether other processes hold a share of them
    is_first_process()              whether this process is the one that writes

JAX puts an array whole on one device before it divides it, and compares what all processes give
it. Here a device is sent nothing but its slices, and a process looks at its own devices alone.
"""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from ..tensor_types import Tensor


def in_shards(values: np.ndarray, sharding: Any) -> Tensor:
    """A JAX array with the values of a host array, which is the same in every process."""
    import jax

    def slices(index):
        return np.ascontiguousarray(values[index])

    return jax.make_array_from_callback(values.shape, sharding, slices)


def initial_sharding(layout: Any) -> Any:
    """The sharding over devices that Keras means with the `layout` it gives to an initializer."""
    import jax

    # Keras names the axes alone, of a mesh without devices.
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    return jax.sharding.NamedSharding(mesh, layout.spec)


def set_values(variable: keras.Variable, values: np.ndarray) -> None:
    """Assigns a host array to a variable, whose devices each take their slices of it."""
    if keras.backend.backend() == "jax":
        sharding = variable.value.sharding
        if len(sharding.device_set) > 1 and values.shape == tuple(variable.shape):
            values = in_shards(values.astype(variable.dtype, copy=False), sharding)
    variable.assign(values)


def whole_array(variable: keras.Variable) -> np.ndarray:
    """The values of a variable on the host.

    Where other processes hold a share of it, all must call this for the same variables in the same
    order; every device then holds the whole of this one for a moment.
    """
    value = variable.value
    if not is_shared([variable]):
        return ops.convert_to_numpy(value)
    import jax

    if not value.is_fully_replicated:
        replicated = value.sharding.update(spec=jax.sharding.PartitionSpec())
        value = jax.jit(_same, out_shardings=replicated)(value)
    return np.asarray(value.addressable_data(0))


def is_shared(variables: Iterable[keras.Variable]) -> bool:
    """Whether other processes hold a share of some of the variables, or a copy."""
    if keras.backend.backend() != "jax":
        return False
    return any(not variable.value.is_fully_addressable for variable in variables)


def is_first_process() -> bool:
    """Whether this process is the first of those that hold a model together."""
    import jax

    return jax.process_index() == 0


def told_by_first(flag: bool) -> bool:
    """What the first process says, once all processes have come here."""
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def _same(x):
    return x
