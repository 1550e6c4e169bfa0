"""Smaller models out of a large one: what matters least is left out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, Rule, integer, one_of, require
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.growth.layer_arrangement import (
    arranged_config,
    require_no_think_loop,
    source_path,
)
from qwen3_next.transfer.growth.unit_axes import chosen, field_of
from qwen3_next.transfer.growth.unit_importance import (
    Importance,
    activation_importance,
    weight_importance,
)
from qwen3_next.transfer.named_weights import NamedWeights, rebuilt, require_model

SELECTIONS = ("importance", "uniform", "first", "last")
IMPORTANCES = ("activation", "weight_norm")
SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_experts")
_FAMILY = Rule(
    f"a dict that is not empty, from names to dicts of {list(SIZES)}",
    lambda value: (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(sizes, Mapping) for sizes in value.values())
        and all(set(sizes) <= set(SIZES) for sizes in value.values())
    ),
)


def slice_model(
    model: Task,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_experts: int | None = None,
    calibration_data: Any = None,
    layer_selection: str = "importance",
    importance: str = "activation",
    preserve_first_last: bool = True,
    batch_size: int = 8,
    name: str | None = None,
) -> Any:
    """A smaller model of the layers, channels, units and experts that matter most.

    One choice of channels of the residual stream holds for all layers, norms, embedding and head;
    every dense feed-forward network keeps its own best units, every sparse one its own best
    experts. What is kept is kept as it is and in its order, so a slice is a place to train from,
    at best with the model as the teacher. The model stays as it is.

    What matters, `importance` says, measured once on the whole model: `"activation"` by
    `calibration_data` (layers by 1 - cos of what goes in and comes out, channels by the energy
    behind the norms, units by what they add to the stream, experts by the router's probability),
    `"weight_norm"` by the weights alone.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier` without a think loop.
        num_layers, hidden_size, intermediate_size, num_experts: Sizes of the new model, `None` to
            keep them. Heads keep their number and width; a token still goes to
            `num_experts_per_tok` experts.
        calibration_data: Token ids or batches, as for `profile_layers`. Needed where tokens decide,
            otherwise `None`.
        layer_selection: `"importance"`, or layers by their place: `"uniform"`ly spread, `"first"`
            or `"last"`.
        importance: `"activation"` or `"weight_norm"`.
        preserve_first_last: Whether the first and the last layer are kept in any case.
        batch_size: Sequences per pass over the calibration data.
        name: Name of the new model, `None` for Keras' choice.

    Returns:
        A model of the same class.

    Raises:
        ValueError: nothing to slice, a size out of range or of something that the model does not
            have, calibration data that is missing or that nothing would read.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.growth.slicing import slice_model

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=4)
    token_ids = np.random.default_rng(0).integers(0, 64, (4, 16))
    small = slice_model(model, num_layers=3, num_experts=2, calibration_data=token_ids)
    assert small.config.num_layers == 3 and small.config.num_experts == 2
    ```

    Reference: Minitron, arXiv 2407.14679; ShortGPT, arXiv 2403.03853.
    """
    sizes = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
    }
    asked = {field: size for field, size in sizes.items() if size is not None}
    choice = _Choice(layer_selection, importance, preserve_first_last, batch_size)
    (sliced,) = _slices(model, [asked], [name], calibration_data, choice)
    return sliced


def create_model_family(
    model: Task,
    sizes: Mapping[str, Mapping[str, int]],
    calibration_data: Any = None,
    layer_selection: str = "importance",
    importance: str = "activation",
    preserve_first_last: bool = True,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Slices of one model in several sizes; what matters is measured once.

    Args:
        model: As for `slice_model`.
        sizes: For every name of a new model its sizes, a dict with `num_layers`, `hidden_size`,
            `intermediate_size` or `num_experts`.
        calibration_data, layer_selection, importance, preserve_first_last, batch_size: As for
            `slice_model`.

    Returns:
        Dict from those names to models. Smaller ones are made of what larger ones keep.

    Raises:
        ValueError: as `slice_model`, before anything is measured.

    Example:

    ```python
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.growth.slicing import create_model_family

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=4)
    family = create_model_family(
        model,
        {"short": {"num_layers": 2}, "narrow": {"hidden_size": 24}},
        importance="weight_norm",
    )
    assert family["narrow"].config.hidden_size == 24
    ```

    Reference: Minitron, arXiv 2407.14679.
    """
    require(_FAMILY, "sizes", sizes)
    choice = _Choice(layer_selection, importance, preserve_first_last, batch_size)
    made = _slices(model, list(sizes.values()), list(sizes), calibration_data, choice)
    return dict(zip(sizes, made))


class _Choice(NamedTuple):
    """How to choose what stays: the arguments of `slice_model` of these names."""

    layer_selection: str
    importance: str
    preserve_first_last: bool
    batch_size: int


def _slices(
    model: Task,
    family: Sequence[Mapping[str, int]],
    names: Sequence[str | None],
    data: Any,
    choice: _Choice,
) -> list[Any]:
    """A slice for each of some sizes, all of them checked before anything is measured."""
    require_model("model", model)
    require_no_think_loop("slice_model", model.config)
    require(one_of(SELECTIONS), "layer_selection", choice.layer_selection)
    require(one_of(IMPORTANCES), "importance", choice.importance)
    require(BOOLEAN, "preserve_first_last", choice.preserve_first_last)
    require(integer(1), "batch_size", choice.batch_size)
    for sizes in family:
        _check_sizes(model, sizes, choice.preserve_first_last)
    ranked = {field for sizes in family for field in sizes}
    if choice.layer_selection != "importance":
        ranked.discard("num_layers")
    on_tokens = bool(ranked) and choice.importance == "activation"
    _check_data(data, on_tokens)
    found = None
    if on_tokens:
        found = activation_importance(model, data, choice.batch_size)
    elif ranked:
        found = weight_importance(model)
    return [_sliced(model, sizes, found, choice, name) for sizes, name in zip(family, names)]


def _check_sizes(model: Task, sizes: Mapping[str, int], keeps_ends: bool) -> None:
    if not sizes:
        raise ValueError(f"Give at least one of {list(SIZES)}. Received: none")
    config = model.config
    there = {
        field_of(row, a) for row in NamedWeights(model).rows.values() for a in range(len(row.axes))
    }
    for field, size in sizes.items():
        if field != "num_layers" and field not in there:
            raise ValueError(
                f"`{field}` must be None: the model has no weights of that size. "
                f"Received: {field}={size}"
            )
        require(integer(1, getattr(config, field)), field, size)
    if keeps_ends and sizes.get("num_layers", 2) < min(2, config.num_layers):
        raise ValueError(
            "`num_layers` must be at least 2 with `preserve_first_last`. "
            f"Received: num_layers={sizes['num_layers']}, preserve_first_last=True"
        )
    # What the sizes must be together, as fewer experts than a token needs, is refused here.
    config.replace(**{field: size for field, size in sizes.items() if field != "num_layers"})


def _check_data(data: Any, is_read: bool) -> None:
    if is_read and data is None:
        raise ValueError(
            "`calibration_data` must be given with importance='activation': tokens say what "
            "matters. Received: calibration_data=None"
        )
    if data is not None and not is_read:
        raise ValueError(
            "`calibration_data` must be None where nothing reads it: with "
            "importance='weight_norm', or layers alone that are chosen by their place. "
            f"Received: calibration_data of type {type(data).__name__}"
        )


def _sliced(
    model: Task,
    sizes: Mapping[str, int],
    found: Importance | None,
    choice: _Choice,
    name: str | None,
) -> Any:
    old, weights = model.config, NamedWeights(model)
    layers = list(range(old.num_layers))
    if "num_layers" in sizes:
        scores = None if found is None else found.layers
        place = choice.layer_selection, scores, choice.preserve_first_last
        layers = kept_layers(old.num_layers, sizes["num_layers"], *place)
    widths = {field: size for field, size in sizes.items() if field != "num_layers"}
    config: Qwen3NextConfig = arranged_config(old, layers).replace(**widths)

    def units(field, network):
        if field not in widths or found is None:
            return None
        scores = found.channels if field == "hidden_size" else found.networks[network]
        return _best(scores, widths[field])

    def make(row):
        path = source_path(row.path, layers)
        return chosen(weights[path], weights.rows[path], old, units)

    return rebuilt(model, config, make, name)


def kept_layers(
    num_layers: int,
    number: int,
    selection: str,
    scores: np.ndarray | None,
    keeps_ends: bool,
) -> list[int]:
    """The layers that stay, in their order.

    Args:
        num_layers: Layers of the model.
        number: Layers that stay.
        selection: One of `SELECTIONS`.
        scores: `(num_layers,)`, what each layer is worth; read by `"importance"` alone.
        keeps_ends: Whether the first and the last layer stay in any case.
    """
    ends = [0, num_layers - 1] if keeps_ends and num_layers > 1 else []
    inner = [layer for layer in range(num_layers) if layer not in ends]
    number -= len(ends)
    if selection == "importance":
        kept = [inner[place] for place in _best(np.asarray(scores)[inner], number)]
    elif selection == "uniform":
        # The middles of as many equal parts.
        kept = [inner[(2 * place + 1) * len(inner) // (2 * number)] for place in range(number)]
    else:
        kept = inner[:number] if selection == "first" else inner[len(inner) - number :]
    return sorted([*ends, *kept])


def _best(scores: np.ndarray, number: int) -> np.ndarray:
    """Places of the highest scores, in ascending order; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:number])
