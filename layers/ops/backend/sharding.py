"""Where the parts of a tensor stand on the devices of a `keras.distribution`, and sums over them.

A mesh has up to three axes of these names; `keras.distribution` exists on JAX alone.

    data      rows of a batch (whatever the distribution's `batch_dim_name` is)
    expert    routed experts; and rows of a batch, since whoever has few experts has few tokens too
    tensor    heads, vocabulary and the width of feed-forward networks; and experts, if they divide

    devices          those of the active distribution
    constrain        spreads the rows of a tensor over them, within a program or outside
    zeros            a tensor that is never whole on one of them
    on_shards        runs a function on the parts that every device has
    gather, all_sum, all_max, sum_parts, sum_rows, part_number    what such a function may ask of
                     the others
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from ..tensor_types import Tensor

BACKEND = keras.backend.backend()
EXPERT, TENSOR = "expert", "tensor"
Axes = tuple[str, ...]


class Devices(NamedTuple):
    """The devices of a distribution.

    Attributes:
        mesh: `jax.sharding.Mesh`.
        batch: Name of the axis over which rows come in.
        fsdp: Whether weights are spread over the axes of the rows, too.
    """

    mesh: Any
    batch: str
    fsdp: bool = False

    def size(self, axes: Axes) -> int:
        """Devices along these axes together."""
        return math.prod(self.mesh.shape[name] for name in axes)

    def rows(self, count: int) -> Axes:
        """Axes over which so many rows are spread."""
        return self._fitting((self.batch, EXPERT), count)

    def experts(self, count: int) -> Axes:
        """Axes over which so many experts are spread."""
        return self._fitting((EXPERT, TENSOR), count)

    def heads(self, count: int) -> Axes:
        """Axes over which so many heads, words or columns are spread."""
        return self._fitting((TENSOR,), count)

    def columns(self, count: int, used: Axes, rows: Axes) -> Axes:
        """Axes over which FSDP spreads so many columns of a weight that is spread over `used`.

        None, if there are not all of them among the axes of the `rows` that an op is given.
        """
        if not self.fsdp:
            return ()
        for names in ((self.batch, EXPERT), (self.batch,), (EXPERT,)):
            left = tuple(n for n in names if self.mesh.shape.get(n, 1) > 1 and n not in used)
            if count % self.size(left) == 0:
                return left if set(left) <= set(rows) else ()
        return ()

    def key_heads(self, heads: int, key_heads: int) -> int:
        """How many key heads to hold, so that every device has those of its query heads.

        Fewer key heads than devices are repeated, up to one per device: a device then holds one
        and not all of them.
        """
        parts = self.size(self.heads(heads))
        held = math.lcm(key_heads, parts)
        return held if heads % held == 0 else key_heads

    def _fitting(self, names: Axes, count: int) -> Axes:
        """The first of `names`, as many as divide `count`."""
        found: Axes = ()
        for name in names:
            if self.mesh.shape.get(name, 1) == 1 or name in found:
                continue
            if count % self.size((*found, name)):
                break
            found += (name,)
        return found


def devices() -> Devices | None:
    """Those of the active `keras.distribution`, `None` without one or with a single device."""
    if BACKEND != "jax":
        return None
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh.devices.size == 1:
        return None
    mesh, batch = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    return Devices(mesh, batch, getattr(distribution, "fsdp", False))


def spec(*axes: Axes) -> Any:
    """The `jax.sharding.PartitionSpec` with these mesh axes for each dim."""
    import jax

    return jax.sharding.PartitionSpec(*(names or None for names in axes))


def constrain(x: Annotated[Tensor, "B ..."]) -> Annotated[Tensor, "B ..."]:
    """`x` with its rows spread over the devices; as it is without any."""
    found = devices()
    if found is None or isinstance(x, keras.KerasTensor):
        return x
    import jax

    place = jax.sharding.NamedSharding(found.mesh, spec(found.rows(x.shape[0])))
    return keras.distribution.distribute_tensor(x, place)


def zeros(shape: Sequence[int], dtype: Any, heads: int, count: int) -> Tensor:
    """Zeros `(B, ...)`, spread by row and head, without ever being whole on one device.

    Args:
        shape: Their shape.
        dtype: Their dtype.
        heads: The dim of heads.
        count: How many heads that dim holds; each may have several places.
    """
    found = devices()
    if found is None:
        return ops.zeros(shape, dtype)
    import jax

    axes: list[Axes] = [()] * len(shape)
    axes[0], axes[heads] = found.rows(shape[0]), found.heads(count)
    place = jax.sharding.NamedSharding(found.mesh, spec(*axes))
    return jax.numpy.zeros(shape, dtype, device=place)


def on_shards(function: Callable[..., Any], mesh: Any, inputs: Any, outputs: Any) -> Callable:
    """`function` of whole tensors, run by every device on its own parts of them.

    Not meant to be differentiated: an op brings its backward pass, and says what is summed.

    Args:
        function: Takes tensors and returns nests of them.
        mesh: `jax.sharding.Mesh`.
        inputs: A `spec` for each argument, or nests of them.
        outputs: The same for the results; along axes that a spec leaves out, all devices must have
            come to the same result.
    """
    import jax

    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def part_number(axes: Axes) -> Tensor | int:
    """Which of the parts along these axes a device has."""
    if not axes:
        return 0
    import jax

    return jax.lax.axis_index(axes)


def gather(x: Tensor, axes: Axes, dim: int = 0) -> Tensor:
    """All parts, one behind the other along `dim`."""
    if not axes:
        return x
    import jax

    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)


def all_sum(x: Tensor, axes: Axes) -> Tensor:
    """The sum of what all devices along these axes have."""
    if not axes:
        return x
    import jax

    return jax.lax.psum(x, axes)


def all_max(x: Tensor, axes: Axes) -> Tensor:
    """The largest of what the devices along these axes have."""
    if not axes:
        return x
    import jax

    return jax.lax.pmax(x, axes)


def sum_parts(x: Tensor, axes: Axes, dim: int = 0) -> Tensor:
    """A device's own part of the sum: undoes `gather` for what was made from what it gave."""
    if not axes:
        return x
    import jax

    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def sum_rows(x: Tensor, rows: Axes, columns: Axes, dim: int) -> Tensor:
    """The gradient of a weight from those of all rows, spread as the weight is along `dim`."""
    copies = tuple(name for name in rows if name not in columns)
    return all_sum(sum_parts(x, columns, dim), copies)
