"""Axes to draw on and files to write, with matplotlib imported only where it draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def axes_for(path: Any = None, ax: Any = None) -> Iterator[Any]:
    """Gives axes to draw on, those of the caller or new ones, and writes their figure to `path`.

    A new figure is closed once it is written; one that is not stays open to be shown.
    """
    if ax is not None:
        yield ax
        if path is not None:
            ax.figure.savefig(path, dpi=150)
        return
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    yield ax
    if path is not None:
        figure.savefig(path, dpi=150)
        plt.close(figure)
