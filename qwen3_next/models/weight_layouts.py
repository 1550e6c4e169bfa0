"""How published tensors make up a variable, and back.

Published matrices are `(out, in)`, ours `(in, out)` with heads and experts on axes of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A pair of functions that are each other's inverse.

    Attributes:
        load: From a sequence of tensors to the array of the variable.
        save: From that array to a list of tensors.
    """

    load: Callable
    save: Callable


def to_heads_layout(width: int, heads: int, dim: int) -> Layout:
    """Published rows are (head, dim), as the kernel's last two axes are."""
    return Layout(
        load=lambda tensors: tensors[0].T.reshape(width, heads, dim),
        save=lambda array: [array.reshape(width, heads * dim).T],
    )


def from_heads_layout(heads: int, dim: int, width: int) -> Layout:
    """Published columns are (head, dim), as the kernel's first two axes are."""
    return Layout(
        load=lambda tensors: tensors[0].T.reshape(heads, dim, width),
        save=lambda array: [array.reshape(heads * dim, width).T],
    )


def conv_layout(groups: int, key_dim: int, values: int) -> Layout:
    """Published channels are all queries, all keys, all values; ours stand key head by key head."""
    sizes = (key_dim, key_dim, values)
    bounds = [groups * key_dim, 2 * groups * key_dim]

    def load(tensors):
        taps = tensors[0][:, 0].T  # (W, C)
        parts = np.split(taps, bounds, axis=1)
        parts = [p.reshape(len(taps), groups, size) for p, size in zip(parts, sizes)]
        return np.concatenate(parts, axis=-1)

    def save(array):
        parts = np.split(array, [key_dim, 2 * key_dim], axis=-1)
        taps = np.concatenate([p.reshape(len(array), -1) for p in parts], axis=1)
        return [taps.T[:, None]]

    return Layout(load, save)


def gate_up_layout(experts: int) -> Layout:
    """Gate and up of every expert, one tensor each, side by side in one stack."""

    def load(tensors):
        width, inner = tensors[0].shape[::-1]
        stacked = np.empty((experts, width, 2 * inner), tensors[0].dtype)
        for e in range(experts):
            stacked[e, :, :inner] = tensors[2 * e].T
            stacked[e, :, inner:] = tensors[2 * e + 1].T
        return stacked

    def save(array):
        halves = (half.T for expert in array for half in np.split(expert, 2, axis=-1))
        return list(halves)

    return Layout(load, save)


def _stack_swapped(tensors):
    stacked = np.empty((len(tensors), *tensors[0].shape[::-1]), tensors[0].dtype)
    for e in range(len(tensors)):
        stacked[e] = tensors[e].T
    return stacked


SAME = Layout(load=lambda tensors: tensors[0], save=lambda array: [array])
SWAP = Layout(
    load=lambda tensors: np.swapaxes(tensors[0], -1, -2),
    save=lambda array: [np.swapaxes(array, -1, -2)],
)
STACK_SWAP = Layout(load=_stack_swapped, save=lambda array: [expert.T for expert in array])
