"""Models whose layers are those of another, in another order and number.

An arrangement is a list that gives for every layer of the new model the layer it comes from.
"""

import re
from collections.abc import Sequence
from typing import Any

from qwen3_next.config import Qwen3NextConfig

_OF_A_LAYER = re.compile(r"model/layers_(\d+)/(.*)")


def layer_of(path: str) -> int | None:
    """The decoder layer of the backbone that a weight belongs to, `None` for another weight."""
    found = _OF_A_LAYER.fullmatch(path)
    return None if found is None else int(found[1])


def source_path(path: str, arrangement: Sequence[int]) -> str:
    """Where a weight of the new model stands in the old one."""
    layer = layer_of(path)
    return path if layer is None else path_in_layer(path, arrangement[layer])


def path_in_layer(path: str, layer: int) -> str:
    """The path of the same weight of another decoder layer."""
    return _OF_A_LAYER.sub(rf"model/layers_{layer}/\2", path)


def arranged_config(config: Qwen3NextConfig, arrangement: Sequence[int]) -> Qwen3NextConfig:
    """The configuration of a model with these layers of another.

    Layer types and the choice of MoE layers follow the layers: where a `decoder_sparse_step` said
    which are MoE layers, `mlp_only_layers` does now.
    """
    changes: dict[str, Any] = {
        "num_layers": len(arrangement),
        "layer_types": [config.layer_types[layer] for layer in arrangement],
        "mlp_only_layers": [],
    }
    if config.num_experts:
        dense = [place for place, layer in enumerate(arrangement) if not config.is_moe(layer)]
        changes |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return config.replace(**changes)


def require_no_think_loop(function: str, config: Qwen3NextConfig) -> None:
    """Raises `ValueError` for a model with a think loop, whose weights are tied to its layers."""
    if config.etd is not None:
        raise ValueError(
            f"`{function}` takes a model without a think loop: routers, experts and counts of "
            "layers belong to the layers that think. Give the model its loop afterwards. "
            f"Received: etd={config.etd}"
        )
