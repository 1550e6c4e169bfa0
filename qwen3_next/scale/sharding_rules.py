"""Which axes of a mesh split which dims of a weight.

The rows of the weight table name an axis for each dim of a weight (`embed`, `heads`, `experts`,
...). `CANDIDATES` says which axes of the mesh may split such a dim, the first that divide it are
taken; with FSDP what is left of the mesh splits the residual stream:

    weight (E, D, 2F) of experts, mesh data 2 x expert 4    -> ("expert", None, None)
    the same on a mesh expert 4 x tensor 2                  -> (("expert", "tensor"), None, None)
    the same with FSDP, mesh data 2 x expert 4              -> ("expert", "data", None)

Every other dim is whole on each device.
"""

import math
from typing import NamedTuple

from qwen3_next.models.weight_rows import Weight
from qwen3_next.scale.mesh_sizes import mesh_text

Axes = tuple[str | tuple[str, ...] | None, ...]

_TENSOR = (("tensor",),)
# An empty candidate at the end allows a dim that nothing divides to stay whole.
CANDIDATES: dict[str, tuple[tuple[str, ...], ...]] = {
    "vocab": _TENSOR,
    "heads": _TENSOR,
    "kv_heads": (*_TENSOR, ()),
    "linear_key_heads": _TENSOR,
    "linear_value_heads": _TENSOR,
    "mlp": _TENSOR,
    "experts": (("expert", "tensor"), ("expert",)),
}
FSDP = (("data", "expert"), ("data",), ("expert",), ())
WORDS = {"kv_heads": "key/value heads"}


class Sharding(NamedTuple):
    """How a weight is split.

    Attributes:
        axes: For each dim the axis of the mesh that splits it, a tuple of several, or `None`.
        reason: Why a device holds more than its share; empty where it does not.
    """

    axes: Axes
    reason: str = ""

    def parts(self, sizes: dict[str, int]) -> int:
        """Into how many different parts the weight is split."""
        return math.prod(sizes[name] for names in self.axes for name in _names(names))

    def text(self) -> str:
        """The axes in one word for each dim, `-` where it is whole."""
        return " ".join("+".join(_names(names)) or "-" for names in self.axes)


def sharding_of(weight: Weight, sizes: dict[str, int], fsdp: bool = False) -> Sharding:
    """How a weight is split over a mesh.

    Args:
        weight: A row of the weight table; its shape may be another variable's.
        sizes: The size of every axis of the mesh.
        fsdp: Whether the residual stream's dim of matrices is split over `data` and `expert` too,
            as far as the weight does not use them.

    Raises:
        ValueError: a dim that an axis of the mesh should split and does not divide.
    """
    chosen: list[tuple[str, ...]] = [() for _ in weight.shape]
    for dim, (axis, n) in enumerate(zip(weight.axes, weight.shape)):
        if axis in CANDIDATES:
            found = _first_dividing(CANDIDATES[axis], n, sizes, set())
            if found is None:
                raise ValueError(_does_not_divide(weight, axis, n, sizes))
            chosen[dim] = found
    if fsdp and _is_matrix(weight):
        for dim, (axis, n) in enumerate(zip(weight.axes, weight.shape)):
            if axis == "embed":
                used = {name for names in chosen for name in names}
                chosen[dim] = _first_dividing(FSDP, n, sizes, used) or ()
    axes = tuple(names[0] if len(names) == 1 else names or None for names in chosen)
    return Sharding(axes, _reason(weight, sizes, fsdp, chosen))


def _first_dividing(candidates, n, sizes, used):
    """The first candidate, without axes of size 1 or in use, that divides `n`; else `None`."""
    for candidate in candidates:
        names = tuple(name for name in candidate if sizes[name] > 1 and name not in used)
        if n % math.prod(sizes[name] for name in names) == 0:
            return names
    return None


def _is_matrix(weight):
    # A vector costs more to gather than to hold; a router's kernel is read whole by all devices.
    return sum(n > 1 for n in weight.shape) > 1 and "scores" not in weight.axes


def _reason(weight, sizes, fsdp, chosen):
    idle = {name for name, n in sizes.items() if n > 1} - {n for names in chosen for n in names}
    if not idle:
        return ""
    for axis, n in zip(weight.axes, weight.shape):
        if set(CANDIDATES.get(axis, ((),))[0]) & idle:  # it should have been split
            split = " x ".join(f"{name}={sizes[name]}" for name in CANDIDATES[axis][0])
            return f"{n} {WORDS.get(axis, axis)} do not divide over {split}"
    if any(chosen):
        return f"copies along {' and '.join(name for name in sizes if name in idle)}"
    if fsdp and "scores" in weight.axes:
        return "a router is read whole"
    if fsdp and not _is_matrix(weight):
        return "a vector"
    wanted = {name for axis in weight.axes for name in CANDIDATES.get(axis, ((),))[0]}
    return f"the mesh has no {' or '.join(sorted(wanted))}" if wanted else "no dim of it is split"


def _does_not_divide(weight, axis, n, sizes):
    return (
        f"`{weight.path}` cannot be split: its dim `{axis}` of {n} is not a multiple of the mesh's "
        f"{' x '.join(f'{name}={sizes[name]}' for name in CANDIDATES[axis][-1])}. "
        f"Received: mesh={mesh_text(sizes)!r}, shape={tuple(weight.shape)}"
    )


def _names(names):
    return () if names is None else (names,) if isinstance(names, str) else names
