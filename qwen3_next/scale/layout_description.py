"""What every device of a mesh holds of a model, without allocating a weight."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, Rule, one_of, require
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.models.description import DTYPE_BYTES, bytes_text
from qwen3_next.models.weight_rows import PARTS
from qwen3_next.scale.layouts import NUM_LABELS, rows_of, sharding_at
from qwen3_next.scale.mesh_sizes import devices_in, mesh_text, sizes_of
from qwen3_next.scale.sharding_rules import Axes, Sharding, sharding_of
from qwen3_next.scale.weight_patterns import row_at
from qwen3_next.think.figures import axes_for

# Variables that an optimizer has for each weight, of the weight's shape and dtype.
STATES = {None: 0, "adamw": 2}
GIB = 2**30
OTHER = "other"  # no weight of the table: counters, seeds
_KNOWN = one_of(DTYPE_BYTES)
_DTYPE = Rule(f"None or {_KNOWN.what}", lambda dtype: dtype is None or _KNOWN.fits(dtype))
_OPTIMIZER = Rule("None or 'adamw'", lambda name: name is None or name == "adamw")


class WeightLayout(NamedTuple):
    """Where one weight lives.

    Attributes:
        path: Path of the variable.
        shape: Its whole shape.
        part: The part of the model that it is counted as, as in `describe`.
        axes: For each dim the axis of the mesh that splits it, a tuple of several, or `None`.
        bytes: Its size.
        bytes_per_device: What each device holds of it.
        reason: Why a device holds more than its share; empty where it does not.
        trainable: Whether an optimizer has state for it.
    """

    path: str
    shape: tuple[int, ...]
    part: str
    axes: Axes
    bytes: int
    bytes_per_device: int
    reason: str
    trainable: bool = True


@dataclass(frozen=True)
class LayoutDescription:
    """Every weight's place on a mesh; `print` it for a table.

    Attributes:
        mesh: Sizes of the mesh's axes.
        rows: A `WeightLayout` for each weight.
        states: Variables of the optimizer for each weight.

    Example:

    ```python
    from qwen3_next import describe_layout

    layout = describe_layout("80b_a3b", "expert=8,tensor=8")
    assert layout.weight_bytes_per_device < layout.weight_bytes / 32
    ```
    """

    mesh: dict[str, int]
    rows: tuple[WeightLayout, ...]
    states: int = 0

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return devices_in(self.mesh)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, counted once."""
        return sum(row.bytes for row in self.rows)

    @property
    def weight_bytes_per_device(self) -> int:
        """Bytes of weights on each device."""
        return sum(row.bytes_per_device for row in self.rows)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's variables, counted once."""
        return self.states * sum(row.bytes for row in self.rows if row.trainable)

    @property
    def optimizer_bytes_per_device(self) -> int:
        """Bytes of the optimizer's variables on each device."""
        return self.states * sum(row.bytes_per_device for row in self.rows if row.trainable)

    @property
    def least_bytes_per_device(self) -> float:
        """What a device would hold if nothing were held twice."""
        return (self.weight_bytes + self.optimizer_bytes) / self.devices

    def __str__(self) -> str:
        folded = list(_folded(self.rows))
        wide = max((len(path) for path, *_ in folded), default=0)
        sizes = f"{'each':>11}{'a device':>12}"
        head = f"{'weight':<{wide}}{'times':>6}  {'shape':<18}{'split over':<22}{sizes}"
        lines = [f"{mesh_text(self.mesh)}, {self.devices} devices", "", head]
        for path, number, row in folded:
            split = Sharding(row.axes).text()
            shape = " x ".join(map(str, row.shape)) or "scalar"
            sizes = f"{bytes_text(row.bytes):>11}{bytes_text(row.bytes_per_device):>12}"
            lines.append(f"{path:<{wide}}{number:>6}  {shape:<18}{split:<22}{sizes}  {row.reason}")
        return "\n".join(line.rstrip() for line in [*lines, "", *self._totals()])

    def _totals(self):
        lines = [f"{'':<20}{'in all':>12}{'a device':>12}"]
        pairs = [("weights", self.weight_bytes, self.weight_bytes_per_device)]
        if self.states:
            pairs.append(("optimizer", self.optimizer_bytes, self.optimizer_bytes_per_device))
        for name, size, held in pairs:
            lines.append(f"{name:<20}{bytes_text(size):>12}{bytes_text(held):>12}")
        lines.append(f"{'least possible':<20}{'':>12}{bytes_text(self.least_bytes_per_device):>12}")
        return lines

    def by_part(self) -> dict[str, int]:
        """Bytes of weights on each device, by part of the model."""
        parts = [*PARTS, OTHER]
        sums = {p: sum(row.bytes_per_device for row in self.rows if row.part == p) for p in parts}
        return {part: size for part, size in sums.items() if size}

    def plot(self, path: Any = None, ax: Any = None) -> Any:
        """Draws the weights on each device, stacked by part of the model, with matplotlib.

        Args:
            path: File to write the figure to, or `None`.
            ax: Axes to draw on. `None` for a new figure, which is closed once it is written.

        Returns:
            The axes.
        """
        with axes_for(path, ax) as ax:
            places, below = np.arange(self.devices), 0.0
            for part, size in self.by_part().items():
                ax.bar(places, size / GIB, bottom=below, label=part)
                below += size / GIB
            least = self.weight_bytes / self.devices / GIB
            ax.axhline(least, color="black", linestyle=":", label="least possible")
            ax.set(xlabel="device", ylabel="weights, GiB", title=mesh_text(self.mesh))
            # Beside the bars, which are all equally high and leave no room.
            ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        return ax


def describe_layout(
    model: str | Qwen3NextConfig | ConfiguredModel,
    mesh: str | keras.distribution.DeviceMesh,
    *,
    fsdp: bool = False,
    dtype: str | None = None,
    optimizer: str | None = None,
    num_labels: int | None = None,
) -> LayoutDescription:
    """Says for every weight of a model how a mesh splits it, and what each device holds.

    Nothing is allocated, and there need not be as many devices.

    Args:
        model: Name of a variant, configuration, or a model.
        mesh: Text such as `"expert=8,tensor=8"`, or a mesh.
        fsdp: As for `distribute`.
        dtype: Dtype of the weights that are not float32 in any case. `None` for a model's own,
            otherwise `"bfloat16"`.
        optimizer: `"adamw"` for its state, or `None`.
        num_labels: Classes of a classifier, `None` for a language model. A model knows its own.

    Returns:
        `LayoutDescription`.

    Raises:
        ValueError: text that is no mesh, an axis that does not divide what it should split, or a
            number of labels below 1.

    Example:

    ```python
    from qwen3_next import describe_layout

    alone, eight = (describe_layout("tiny", mesh) for mesh in ("data=8", "tensor=2,expert=4"))
    assert eight.weight_bytes_per_device < alone.weight_bytes_per_device
    ```
    """
    require(BOOLEAN, "fsdp", fsdp)
    require(_DTYPE, "dtype", dtype)
    require(_OPTIMIZER, "optimizer", optimizer)
    require(NUM_LABELS, "num_labels", num_labels)
    sizes = sizes_of(mesh)
    if isinstance(model, ConfiguredModel):
        rows = _rows_of_variables(model, sizes, fsdp, dtype)
    else:
        rows = _rows_of_table(rows_of(model, num_labels), sizes, fsdp, dtype or "bfloat16")
    return LayoutDescription(sizes, tuple(rows), STATES[optimizer])


def _rows_of_table(table, sizes, fsdp, dtype):
    for weight in table:
        sharding = sharding_of(weight, sizes, fsdp)
        bytes_of_one = DTYPE_BYTES[weight.dtype or dtype]
        yield _row(weight.path, weight.shape, weight.part, sharding, bytes_of_one, sizes)


def _rows_of_variables(model, sizes, fsdp, dtype):
    learn = {id(variable) for variable in model.trainable_variables}
    for variable in model.weights:
        path, shape = variable.path, tuple(variable.shape)
        sharding, known = sharding_at(path, shape, sizes, fsdp), row_at(path, len(shape))
        kept = known is None or known.dtype == "float32" or dtype is None
        bytes_of_one = DTYPE_BYTES.get(variable.dtype, 4) if kept else DTYPE_BYTES[dtype]
        part = OTHER if known is None else known.part
        row = _row(path, shape, part, sharding, bytes_of_one, sizes)
        yield row._replace(trainable=id(variable) in learn)


def _row(path, shape, part, sharding, bytes_of_one, sizes):
    size = math.prod(shape) * bytes_of_one
    held = size // sharding.parts(sizes)
    return WeightLayout(path, shape, part, sharding.axes, size, held, sharding.reason)


def _folded(rows) -> Iterator[tuple[str, int, WeightLayout]]:
    """Rows that differ in their numbers alone as one: its path, how many they are, the first."""
    groups: dict[tuple, list[WeightLayout]] = {}
    for row in rows:
        groups.setdefault((_numbers(row.path)[0], *row[1:]), []).append(row)
    for (template, *_), same in groups.items():
        columns = zip(*(_numbers(row.path)[1] for row in same))
        path = template.format(*(_ranges(sorted(set(column))) for column in columns))
        yield path, len(same), same[0]


def _numbers(path):
    """A path with `{}` for each number behind an underscore, and the numbers."""
    pattern = r"(?<=_)\d+(?=[_/])"
    return re.sub(pattern, "{}", path), [int(found) for found in re.findall(pattern, path)]


def _ranges(numbers):
    """`{0..5}` for consecutive numbers, `{3,7..47}` for evenly spaced ones, one as it is."""
    first, last = numbers[0], numbers[-1]
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    if not steps:
        return str(first)
    if steps == {1}:
        return f"{{{first}..{last}}}"
    if len(steps) == 1:
        return f"{{{first},{numbers[1]}..{last}}}"
    return f"{{{len(numbers)} of {first}..{last}}}"
