"""Layers that refuse tensors which do not fit their call, by name.

The annotations of `call` say what fits: with `x: Annotated[Tensor, "B T D"]` and `mask:
Annotated[Tensor, "B T"]` both have the same B and T. A broadcast or a backend's clamped index would
make something else of others without a word.
"""

import functools
import inspect
import typing
from itertools import zip_longest
from typing import Any

import keras
import numpy as np

from qwen3_next.config.validation import BOOLEAN, require

from .ops.checks import as_array, as_floats, exact_int32, require_floatx, require_shape

INTEGERS = ("branch", "experts", "lengths", "positions", "route", "segment_ids")
NUMBERS = ("inputs", "padding_mask", "prompt", "prompt_mask", "updates")
FLAGS = ("full_output", "replayable", "return_routing")


class CheckedLayer(keras.layers.Layer):
    """A layer that checks the tensors it is called with.

    In an annotation a letter stands for one size in all arguments of a call, a number for itself,
    `B|1` for either, and `...` for any number of axes, at either end.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: integers for floats, floats for integers, sizes that do not fit together, flags
            that are no bools, a default dtype of Keras other than float32.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        require_floatx()
        super().__init__(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        require_floatx()
        names, axes, optional = _arguments(type(self).call)
        sizes = self._built_sizes(axes[names[0]][-1])

        def checked(name, x):
            if name in FLAGS:
                require(BOOLEAN, name, x)
            left = name not in axes or (x is None and name in optional)
            return x if left else _checked(name, x, axes[name], sizes)

        by_place = zip_longest(names[: len(args)], args)  # too many are for Keras to refuse
        args = tuple(checked(name, x) for name, x in by_place)
        kwargs = {name: checked(name, x) for name, x in kwargs.items()}
        return super().__call__(*args, **kwargs)

    def _built_sizes(self, letter):
        """The width that the layer was built for, the last axis of its first argument."""
        config = self.get_build_config() if self.built and letter != "..." else None
        shapes = [*(config or {}).get("shapes_dict", config or {}).values()]
        return {letter: shapes[0][-1]} if shapes and shapes[0] else {}


@functools.cache
def _arguments(call):
    """The names of what `call` takes, in order, the axes of the tensors among them, and those that
    may be `None`."""
    parameters = [*inspect.signature(call).parameters.values()][1:]
    axes = {}
    for parameter in parameters:
        for part in (parameter.annotation, *typing.get_args(parameter.annotation)):
            if typing.get_origin(part) is typing.Annotated:
                axes[parameter.name] = part.__metadata__[0].split()
    optional = {p.name for p in parameters if p.default is not inspect.Parameter.empty}
    return tuple(p.name for p in parameters), axes, optional


def _checked(name, x, axes, sizes):
    if name in INTEGERS:
        host = isinstance(x, np.ndarray) or not hasattr(x, "dtype")
        x = exact_int32(name, x) if host else _integers(name, as_array(name, x))
    else:
        x = (as_array if name in NUMBERS else as_floats)(name, x)
    _require_axes(name, x, axes, sizes)
    return x


def _integers(name, x):
    if "int" not in keras.backend.standardize_dtype(x.dtype):
        raise ValueError(f"`{name}` must be integers. Received: {name}.dtype={x.dtype}")
    return x


def _require_axes(name, x, axes, sizes):
    """Raises `ValueError` unless the shape has these axes; notes the sizes of new letters."""
    shape = tuple(x.shape)
    if "..." in axes:
        place, count = axes.index("..."), max(len(shape) - len(axes) + 1, 0)
        count = sizes.setdefault("...", count)
        axes = [*axes[:place], *(f"...{i}" for i in range(count)), *axes[place + 1 :]]
    wanted = []
    for axis, size in zip_longest(axes, shape[: len(axes)]):
        known = [int(a) if a.isdigit() else sizes.get(a) for a in axis.split("|")]
        wanted.append(size if size in known else known[0])
    require_shape(name, x, wanted)
    for axis, size in zip(axes, shape):
        if "|" not in axis and size is not None:
            sizes[axis] = size
