"""What a profile says of a model's layers: a curve, its two knees, and where to split."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from qwen3_next.config.etd_config import FRACTION
from qwen3_next.config.model_config import FULL, LINEAR
from qwen3_next.config.validation import (
    NOT_NEGATIVE,
    Rule,
    integer,
    is_list_of,
    one_of,
    require,
)
from qwen3_next.think.figures import axes_for
from qwen3_next.think.kneedle import kneedle

Split = tuple[int, int, int]
_KIND = one_of((LINEAR, FULL))
_DISTANCES = Rule("a tuple of numbers in [0, 1]", lambda values: is_list_of(values, FRACTION.fits))
_TYPES = Rule(f"a tuple with {_KIND.what}", lambda values: is_list_of(values, _KIND.fits))


@dataclass(frozen=True)
class LayerProfile:
    """How far each layer turns the residual stream, and the split that follows from it.

    Kneedle looks for the layer where `distances` go from steep to gradual decline, from the first
    layer on and from the last one back. What lies between, both knees included, thinks. The aligned
    split moves both boundaries to the nearest ones of the model's layer groups, runs of layers up
    to and including one with full attention; a think block is never empty.

    Args:
        distances: One angular distance per layer, in units of pi: 0 to 1.
        layer_types: `"linear_attention"` or `"full_attention"` for each of them.
        sequences: Number of sequences they are the mean of.
        sensitivity: Sensitivity S of Kneedle; the larger, the more pronounced a knee must be.
            `dataclasses.replace(profile, sensitivity=...)` tries another without a new profile.

    Raises:
        ValueError: lengths that differ, or a value out of range; and from the splits, where the
            curve has no knee or its knees cross.

    Reference: Encode, Think, Decode, arXiv 2510.07358.

    Example:

    ```python
    from qwen3_next import LayerProfile

    profile = LayerProfile(
        distances=(0.4, 0.3, 0.12, 0.1, 0.1, 0.1, 0.12, 0.35),
        layer_types=(*["linear_attention"] * 3, "full_attention") * 2,
        sequences=1000,
    )
    assert profile.raw_split == (2, 5, 1)
    print(profile)
    ```
    """

    distances: tuple[float, ...]
    layer_types: tuple[str, ...]
    sequences: int
    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        require(_DISTANCES, "distances", self.distances)
        require(_TYPES, "layer_types", self.layer_types)
        if not self.distances or len(self.distances) != len(self.layer_types):
            raise ValueError(
                "`distances` and `layer_types` must have one entry per layer. Received: "
                f"distances={self.distances}, layer_types={self.layer_types}"
            )
        require(integer(1), "sequences", self.sequences)
        require(NOT_NEGATIVE, "sensitivity", self.sensitivity)

    @property
    def knees(self) -> tuple[int | None, int | None]:
        """The knee layers from the front and from the back, `None` where there is none."""
        front = kneedle(self.distances, self.sensitivity)
        back = kneedle(self.distances[::-1], self.sensitivity)
        return front, None if back is None else len(self.distances) - 1 - back

    @property
    def raw_split(self) -> Split:
        """Layers that encode, think and decode, as the knees say."""
        first, last = self.knees
        if first is None or last is None or first > last:
            missing = [side for side, knee in (("front", first), ("back", last)) if knee is None]
            what = f"has no knee from the {' and the '.join(missing)}"
            raise ValueError(
                f"The curve of `distances` {what if missing else 'has knees that cross'}. Profile "
                "more data, try another `sensitivity`, or choose the split by its plot. Received: "
                f"distances={_rounded(self.distances)}, sensitivity={self.sensitivity}"
            )
        return first, last + 1 - first, len(self.distances) - 1 - last

    @property
    def aligned_split(self) -> Split:
        """`raw_split` with both boundaries moved to those of the layer groups."""
        encoder, think, _ = self.raw_split

        def cost(pair: tuple[int, int]) -> tuple[int, int]:
            # Of splits that are equally near, the one with more layers to think.
            return abs(pair[0] - encoder) + abs(pair[1] - encoder - think), pair[0] - pair[1]

        first, behind = min(combinations(_group_boundaries(self.layer_types), 2), key=cost)
        return first, behind - first, len(self.distances) - behind

    @property
    def split(self) -> Split:
        """`aligned_split`, which `ETDConfig.from_profile` takes."""
        return self.aligned_split

    def plot(self, path: Any = None, ax: Any = None) -> Any:
        """Draws the curve, both knees and the aligned boundaries with matplotlib.

        Args:
            path: File to write the figure to, or `None`.
            ax: Axes to draw on. `None` for a new figure, which is closed once it is written.

        Returns:
            The axes.
        """
        with axes_for(path, ax) as ax:
            layers = np.arange(len(self.distances))
            ax.plot(layers, self.distances, "o-", color="#33508c", markersize=4)
            knees = [knee for knee in self.knees if knee is not None]
            ax.plot(
                knees,
                [self.distances[knee] for knee in knees],
                "o",
                color="#c8553d",
                markersize=11,
                markerfacecolor="none",
                markeredgewidth=2,
                label="knees",
            )
            title = f"{self.sequences} sequences"
            if self._splits():
                encoder, think, decoder = self.aligned_split
                ax.axvspan(
                    encoder - 0.5,
                    encoder + think - 0.5,
                    color="#f2c14e",
                    alpha=0.3,
                    linewidth=0,
                    label="aligned think block",
                )
                title += f", split {encoder} / {think} / {decoder}"
            ax.set(xlabel="layer", ylabel="angular distance / π", title=title, ylim=(0, None))
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(frameon=False, loc="upper center")
        return ax

    def _splits(self):
        first, last = self.knees
        return first is not None and last is not None and first <= last

    def __str__(self) -> str:
        first, last = self.knees
        lines = ["layer  distance  type"]
        for layer, distance in enumerate(self.distances):
            marks = ["front knee"] * (layer == first) + ["back knee"] * (layer == last)
            row = f"{layer:5}  {distance:8.4f}  {self.layer_types[layer]:16}  {', '.join(marks)}"
            lines.append(row.rstrip())
        if self._splits():
            for name in ("raw", "aligned"):
                encoder, think, decoder = getattr(self, f"{name}_split")
                lines.append(f"{name} split: {encoder} encode, {think} think, {decoder} decode")
        else:
            lines.append("no split: the curve lacks a knee, or its knees cross")
        return "\n".join([*lines, f"mean over {self.sequences} sequences, S = {self.sensitivity}"])


def _group_boundaries(layer_types):
    """Where a group ends or the model does; without full attention every layer is its own group."""
    layers = len(layer_types)
    if FULL not in layer_types:
        return range(layers + 1)
    ends = (layer + 1 for layer in range(layers) if layer_types[layer] == FULL)
    return sorted({0, *ends, layers})


def _rounded(distances):
    return [round(distance, 4) for distance in distances]
