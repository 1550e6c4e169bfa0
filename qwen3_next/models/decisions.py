"""What is decided for a row before it is read: its prompt, the route through the think layers, and
the LoRA expert."""

from collections.abc import Collection
from typing import Annotated, Any

import numpy as np
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import shown
from qwen3_next.layers.ops.cross_entropy import IGNORE
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.inputs import BY_ROW, Inputs, check_token_ids, host_array, host_values

ACTIONS = (0, 1, 2)


def reads_prompts(config: Qwen3NextConfig) -> bool:
    """Whether a model has routers that decide from prompts."""
    return not decides_all(config, ())


def decides_all(config: Qwen3NextConfig, decisions: Collection[str]) -> bool:
    """Whether nothing is left to be decided from a prompt."""
    etd = config.etd
    wanted = {"route"} if etd is not None and etd.use_layer_router else set()
    if etd is not None and etd.use_lora_experts and etd.lora_expert.granularity == "sequence":
        wanted.add("branch")
    return wanted <= set(decisions)


def with_decisions(config: Qwen3NextConfig, inputs: Any, route: Any, branch: Any) -> Any:
    """The inputs of a call with a route and a branch, of one for all rows or one for each."""
    given = {name: x for name, x in (("route", route), ("branch", branch)) if x is not None}
    if not given:
        return inputs
    inputs = dict(inputs) if isinstance(inputs, dict) else {"token_ids": inputs}
    for name in given:
        if inputs.get(name) is not None:
            raise ValueError(
                f"Give the {name} once. Received: `{name}` as an argument and among the inputs"
            )
    rows = np.shape(inputs["token_ids"])[0]
    if route is not None:
        inputs["route"] = route_of_rows(config, route, rows)
    if branch is not None:
        branch = np.asarray(host_array("branch", branch))
        inputs["branch"] = np.broadcast_to(branch, (rows,)) if branch.ndim == 0 else branch
    return inputs


def route_of_rows(config: Qwen3NextConfig, route: Any, rows: int) -> np.ndarray:
    """A route `(L,)` or `(B, L)` as an int32 array `(B, L)`, checked."""
    array = host_array("route", route)
    if array.ndim == 1:
        array = np.broadcast_to(array, (rows, *array.shape))
    _check_route(config, array, rows)
    return array.astype("int32")


def check_inputs(config: Qwen3NextConfig, inputs: Any) -> None:
    """Raises `ValueError` for token ids and decisions that the model cannot follow, before a
    compiled step meets their values; shapes are left to it."""
    check_token_ids(inputs, config.vocab_size)
    if not isinstance(inputs, dict) or not hasattr(inputs.get("token_ids"), "shape"):
        return
    found = {name: host_values(name, inputs.get(name)) for name in BY_ROW}
    for name, values in found.items():
        if values is not None and not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"`{name}` must be integers. Received: {name}.dtype={values.dtype}")
    branch = found["branch"]
    # One expert for each iteration, of which a run may have others than the configuration.
    iterations = branch.shape[1] if branch is not None and branch.ndim == 2 else None
    check_decisions(config, Inputs(inputs["token_ids"], **found), iterations)


def check_decisions(
    config: Qwen3NextConfig, inputs: Inputs, think_iterations: int | None = None
) -> None:
    """Raises `ValueError` for decisions that the model cannot follow.

    Looks at values where there are some; inside a compiled function there are none.

    Args:
        config: The model's.
        inputs: `Inputs`.
        think_iterations: Iterations of the call, `None` for the configuration's.
    """
    etd = config.etd
    if inputs.route is not None:
        values = host_values("route", inputs.route)
        _check_route(config, inputs.route if values is None else values, inputs.token_ids.shape[0])
    if inputs.branch is not None:
        if etd is None or not etd.use_lora_experts:
            raise ValueError(
                "A `branch` needs a model with LoRA experts, `ETDConfig(use_lora_experts=True)`. "
                f"Received: branch={shown(inputs.branch)}, etd={etd}"
            )
        values, most = host_values("branch", inputs.branch), etd.num_lora_experts - 1
        if values is not None and not ((values >= -1) & (values <= most)).all():
            raise ValueError(
                f"`branch` must be -1 (none) to {most}. Received: branch={shown(values)}"
            )
        shape = tuple(inputs.branch.shape)
        iterations = think_iterations or etd.max_think_iterations
        if shape[1:] not in ((), (iterations,)):
            raise ValueError(
                "`branch` must have one expert for each row, or one for each row and each of the "
                f"{iterations} iterations. Received: branch.shape={shape}"
            )
    if inputs.prompt_mask is None:
        return
    if not reads_prompts(config):
        raise ValueError(
            "A `prompt_mask` is for models whose routers read prompts, with `use_layer_router` or "
            f"with `use_lora_experts` of granularity 'sequence'. Received: etd={etd}"
        )
    if inputs.segment_ids is not None:
        raise ValueError(
            "Routers decide for a row: `segment_ids` must be None with a `prompt_mask`. "
            f"Received: segment_ids={shown(inputs.segment_ids)}"
        )


def _check_route(config, route, rows):
    etd = config.etd
    if etd is None or not etd.use_layer_router:
        raise ValueError(
            "A `route` needs a model with layer routers, `ETDConfig(use_layer_router=True)`. "
            f"Received: route={shown(route)}, etd={etd}"
        )
    count = etd.n_think_layers
    shape, is_array = tuple(route.shape), isinstance(route, np.ndarray)
    if len(shape) != 2 or shape[1] != count or (None not in (shape[0], rows) and shape[0] != rows):
        raise ValueError(
            f"`route` must have an action for each of the {count} think layers, for all of the "
            f"{rows} rows at once or for each. Received: route.shape={shape}"
        )
    if is_array and not (np.issubdtype(route.dtype, np.integer) and np.isin(route, ACTIONS).all()):
        raise ValueError(
            "`route` must hold actions, 0 (skip), 1 (execute) and 2 (repeat). "
            f"Received: route={shown(route)}"
        )


def lacks_prompts(config: Qwen3NextConfig, inputs: Inputs) -> bool:
    """Whether a model would decide from prompts that it is not given."""
    known = inputs.prompt_mask is not None or inputs.segment_ids is not None
    return reads_prompts(config) and not known


def with_prompts(config: Qwen3NextConfig, inputs: Inputs, labels: Tensor | None) -> Inputs:
    """The inputs with the prompt of every row, where routers decide from it.

    The prompt is what comes before the first prediction that counts: all tokens up to and with the
    first one that has a label. Nothing behind them is seen before it is to be predicted. Without
    labels it is the whole row. Rows of packed sequences have none: routers decide for a row.

    Args:
        config: The model's.
        inputs: `Inputs`; a prompt mask that is there already stays.
        labels: `(B, T)` int32 that line up with the logits, -100 where ignored, or `None`.
    """
    if not lacks_prompts(config, inputs):
        return inputs
    if labels is None:
        return inputs._replace(prompt_mask=ops.ones_like(inputs.token_ids, "bool"))
    return inputs._replace(prompt_mask=up_to_first_label(labels))


def up_to_first_label(labels: Annotated[Tensor, "B T"]) -> Annotated[Tensor, "B T"]:
    """True at all tokens up to and with the first one whose label, as they line up with the logits,
    is not -100."""
    counts = ops.cast(labels != IGNORE, "int32")
    before = ops.cumsum(counts, axis=1) - counts
    return before == 0
