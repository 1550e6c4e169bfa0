"""Small models with modules for multi-token prediction, for the tests of several rooms."""

import functools

from qwen3_next import MTPConfig
from tests.support.small_models import random_ids, small

DENSE = {"num_experts": 0, "mlp_only_layers": (), "shared_expert_intermediate_size": 0}
# The backbone makes no difference to most of this: one small layer compiles soonest.
LIGHT = {**DENSE, "num_layers": 1, "layer_types": ("full_attention",)}
ROWS = [random_ids(n, seed=n) for n in (9, 14)]


@functools.cache
def two_steps():
    """Two steps, a transformer module; for tests that do not change it."""
    return small(**LIGHT, mtp=MTPConfig(num_predict_tokens=2, speculation_lookahead=2))


def step_logits(model, token_ids):
    """Logits of both steps over a whole row, by the model's own road to its losses."""
    hidden = model.mtp_input(model.backbone(token_ids, full_output=True))
    embedded = model.backbone.embed_tokens(token_ids)
    for step in (1, 2):
        rest = token_ids.shape[1] - step
        hidden = model.mtp_module(step)(embedded[:, step:], hidden[:, :rest])
        yield model.logits(hidden)
