"""Small backbones with a think loop, and compiled calls to them."""

import functools

import keras
import numpy as np

from qwen3_next import Qwen3NextBackbone
from qwen3_next.models.compiled import compile_with_weights
from tests.support.running import to_numpy, to_tensors
from tests.support.small_models import SMALL, small

# One encoder layer with experts; full attention, and a DeltaNet with experts, that think.
ETD = {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 0, "max_think_iterations": 3}
FIXED = {"adaptive_depth": False}
KINDS = {
    "fixed": FIXED,
    "injected": {**FIXED, "input_injection": True},
    "token": {},
    "sequence": {"granularity": "sequence", "inference_state": "final"},
}


def thinking(model=Qwen3NextBackbone, kind="token", **changes):
    """A small model that thinks, with the same weights every time."""
    etd = {**ETD, **KINDS[kind], **changes.pop("etd", {})}
    if model is Qwen3NextBackbone:  # paths as they are inside of a language model
        changes = {"name": "model", **changes}
    made = small(model, etd=etd, **changes)
    loop = getattr(made, "backbone", made).think_loop
    rng = np.random.default_rng(7)
    if loop.halting_unit is not None:  # as different from token to token as trained ones
        loop.halting_unit.score.kernel.assign(rng.normal(size=(SMALL["hidden_size"], 1)) * 0.4)
    if loop.injection is not None:
        loop.injection.kernel.assign(rng.normal(size=loop.injection.kernel.shape) * 0.1)
    return made


@functools.cache
def shared_thinking(kind):
    """One such backbone for all tests that do not change it."""
    return thinking(kind=kind)


def think(model, inputs, cache=None, **options):
    """`model(inputs, ...)` through a compiled call: a `BackboneOutput`."""
    options = {"full_output": True, **options}
    inputs = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
    function = _call(model, tuple(sorted(options.items())))
    return function(to_tensors(inputs), *([] if cache is None else [cache]))


@functools.cache
def _call(model, options):
    def call(inputs, cache=None):
        return model(inputs, cache=cache, **dict(options))

    return compile_with_weights(model, call)


def hidden(model, inputs, **options):
    return to_numpy(think(model, inputs, **options).hidden)


@functools.cache
def _commit(model):
    return compile_with_weights(model, lambda *args: model.commit(*args))


def commit(model, cache, update, counts):
    return _commit(model)(cache, update, keras.ops.convert_to_tensor(np.asarray(counts, "int32")))
