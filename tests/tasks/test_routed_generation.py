"""Generation of models with layer routers and LoRA experts: what is decided for a prompt holds."""

import functools

import numpy as np
import pytest

from qwen3_next import MTPConfig, Qwen3Next, pad
from qwen3_next.models.compiled import compile_with_weights
from tests.support.mtp_models import DENSE
from tests.support.routed_models import learn, routed
from tests.support.running import to_numpy, to_tensors
from tests.support.small_models import ONE_LAYER

# One layer, a DeltaNet, which thinks: its states must be those of the tokens that stay.
LOOP = {
    "n_think_layers": 1,
    "router_warmup_steps": 1,
    "lora_expert": {"rank": 4, "target_modules": ["in_proj_qkvz"]},
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1], [30, 41], [17, 3, 59, 20, 11]]


@functools.cache
def speaking(granularity="sequence"):
    mtp = MTPConfig(num_predict_tokens=1, speculation_lookahead=1)
    etd = {**LOOP, "lora_expert": {**LOOP["lora_expert"], "granularity": granularity}}
    model = routed(Qwen3Next, mtp=mtp, **{**ONE_LAYER, **DENSE}, etd=etd)
    learn(model.backbone.think_loop, seed=11)  # skips, runs and repeats it
    model.backbone.think_loop.steps.assign(1)  # the warm-up is over
    return model


@functools.cache
def _forward(model):
    return compile_with_weights(model, lambda inputs: model(inputs))


def test_generation_is_the_uncached_forward_pass_and_counts_no_steps():
    model = speaking()
    tokens, stats = model.generate(PROMPTS, 8, use_speculative=False)
    whole = pad([np.concatenate(pair) for pair in zip(PROMPTS, tokens)], length=16)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    asked = {**whole, "prompt_mask": np.arange(16) < lengths[:, None]}
    predicted = to_numpy(_forward(model)(to_tensors(asked))).argmax(-1)
    for row, length, new in zip(predicted, lengths, tokens):
        np.testing.assert_array_equal(row[length - 1 : length + 7], new)
    assert stats["router_actions"] == [
        np.bincount(actions, minlength=3).tolist() for actions in stats["route"].T
    ]
    assert int(model.backbone.think_loop.steps.value) == 1


def test_speculation_is_greedy_on_every_route():
    model = speaking()
    plain, stats = model.generate(PROMPTS, 8, use_speculative=False)
    drafted, speculative = model.generate(PROMPTS, 8, use_speculative=True)
    for a, b in zip(plain, drafted):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(stats["route"], speculative["route"])
    assert set(stats["route"].flat) == {0, 1, 2}


@pytest.mark.parametrize("options", [{}, {"granularity": "token"}], ids=["by row", "by token"])
def test_choices_are_counted_for_the_tokens_that_stay(options):
    model = speaking(**options)
    plain = model.generate(PROMPTS, 8, use_speculative=False).stats
    speculative = model.generate(PROMPTS, 8, use_speculative=True).stats
    assert speculative["expert_selections"] == plain["expert_selections"]
    iterations = plain["think_iterations"] * 7 * len(PROMPTS)  # the prompt gives a token itself
    np.testing.assert_allclose(sum(plain["expert_selections"]), iterations, rtol=1e-6)


def test_a_prompt_is_decided_as_a_whole_whatever_the_chunk(monkeypatch):
    model = speaking()
    expected = model.decide(PROMPTS)
    streamed = np.stack(list(model.stream(PROMPTS, 8)), axis=1)
    monkeypatch.setattr(model.generator, "prefill_chunk", 2)
    found = model.generate(PROMPTS, 8, use_speculative=False)
    np.testing.assert_array_equal(found.stats["route"], expected["route"])
    given = model.generate(PROMPTS, 8, use_speculative=False, **expected)  # in chunks of two
    for row, (a, b) in enumerate(zip(found.tokens, given.tokens)):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, streamed[row])


def test_what_was_decided_is_told():
    model = speaking()
    _, stats = model.generate(PROMPTS, 8, use_speculative=False)
    counts = np.array(stats["router_actions"]).sum(0)
    found = model.get_router_stats()
    assert [found[f"{name}_count"] for name in ("skip", "execute", "repeat")] == counts.tolist()
    assert found["skip_layers"] == [0]
    told = model.get_metrics()["etd"]
    assert told["router_actions"] == stats["router_actions"]
    assert told["expert_selections"] == stats["expert_selections"]
    model.reset_stats()
    assert model.get_router_stats()["execute_count"] == 0
