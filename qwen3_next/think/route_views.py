"""What routes cost, and pictures of what routers decide."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.model_config import LINEAR
from qwen3_next.config.validation import integer, is_list_of, require, shown
from qwen3_next.models.inputs import host_array
from qwen3_next.models.schedule import Schedule
from qwen3_next.models.weight_table import weight_table
from qwen3_next.think.figures import axes_for

ACTIONS = ("skip", "execute", "repeat")
COLOURS = ("#d9d9d9", "#5b8db8", "#d1605e")


def route_flops(
    config: Qwen3NextConfig,
    route: Any = None,
    *,
    context: int = 0,
    think_iterations: int | None = None,
) -> np.ndarray:
    """Floating-point operations that a token costs on a route.

    Two for each weight that it meets (an MoE layer counts the experts that it is routed to), in
    attention four times the query width for each token that it sees, in a DeltaNet six for each
    element of the state. Layers outside of the loop and the head are counted, routers are not.

    Args:
        config: `Qwen3NextConfig` of a model with a think loop.
        route: Passes of every think layer in an iteration, `(L,)`, or `(B, L)` for a number per
            row; whole ones of a route, or expected ones. `None` for one of each.
        context: Tokens before it.
        think_iterations: Iterations of the loop, `None` for the most.

    Returns:
        `()` or `(B,)` float64.

    Raises:
        ValueError: a configuration without a think loop, or a route of another length.

    Example:

    ```python
    from qwen3_next import ETDConfig, Qwen3NextConfig, route_flops

    config = Qwen3NextConfig.from_variant("tiny", etd=ETDConfig(1, 4, 1, use_layer_router=True))
    assert route_flops(config, [0, 1, 0, 1]) < route_flops(config)
    ```
    """
    etd = config.etd if isinstance(config, Qwen3NextConfig) else None
    if etd is None:
        raise ValueError(
            f"`config` must be a Qwen3NextConfig that has a think loop. Received: config={config}"
        )
    require(integer(0), "context", context)
    passes = np.ones(etd.n_think_layers) if route is None else host_array("route", route)
    if (
        passes.ndim not in (1, 2)
        or passes.shape[-1] != etd.n_think_layers
        or not _are_counts(passes)
    ):
        raise ValueError(
            f"`route` must hold a number of passes for each of the {etd.n_think_layers} think "
            f"layers. Received: route={shown(route)}"
        )
    schedule = Schedule.from_config(config)
    schedule.check_iterations(think_iterations)
    iterations = think_iterations or schedule.max_iterations
    costs = np.array([_layer_flops(config, layer, context) for layer in range(config.num_layers)])
    first, behind = etd.get_layer_ranges()["think"]
    outside = costs[:first].sum() + costs[behind:].sum()
    head = 2 * config.hidden_size * config.vocab_size
    return outside + head + iterations * (passes * costs[first:behind]).sum(-1)


def plot_router_actions(actions: Any, path: Any = None, ax: Any = None, first: int = 0) -> Any:
    """Draws for every think layer how many rows skip, run and repeat it.

    Args:
        actions: `(L, 3)` counts, as `get_metrics()["etd"]["router_actions"]`.
        path: File to write the figure to, or `None`.
        ax: Matplotlib axes to draw on. `None` for a new figure, which is closed once it is written.
        first: Number of the first layer.

    Returns:
        The axes.

    Raises:
        ValueError: counts of another shape, or a layer without any.

    Example:

    ```python
    from qwen3_next import plot_router_actions

    axes = plot_router_actions([[3, 1, 0], [0, 2, 2]], path="actions.png")
    assert len(axes.patches) == 6
    ```
    """
    counts = host_array("actions", actions)
    if (
        counts.ndim != 2
        or counts.shape[1] != len(ACTIONS)
        or not (len(counts) and _are_counts(counts) and (counts.sum(1) > 0).all())
    ):
        raise ValueError(
            "`actions` must be counts (layers, 3), some for every layer. "
            f"Received: actions={shown(actions)}"
        )
    require(integer(0), "first", first)
    shares = counts / counts.sum(1, keepdims=True)
    layers, bottom = np.arange(first, first + len(counts)), np.zeros(len(counts))
    with axes_for(path, ax) as ax:
        for action, (name, colour) in enumerate(zip(ACTIONS, COLOURS)):
            ax.bar(layers, shares[:, action], bottom=bottom, color=colour, label=name)
            bottom += shares[:, action]
        ax.set(xlabel="layer", ylabel="share of rows", title="Routes", ylim=(0, 1), xticks=layers)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    return ax


def plot_expert_shares(
    selections: Any,
    labels: Sequence[str] | None = None,
    path: Any = None,
    ax: Any = None,
) -> Any:
    """Draws how often each LoRA expert was chosen, all in all or for every kind of input.

    Args:
        selections: `(N,)` counts, as `get_metrics()["etd"]["expert_selections"]`, or
            `(kinds, N)`.
        labels: A name for each kind.
        path: File to write the figure to, or `None`.
        ax: Matplotlib axes to draw on. `None` for a new figure, which is closed once it is written.

    Returns:
        The axes.

    Raises:
        ValueError: counts of another shape, or a kind without any.

    Example:

    ```python
    from qwen3_next import plot_expert_shares

    axes = plot_expert_shares([[3, 1], [0, 4]], ["sums", "products"], path="experts.png")
    assert len(axes.patches) == 4
    ```
    """
    counts = np.atleast_2d(host_array("selections", selections))
    if counts.ndim != 2 or not (_are_counts(counts) and (counts.sum(1) > 0).all()):
        raise ValueError(
            "`selections` must be counts (experts,) or (kinds, experts), some for every kind. "
            f"Received: selections={shown(selections)}"
        )
    if labels is not None and not (
        is_list_of(labels, lambda label: isinstance(label, str)) and len(labels) == len(counts)
    ):
        raise ValueError(
            f"`labels` must name each of the {len(counts)} kinds. Received: labels={shown(labels)}"
        )
    shares, experts = counts / counts.sum(1, keepdims=True), np.arange(counts.shape[1])
    width = 0.8 / len(shares)
    with axes_for(path, ax) as ax:
        for kind, row in enumerate(shares):
            places = experts + (kind - (len(shares) - 1) / 2) * width
            ax.bar(places, row, width=width, label=None if labels is None else labels[kind])
        ax.axhline(1 / len(experts), color="0.4", linestyle=":", linewidth=1)
        ax.set(xlabel="expert", ylabel="share", title="Chosen experts", xticks=experts)
        if labels is not None:
            ax.legend(frameon=False)
    return ax


def _are_counts(values):
    return values.dtype.kind in "iuf" and bool(np.isfinite(values).all() and (values >= 0).all())


def _layer_flops(config, layer, context):
    prefix, weights = f"model/layers_{layer}/", 0.0
    for row in weight_table(config):
        if row.path.startswith(prefix):
            routed = row.part == "experts"
            share = config.num_experts_per_tok / config.num_experts if routed else 1.0
            weights += share * row.size
    if config.layer_types[layer] == LINEAR:
        heads, value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        return 2 * weights + 6 * heads * config.linear_key_head_dim * value_dim
    return 2 * weights + 4 * config.num_attention_heads * config.head_dim * (context + 1)
