"""Sparse upcycling: a dense model becomes a mixture of experts (MoE).

y = sum over the top k of w_e FFN_e(x)       FFN_e = FFN, sum w_e = 1, so y = FFN(x)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import (
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    integer,
    is_list_of,
    optional_integer,
    require,
)
from qwen3_next.models.weight_rows import Weight
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.named_weights import NamedWeights, rebuilt, require_model


def upcycle_dense_to_moe(
    model: Task,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    expert_init_noise: float = 0.0,
    router_init_std: float = 0.02,
    layers: Sequence[int] | None = None,
    shared_expert_intermediate_size: int = 0,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """An MoE model whose experts are copies of a dense model's feed-forward networks.

        W_0 = W        W_e = W + expert_init_noise * std(W) * N(0, 1)   for every other expert e

    Without noise it computes what the model computes: the weights of the chosen experts sum to 1
    (`norm_topk_prob`), and the experts are equal. They then all get the gradient of the same
    function, apart from the tokens they are sent, and the routers learn from the load-balancing
    loss alone, `router_aux_loss_coef` of the model; with noise from the task as well. MTP modules
    with a transformer body become MoE as the layers do. The model stays as it is.

    Args:
        model: Dense `Qwen3Next` or `Qwen3NextClassifier`.
        num_experts: Experts of a layer, each as wide as the dense network, `intermediate_size`.
        num_experts_per_tok: Experts per token.
        expert_init_noise: Noise on the weights of all experts but the first, relative to the
            standard deviation of each matrix.
        router_init_std: Standard deviation of the routers' normal weights; 0 would send all tokens
            to the same experts.
        layers: Layers to become MoE layers, `None` for all; the others are in `mlp_only_layers`.
        shared_expert_intermediate_size: Width of a shared expert that sees every token, 0 for none.
            Its output projection and its gate begin at 0: it adds nothing until it has learned.
        seed: Seed of noise, routers and shared experts. `None` for another one every time.
        name: Name of the new model, `None` for Keras' choice.

    Returns:
        A model of the same class.

    Raises:
        ValueError: a model with experts, a layer that is not there, or a value out of range.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.growth.sparse_upcycling import upcycle_dense_to_moe

    model = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=2, num_experts=0, intermediate_size=48
    )
    sparse = upcycle_dense_to_moe(model, num_experts=4)
    token_ids = np.array([[1, 2, 3]])
    assert sparse.config.moe_layers == [0, 1]
    assert np.abs(np.subtract(sparse(token_ids), model(token_ids))).max() < 1e-5
    ```

    Reference: Sparse Upcycling, arXiv 2212.05055.
    """
    require_model("model", model)
    require(NOT_NEGATIVE, "expert_init_noise", expert_init_noise)
    require(POSITIVE, "router_init_std", router_init_std)
    require(optional_integer(0), "seed", seed)
    config = _sparse_config(
        model.config,
        num_experts,
        num_experts_per_tok,
        shared_expert_intermediate_size,
        _moe_layers(model.config.num_layers, layers),
    )
    weights, rng = NamedWeights(model), np.random.default_rng(seed)

    def make(row):
        if row.path in weights:
            return weights[row.path]
        return _expert_weight(row, weights, rng, expert_init_noise, router_init_std, config)

    return rebuilt(model, config, make, name)


def _moe_layers(num_layers, layers):
    if layers is None:
        return list(range(num_layers))
    inside = integer(0, num_layers - 1)
    rule = Rule(
        f"None or a list of different layers, 0 to {num_layers - 1}, that is not empty",
        lambda value: is_list_of(value, inside.fits) and 0 < len(value) == len(set(value)),
    )
    require(rule, "layers", layers)
    return list(layers)


def _sparse_config(
    config: Qwen3NextConfig, experts: int, per_token: int, shared: int, layers: list[int]
) -> Qwen3NextConfig:
    if config.num_experts:
        raise ValueError(
            "`model` must be dense, `num_experts=0`; `grow_model_width` copies experts. "
            f"Received: a model with num_experts={config.num_experts}"
        )
    require(integer(1), "num_experts", experts)
    return config.replace(
        num_experts=experts,
        num_experts_per_tok=per_token,
        moe_intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=True,
        mlp_only_layers=[layer for layer in range(config.num_layers) if layer not in layers],
        decoder_sparse_step=1,
    )


def _expert_weight(
    row: Weight,
    weights: NamedWeights,
    rng: np.random.Generator,
    noise: float,
    router_std: float,
    config: Qwen3NextConfig,
) -> np.ndarray:
    """A weight of an MoE layer, of the dense network that it stands for."""
    base, leaf = row.path.split("/mlp/")
    if leaf == "gate/kernel":
        return router_std * rng.standard_normal(row.shape, "float32")
    if leaf in ("shared_expert/gate_proj/kernel", "shared_expert/up_proj/kernel"):
        return config.initializer_range * rng.standard_normal(row.shape, "float32")
    if leaf in ("shared_expert/down_proj/kernel", "shared_expert_gate/kernel"):
        return np.zeros(row.shape, "float32")
    names = {"experts/gate_up": ("gate_proj", "up_proj"), "experts/down": ("down_proj",)}[leaf]
    stack = np.empty(row.shape, "float32")
    places = np.split(stack, len(names), axis=-1)  # views
    for name, place in zip(names, places):
        dense = weights[f"{base}/mlp/{name}/kernel"].astype("float32")
        place[:] = dense
        if noise:
            for expert in place[1:]:
                expert += noise * dense.std() * rng.standard_normal(dense.shape, "float32")
    return stack
