"""Small models to grow, and what is asked of every way to grow them."""

import functools

import keras
import numpy as np

from qwen3_next import MTPConfig
from tests.support.mtp_models import DENSE, step_logits
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import TWO_LAYERS, called_once, random_ids, small

HYBRID = {**TWO_LAYERS, "mlp_only_layers": (1,)}  # an MoE layer with a shared expert, a dense one
# As Qwen3 is, without the gate and the rest.
PLAIN = {
    **DENSE,
    "num_layers": 2,
    "layer_types": ("full_attention", "full_attention"),
    "attention_type": "group_query_attention",
    "normalization_type": "rms_norm",
    "partial_rotary_factor": 1.0,
}
ONE_FULL = {"num_layers": 1, "layer_types": ("full_attention",)}
MTP = MTPConfig(num_predict_tokens=2, speculation_lookahead=2)
KINDS = {
    "hybrid": HYBRID,
    "plain": PLAIN,
    "tied": {**PLAIN, "tie_word_embeddings": True},
    "mtp": {**HYBRID, "mtp": MTP},
    "tied_mtp": {**DENSE, **ONE_FULL, "tie_word_embeddings": True, "mtp": MTP},
}
# All of them but the first, whose layers the fourth has as well: few programs are compiled.
CALLED = ("plain", "tied", "mtp", "tied_mtp")
IDS = random_ids(2, 9)


@functools.cache
def kind(name):
    """One of `KINDS`, for tests that do not change it; norms and gates are not as at first."""
    model = small(**KINDS[name])
    rng = np.random.default_rng(5)
    for variable in model.trainable_variables:
        if len(variable.shape) == 1:
            noise = 0.3 * rng.standard_normal(variable.shape)
            variable.assign_add(keras.ops.cast(noise, variable.dtype))
    return model


def all_logits(model, token_ids=IDS):
    """Logits of the model and of its MTP steps, one behind the other, `(tokens, vocab)`."""
    found = called_once(_all_logits, model)(keras.ops.convert_to_tensor(token_ids))
    rows = [keras.ops.convert_to_numpy(logits) for logits in found]
    return np.concatenate([logits.reshape(-1, logits.shape[-1]) for logits in rows])


def _all_logits(model, token_ids):
    steps = () if model.config.mtp is None else step_logits(model, token_ids)
    return model(token_ids), *steps


@functools.cache
def logits_of(name):
    """`all_logits` of `kind(name)`."""
    return all_logits(kind(name))


def snapshot(model):
    """All values of a model, to the bit."""
    return [(v.path, np.array(keras.ops.convert_to_numpy(v.value))) for v in model.variables]


def assert_unchanged(model, before):
    for (path, now), (_, then) in zip(snapshot(model), before, strict=True):
        assert now.tobytes() == then.tobytes(), path


def assert_learns(model, token_ids=IDS):
    """A step of training gives a finite loss and moves every matrix of the model."""
    before = dict(snapshot(model))
    model.compile(keras.optimizers.SGD(0.1), **CHEAPEST_STEPS)
    assert np.isfinite(model.train_on_batch(token_ids))
    for path, value in snapshot(model):
        if path.endswith("kernel"):
            assert (value != before[path]).any(), path
