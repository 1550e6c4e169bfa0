"""Axes to draw on and files to write, with matplotlib imported only where it draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen3_next.checkpoints.staging import FILE
from qwen3_next.config.validation import Rule, require

_AXES = Rule("matplotlib axes", lambda ax: hasattr(ax, "bar") and hasattr(ax, "figure"))


@contextmanager
def axes_for(path: Any = None, ax: Any = None) -> Iterator[Any]:
    """Gives axes to draw on, those of the caller or new ones, and writes their figure to `path`.

    A new figure is closed once it is written, and after an error; one that is not written stays
    open to be shown.

    Raises:
        ValueError: no path of a file in a folder that exists, or no axes.
    """
    if path is not None:
        require(FILE, "path", path)
    if ax is not None:
        require(_AXES, "ax", ax)
        yield ax
        if path is not None:
            ax.figure.savefig(path, dpi=150)
        return
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    is_shown = False
    try:
        yield ax
        if path is not None:
            figure.savefig(path, dpi=150)
        is_shown = path is None
    finally:
        if not is_shown:
            plt.close(figure)
