"""Growth in depth: new layers that hand on what they are given.

y = x + mixer(norm(x)) W_o + mlp(norm(.)) W_down        W_o = W_down = 0, so y = x
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.model_config import FULL, LINEAR
from qwen3_next.config.validation import Rule, integer, is_list_of, one_of, require
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.growth.layer_arrangement import (
    arranged_config,
    layer_of,
    require_no_think_loop,
    source_path,
)
from qwen3_next.transfer.named_weights import NamedWeights, rebuilt, require_model

# What writes to the residual stream.
OUTPUTS = (
    "/self_attn/o_proj/kernel",
    "/linear_attn/out_proj/kernel",
    "/down_proj/kernel",  # of a dense network and of a shared expert
    "/experts/down",
)


def grow_model_depth(
    model: Task,
    num_new_layers: int | None = None,
    positions: Sequence[int] | None = None,
    layer_type: str | None = None,
    name: str | None = None,
) -> Any:
    """A deeper model that computes what a model computes.

    A new layer is a copy of a layer of the model, of its weights and its kind, but for the
    projections that write to the residual stream: they are 0, and the first things to learn. What
    is added is 0, so results are equal to the bit, up to how a compiler fuses operations. The
    load-balancing loss of an MoE model is that of more routers than before. The model stays as it
    is.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier` without a think loop.
        num_new_layers: New layers, spread evenly; may be more than the model has.
        positions: In place of a number: for every new layer the layer of the model it stands
            behind. A layer that is named twice is followed by two.
        layer_type: `"linear_attention"` or `"full_attention"`, copied from the nearest such layer;
            `None` for a copy of the layer it stands behind.
        name: Name of the new model, `None` for Keras' choice.

    Returns:
        A model of the same class.

    Raises:
        ValueError: a model with a think loop, a number and positions at once or neither, a position
            out of range, or a type of which the model has no layer.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.growth.net2deeper import grow_model_depth

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=2)
    deeper = grow_model_depth(model, positions=[1, 1])
    token_ids = np.array([[1, 2, 3]])
    assert deeper.config.num_layers == 4
    assert np.array_equal(deeper(token_ids), model(token_ids))
    ```

    Reference: Net2Net, arXiv 1511.05641, section 2.3; zero-initialised residual branches, LLaMA
    Pro, arXiv 2401.02415.
    """
    require_model("model", model)
    config = model.config
    require_no_think_loop("grow_model_depth", config)
    require(Rule(f"None, {LINEAR!r} or {FULL!r}", _is_type), "layer_type", layer_type)
    behind = _positions(config.num_layers, num_new_layers, positions)
    arrangement, new = [], set()
    for layer in range(config.num_layers):
        arrangement.append(layer)
        for _ in range(behind.count(layer)):
            new.add(len(arrangement))
            arrangement.append(_nearest(config, layer, layer_type))
    weights = NamedWeights(model)

    def make(row):
        if layer_of(row.path) in new and row.path.endswith(OUTPUTS):
            return np.zeros(row.shape, "float32")
        return weights[source_path(row.path, arrangement)]

    return rebuilt(model, arranged_config(config, arrangement), make, name)


def _is_type(value):
    return value is None or one_of((LINEAR, FULL)).fits(value)


def _positions(num_layers: int, number: int | None, positions: Any) -> list[int]:
    """The layers behind which new ones stand."""
    if (number is None) == (positions is None):
        raise ValueError(
            "Give either `num_new_layers` or `positions`. "
            f"Received: num_new_layers={number}, positions={positions}"
        )
    if number is not None:
        require(integer(1), "num_new_layers", number)
        # The middles of as many equal parts of the model.
        return [(2 * place + 1) * num_layers // (2 * number) for place in range(number)]
    inside = integer(0, num_layers - 1)
    what = f"a list of layers, 0 to {num_layers - 1}, that is not empty"
    rule = Rule(what, lambda value: is_list_of(value, inside.fits) and len(value) > 0)
    require(rule, "positions", positions)
    return list(positions)


def _nearest(config: Qwen3NextConfig, layer: int, layer_type: str | None) -> int:
    """The nearest layer of a type, of two the earlier one."""
    found = [i for i, kind in enumerate(config.layer_types) if layer_type in (None, kind)]
    if not found:
        raise ValueError(
            "`layer_type` must be that of a layer of the model, to be copied. Received: "
            f"layer_type={layer_type!r}, layer_types={config.layer_types}"
        )
    return min(found, key=lambda other: (abs(other - layer), other))
