"""Small models whose rows think through different layers and with different experts."""

import contextlib
import functools

import numpy as np

from qwen3_next import Qwen3NextBackbone
from tests.support.running import to_numpy
from tests.support.small_models import random_ids, small

ETD = {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 0, "max_think_iterations": 3}
ROUTES = {
    "use_layer_router": True,
    "layer_router": {"hidden_size": 16, "window_size": 2, "num_windows": 4},
    "router_warmup_steps": 0,
}
EXPERTS = {
    "use_lora_experts": True,
    "num_lora_experts": 3,
    "lora_expert": {"rank": 4},
    "expert_warmup_steps": 0,
}
BY_TOKEN = {"lora_expert": {"rank": 4, "granularity": "token", "target_modules": ["block_output"]}}
FIXED = {"adaptive_depth": False}
KINDS = {
    "routes": {**ROUTES, **FIXED},
    "experts": {**EXPERTS, **FIXED},
    "both": {**ROUTES, **EXPERTS},
    "by token": {**ROUTES, **EXPERTS, **BY_TOKEN},
}
# A layer of each mixer, which think and are all there is. One kind has an MoE as well.
LAYERS = {"num_layers": 2, "layer_types": ("full_attention", "linear_attention")}
DENSE = {"num_experts": 0, "mlp_only_layers": ()}
MOE = {"mlp_only_layers": (0,)}
# Experts in what decides over the content of a cache stand for those in all projections.
IN_CACHES = {"lora_expert": {"rank": 4, "target_modules": ["k_proj", "in_proj_qkvz"]}}
# Routes and experts of rows together, and experts that every token picks.
MIXED = ["both", "by token"]

# What they read: rows of tokens, their prompts, and a route for each.
LENGTH, PROMPT = 20, 12
IDS = random_ids(4, LENGTH)
PROMPTS = np.repeat(np.arange(LENGTH)[None] < PROMPT, 4, axis=0)
WHOLE = {"token_ids": IDS, "prompt_mask": PROMPTS, "padding_mask": np.ones_like(PROMPTS)}
FIRST = {"token_ids": IDS[:, :PROMPT], "prompt_mask": PROMPTS[:, :PROMPT]}
ROUTE = np.array([[0, 2], [1, 1], [2, 0], [0, 0]])
# The last row alone runs the first think layer.
ONE_RUNS = np.array([[0, 1], [0, 1], [0, 1], [1, 1]])
TOLERANCE = 5e-5


def routed(model=Qwen3NextBackbone, kind="both", **changes):
    """A small model with routers and experts as if they had learned, always the same."""
    etd = {**ETD, "n_encoder_layers": 0, **KINDS[kind], **changes.pop("etd", {})}
    changes = {**LAYERS, **(MOE if kind == "by token" else DENSE), **changes}
    if model is Qwen3NextBackbone:  # paths as they are inside of a language model
        changes = {"name": "model", **changes}
    made = small(model, etd=etd, **changes)
    learn(getattr(made, "backbone", made).think_loop)
    return made


def learn(loop, seed=4):
    """Gives what is new in a loop other weights, so that rows are told apart."""
    rng = np.random.default_rng(seed)

    def draw(variable, scale):
        variable.assign(rng.normal(size=variable.shape) * scale)

    if loop.halting_unit is not None:
        draw(loop.halting_unit.score.kernel, 0.4)
    for router in loop.routers:
        draw(router.features.kernel, 1.0)
        draw(router.score.kernel, 3.0)
    if loop.expert_router is not None:
        draw(loop.expert_router.score.kernel, 1.0)
    for experts in loop.experts:
        for expert in experts.values():
            draw(expert.lora_a, 0.2)
            draw(expert.lora_b, 0.1)


@functools.cache
def shared_routed(kind):
    """One such backbone for all tests that leave it as they found it."""
    return routed(kind=kind, etd=IN_CACHES if kind == "both" else {})


@contextlib.contextmanager
def broken_layer(model):
    """The model with a first think layer that gives NaN for every row that runs it."""
    kernel = model.decoder_layers[0].mixer.q_proj.kernel
    before = np.array(to_numpy(kernel.value))
    kernel.assign(np.full(kernel.shape, np.nan))
    try:
        yield model
    finally:
        kernel.assign(before)
