"""Nothing but our own `ValueError` comes out of the doors of models, whatever is passed in.

Nothing is built or computed for a mutant: where real work would begin, `Begun` is raised.
"""

import contextlib
import functools
import random

import keras
import numpy as np
import pytest

from qwen3_next import (
    MTPConfig,
    Qwen3Next,
    Qwen3NextClassifier,
    Qwen3NextConfig,
    create_qwen3_next,
    self_distillation_data,
    wrap_model_with_mtp,
)
from qwen3_next.generation.generator import Generator
from qwen3_next.layers import TokenEmbedding
from tests.support.running import BACKEND
from tests.support.small_models import ONE_LAYER, SMALL, small

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="arguments are read on the host")

VALUES = [None, True, 0, -1, 3, 10**6, 2**31, 10**400, 2.5, float("nan"), 1e-40, "", "a", b"x", 1j]
VALUES += ["tiny", "float32", [], [1], ["a"], [None], [[1]], [[1.5]], [[1], [2, 3]], [[2**40]], {}]
VALUES += [{"a": 1}, {1: 2}, {"token_ids": 5}, {"token_ids": [[1], [2, 3]]}, {1, 2}, object()]
VALUES += [float, np.array(1), np.array(["a"]), np.ones((2, 3), "int32"), np.zeros((2, 2)), "\0"]
SAMPLING = ["temperature", "top_k", "top_p", "min_p", "seed", "stop_token_ids", "max_new_tokens"]
SPECULATION = ["use_speculative", "speculation_lookahead", "draft_vocabulary", "measure_baseline"]
SPECULATION += ["acceptance_threshold"]
OPTIONS = ["gradient_checkpointing", "freeze_backbone", "backbone", "lm_head", "name", "dtype"]
IDS = np.ones((2, 2), "int32")
POLICY = {"module": "keras", "class_name": "DTypePolicy", "registered_name": None}


class Begun(Exception):
    pass


def begin(self=None, *args, **kwargs):
    raise Begun


@functools.cache
def model():
    return small(**ONE_LAYER, mtp=MTPConfig(num_predict_tokens=2, speculation_lookahead=2))


@functools.cache
def classifier():
    return small(Qwen3NextClassifier, num_labels=3, **ONE_LAYER)


@functools.cache
def cache():
    return model().init_cache(2, 8)


@functools.cache
def config():
    return Qwen3NextConfig(**{**SMALL, **ONE_LAYER})


def one(rng):
    return rng.choice(VALUES)


def some(rng, names, count=2):
    return {rng.choice(names): one(rng) for _ in range(count)}


def either(rng, right):
    return rng.choice([right, one(rng)])


def mutant(fields, rng):
    return {**fields, **some(rng, [*fields, "extra"])}


DOORS = {
    "prompts": lambda rng: model().generate(one(rng), 2),
    "prompts in a dict": lambda rng: model().generate(
        {"token_ids": either(rng, IDS), "padding_mask": one(rng)}, 2
    ),
    "generate": lambda rng: model().generate([[1, 2]], **some(rng, SAMPLING + SPECULATION)),
    "stream": lambda rng: model().stream(either(rng, [[1]]), **some(rng, SAMPLING)),
    "init_cache": lambda rng: model().init_cache(either(rng, 2), one(rng)),
    "extend": lambda rng: model().extend(one(rng), cache()),
    "extend a dict": lambda rng: model().extend(
        {"token_ids": either(rng, IDS), "padding_mask": one(rng)}, cache()
    ),
    "cache": lambda rng: model().extend(IDS, one(rng)),
    "call": lambda rng: model()(one(rng)),
    "mtp_module": lambda rng: model().mtp_module(one(rng)),
    "labels": lambda rng: model()(IDS, labels=one(rng)),
    "classes": lambda rng: classifier().check_labels(one(rng)),
    "model": lambda rng: Qwen3Next(either(rng, config()), **some(rng, OPTIONS, 1)),
    "classifier": lambda rng: Qwen3NextClassifier(
        config(), num_labels=either(rng, 2), pad_token_id=one(rng)
    ),
    "saved model": lambda rng: Qwen3Next.from_config(mutant(model().get_config(), rng)),
    "saved policy": lambda rng: Qwen3Next.from_config(
        {**model().get_config(), "dtype": mutant({**POLICY, "config": {"name": one(rng)}}, rng)}
    ),
    "variant": lambda rng: Qwen3Next.from_variant(one(rng), **some(rng, [*SMALL], 1)),
    "factory": lambda rng: create_qwen3_next(
        either(rng, "tiny"), either(rng, "classification"), one(rng)
    ),
    "wrap": lambda rng: wrap_model_with_mtp(one(rng), one(rng), freeze_backbone=one(rng)),
    "self-distillation": lambda rng: self_distillation_data(
        either(rng, model()), one(rng), either(rng, 2), batch_size=either(rng, 2), progress=False
    ),
    "preset": lambda rng: Qwen3Next.from_preset(one(rng)),
}


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch):
    model(), classifier(), cache()
    monkeypatch.setattr(Generator, "_run", begin)
    monkeypatch.setattr(Generator, "prefill", begin)
    monkeypatch.setattr(TokenEmbedding, "__init__", begin)
    monkeypatch.setattr(TokenEmbedding, "__call__", begin)
    monkeypatch.setattr(model(), "_extend", begin)
    monkeypatch.setattr(keras.Variable, "assign", begin)


@pytest.mark.parametrize("door", DOORS)
def test_an_argument_is_accepted_or_refused_by_name(door):
    rng, refused = random.Random(door), 0
    for _ in range(150):
        with contextlib.suppress(Begun):
            try:
                DOORS[door](rng)
            except ValueError as error:
                assert "Received" in str(error) or "Unknown" in str(error)
                refused += 1
    assert refused > 20
