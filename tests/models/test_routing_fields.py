"""Every setting of layer routers and LoRA experts does something."""

import dataclasses
import functools

import keras
import numpy as np
import pytest

from qwen3_next import LayerRouterConfig, LoRAExpertConfig, Qwen3Next
from qwen3_next.training.thinking_metrics import thinking_loss
from tests.support.routed_models import EXPERTS, ROUTES, learn
from tests.support.running import BACKEND, to_numpy
from tests.support.small_models import random_ids, small

IDS = random_ids(4, 12)
ASKED = {"token_ids": IDS, "prompt_mask": np.ones((4, 12), bool)}
ETD = {"n_encoder_layers": 0, "n_think_layers": 1, "n_decoder_layers": 0}
PLAIN = {"num_layers": 1, "layer_types": ["linear_attention"], "num_experts": 0}
ROUTER = {"num_actions": 2, "use_gumbel": True, "execute_bias": 0.5, "temperature": 0.5}
ROUTER |= {"hidden_size": 8, "window_size": 5, "num_windows": 2, "budget_weight": 0.1}
ROUTER |= {"compute_budget": 0.5}
EXPERT = {"rank": 2, "alpha": 8.0, "dropout": 0.5, "target_modules": ["out_proj"]}
EXPERT |= {"granularity": "token", "reselect": False, "bias_update_rate": 0.5}


@functools.cache
def what_it_does(router=(), expert=()):
    """Weights, what a call and a training step compute, and the selection bias after it."""
    etd = {**ETD, **ROUTES, **EXPERTS, "max_think_iterations": 2, "adaptive_depth": False}
    etd["layer_router"] = {**ROUTES["layer_router"], **dict(router)}
    etd["lora_expert"] = {"rank": 4, **{k: _list(v) for k, v in expert}}
    model = small(Qwen3Next, **{**PLAIN, "mlp_only_layers": ()}, etd=etd)
    loop = model.backbone.think_loop
    learn(loop)
    found = [model.backbone(ASKED, full_output=True).thinking.route_logits]
    found.append(model(ASKED))
    keras.utils.set_random_seed(1)
    trained = model.backbone(ASKED, full_output=True, training=True)
    cost = thinking_loss(model.config, trained.thinking)
    found += [trained.hidden, np.zeros(()) if cost is None else cost]
    model.update_expert_bias()
    found.append(loop.expert_router.selection_bias.value)
    return {v.path: v.shape for v in model.weights}, [to_numpy(x) for x in found]


def _list(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.skipif(BACKEND != "jax", reason="a property of the configuration")
@pytest.mark.parametrize(
    ("kind", "changes", "part"),
    [(LayerRouterConfig, ROUTER, "router"), (LoRAExpertConfig, EXPERT, "expert")],
)
def test_every_field_is_live(kind, changes, part):
    base = what_it_does()
    for field in dataclasses.fields(kind):
        value = changes[field.name]
        value = tuple(value) if isinstance(value, list) else value
        try:
            weights, found = what_it_does(**{part: ((field.name, value),)})
        except ValueError as error:
            assert field.name in str(error)
            continue
        same = [np.array_equal(a, b) for a, b in zip(found, base[1]) if a.shape == b.shape]
        assert weights != base[0] or not all(same), field.name
