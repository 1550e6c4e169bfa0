"""Every setting of layer routers and LoRA experts does something."""

import dataclasses

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


def what_it_does(router=(), expert=()):
    """Yields weights, what a call and a training step compute, and the selection bias after it."""
    etd = {**ETD, **ROUTES, **EXPERTS, "max_think_iterations": 2, "adaptive_depth": False}
    etd["layer_router"] = {**ROUTES["layer_router"], **dict(router)}
    etd["lora_expert"] = {"rank": 4, **dict(expert)}
    model = small(Qwen3Next, **{**PLAIN, "mlp_only_layers": ()}, etd=etd)
    yield {v.path: v.shape for v in model.weights}
    loop = model.backbone.think_loop
    learn(loop)
    called = model.backbone(ASKED, full_output=True)
    yield to_numpy(called.thinking.route_logits)
    yield to_numpy(called.hidden)
    keras.utils.set_random_seed(1)
    trained = model.backbone(ASKED, full_output=True, training=True)
    yield to_numpy(trained.hidden)
    cost = thinking_loss(model.config, trained.thinking)
    yield np.zeros(()) if cost is None else to_numpy(cost)
    model.update_expert_bias()
    yield to_numpy(loop.expert_router.selection_bias.value)


def same(a, b):
    return a == b if isinstance(a, dict) else np.array_equal(a, b)


@pytest.mark.skipif(BACKEND != "jax", reason="a property of the configuration")
@pytest.mark.parametrize(
    ("kind", "changes", "part"),
    [(LayerRouterConfig, ROUTER, "router"), (LoRAExpertConfig, EXPERT, "expert")],
)
def test_every_field_is_live(kind, changes, part):
    base = list(what_it_does())
    for field in dataclasses.fields(kind):
        try:
            found = what_it_does(**{part: {field.name: changes[field.name]}})
            # Computed up to the first difference.
            assert not all(map(same, base, found)), field.name
        except ValueError as error:
            assert field.name in str(error)
