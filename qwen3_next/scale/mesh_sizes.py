"""Meshes of devices as text and as sizes.

A mesh has up to three axes, in this order:

    data     rows of the batch; every device along it holds the same weights, but for FSDP
    expert   routed experts; rows of the batch as well
    tensor   heads, the inner dims of feed-forward networks, the vocabulary
"""

import math
import re
from typing import Any

import keras

MESH_AXES = ("data", "expert", "tensor")
_KNOWN = f"axes of a mesh are {', '.join(MESH_AXES)}"
_TEXT = 'text such as "data=2,expert=4"'


def sizes_of(mesh: Any) -> dict[str, int]:
    """The size of every axis of `MESH_AXES`, 1 where the mesh does not have it.

    Args:
        mesh: Text such as `"data=2,expert=4"`, or a `keras.distribution.DeviceMesh`.

    Raises:
        ValueError: text that cannot be read, an axis that is unknown or named twice, or a size
            that is not a positive integer.
    """
    if isinstance(mesh, keras.distribution.DeviceMesh):
        pairs = list(zip(mesh.axis_names, mesh.shape))
    elif isinstance(mesh, str):
        pairs = [_pair(mesh, part) for part in mesh.split(",")]
    else:
        raise ValueError(f"`mesh` must be {_TEXT}, or a DeviceMesh. Received: {mesh=}")
    names = [name for name, _ in pairs]
    unknown = [name for name in names if name not in MESH_AXES]
    if unknown:
        raise ValueError(f"`mesh` has unknown axes: {_KNOWN}. Received: {mesh=} with {unknown}")
    if len(names) > len(set(names)):
        raise ValueError(f"`mesh` must name every axis once. Received: {mesh=}")
    return {**dict.fromkeys(MESH_AXES, 1), **dict(pairs)}


def devices_in(sizes: dict[str, int]) -> int:
    """How many devices a mesh has."""
    return math.prod(sizes.values())


def mesh_text(sizes: dict[str, int]) -> str:
    """The text of a mesh, without axes of size 1."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "data=1"


def _pair(mesh, part):
    found = re.fullmatch(r"\s*(\w+)\s*=\s*([^\s=]+)\s*", part)
    if found is None:
        raise ValueError(f"`mesh` must be {_TEXT}. Received: {mesh=}")
    name, size = found.groups()
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", size):
        raise ValueError(f"Sizes of `mesh` must be positive integers. Received: {mesh=}")
    return name, int(size)
