"""One line that spreads models over the devices at hand."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from qwen3_next.config.validation import BOOLEAN, Rule, is_list_of, require, shown
from qwen3_next.scale.layouts import MeshLayout, require_jax, sharding_at
from qwen3_next.scale.mesh_sizes import MESH_AXES, devices_in, sizes_of
from qwen3_next.scale.sharding_rules import Axes

_TEXT = Rule('text such as "data=2,expert=4"', lambda value: isinstance(value, str))
_LAYOUTS = Rule(
    "None or a dict from regular expressions to axes",
    lambda value: value is None or isinstance(value, Mapping),
)
SIMULATED = "XLA_FLAGS=--xla_force_host_platform_device_count"


class WeightTableParallel(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` for models that are not known yet.

    A variable's layout follows from its path and its shape when it is made, by the rules of
    `layout_map`. What is no weight of a model is whole on each device if it is small.

    Args:
        layout_map: Layouts that go before the rules, as `keras.distribution.LayoutMap`.
        fsdp: As for `layout_map`.
    """

    def __init__(self, layout_map: keras.distribution.LayoutMap, fsdp: bool):
        # Every process brings rows of its own, whatever they come in.
        super().__init__(layout_map=layout_map, batch_dim_name="data", auto_shard_dataset=False)
        self.fsdp = fsdp
        self.sizes = sizes_of(layout_map.device_mesh)

    def get_variable_layout(self, variable: keras.Variable) -> Any:
        given = getattr(variable, "_layout", None) or self._layout_map[variable.path]
        if given is not None:
            return given
        found = sharding_at(variable.path, variable.shape, self.sizes, self.fsdp)
        return MeshLayout(found.axes, self.device_mesh)


def distribute(
    mesh: str,
    *,
    fsdp: bool = False,
    devices: Sequence[Any] | None = None,
    layouts: Mapping[str, Axes] | None = None,
) -> keras.distribution.ModelParallel:
    """Spreads all models made from now on over several devices. JAX only.

    Makes a mesh of the devices and a `keras.distribution.ModelParallel` on it, and sets that as
    Keras' distribution. A model must be made after it and used under it; its weights, the state of
    its optimizer and its batches are then split, each device holds and computes its part:

        data      rows of the batch
        expert    routed experts, and rows of the batch between them
        tensor    heads, feed-forward networks, the vocabulary; experts, too, where that divides

    Args:
        mesh: Sizes of the axes, such as `"data=2,expert=4"`. Their product is the number of
            devices.
        fsdp: Whether matrices are split over `data`, too, along the residual stream: less memory,
            more communication.
        devices: Devices as `keras.distribution.list_devices()` names them; `None` for all.
        layouts: Maps regular expressions for paths of further variables to the axes that split
            them, one axis, a tuple of them or `None` for each dim. They go before the rules.

    Returns:
        The distribution. `keras.distribution.set_distribution(None)` ends it, and so does
        `keras.utils.clear_session()`; `with distribution.scope():` sets it for a while.

    Raises:
        ValueError: text that is no mesh, devices that are not there or of another number, layouts
            that are none, or (when a model is made) an axis that does not divide what it should
            split.
        RuntimeError: another backend than JAX.

    Example:

    ```python
    import keras
    from qwen3_next import Qwen3Next, distribute

    distribute("data=1", devices=keras.distribution.list_devices()[:1])
    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=1)
    keras.distribution.set_distribution(None)
    ```
    """
    require_jax("distribute")
    require(_TEXT, "mesh", mesh)
    require(BOOLEAN, "fsdp", fsdp)
    require(_LAYOUTS, "layouts", layouts)
    sizes = sizes_of(mesh)
    devices = _fitting(mesh, devices_in(sizes), devices)
    device_mesh = keras.distribution.DeviceMesh(
        tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, devices
    )
    given = keras.distribution.LayoutMap(device_mesh)
    for pattern, axes in (layouts or {}).items():
        _check_axes(pattern, axes)
        given[pattern] = MeshLayout(axes, device_mesh)
    parallel = WeightTableParallel(given, fsdp)
    keras.distribution.set_distribution(parallel)
    return parallel


def _fitting(mesh, needed, devices):
    """The devices, of which there must be `needed`."""
    known = keras.distribution.list_devices()
    if devices is not None and not is_list_of(devices, known.__contains__):
        raise ValueError(
            "`devices` must be a list of what `keras.distribution.list_devices()` names. "
            f"Received: devices={shown(devices)}"
        )
    found = known if devices is None else list(devices)
    if len(found) == needed:
        return found
    advice = "Name a part of them with `devices`." if len(found) > needed else ""
    if len(found) < needed and all(str(device).lower().startswith("cpu") for device in found):
        advice = f"{SIMULATED}={needed}, set before jax is imported, makes a CPU stand for as many."
    raise ValueError(
        f"`mesh` must have as many places as there are devices. {advice} Received: {mesh=} for "
        f"{needed}, and {len(found)} devices {shown(found)}"
    )


def _check_axes(pattern, axes):
    dims = axes if isinstance(axes, tuple) else (axes,)
    flat = [n for names in dims for n in (names if isinstance(names, tuple) else (names,))]
    named = [name for name in flat if name is not None]
    known = all(name in MESH_AXES for name in named)
    if not isinstance(axes, tuple) or not known or len(named) > len({*named}):
        raise ValueError(
            f"`layouts[{pattern!r}]` must be a tuple with an axis out of {MESH_AXES}, a tuple of "
            f"axes or None for each dim, every axis once. Received: {axes!r}"
        )
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`layouts` must have regular expressions for keys. Received: {shown(pattern)}"
        ) from error
