"""Generation of models with layer routers and LoRA experts: what is decided for a prompt holds."""

import functools

import numpy as np

from qwen3_next import Qwen3Next
from qwen3_next.generation.generator import Generator
from tests.support.routed_models import routed
from tests.support.running import to_numpy

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1], [30, 41], [17, 3, 59, 20, 11]]


@functools.cache
def speaking():
    return routed(Qwen3Next)


def test_generation_is_the_uncached_forward_pass():
    model, prompt = speaking(), PROMPTS[1]
    (tokens,), stats = model.generate([prompt], 8, use_speculative=False)
    ids = np.concatenate([prompt, tokens])[None]
    asked = {"token_ids": ids, "prompt_mask": np.arange(ids.shape[1])[None] < len(prompt)}
    predicted = to_numpy(model(asked)).argmax(-1)[0]
    np.testing.assert_array_equal(predicted[len(prompt) - 1 : -1], tokens)
    assert stats["router_actions"] == [
        np.bincount([a], minlength=3).tolist() for a in stats["route"][0]
    ]


def test_a_prompt_is_decided_as_a_whole_whatever_the_chunk():
    model = speaking()
    expected = model.decide(PROMPTS)
    generator = Generator(model, prefill_chunk=2)
    found = generator.generate(PROMPTS, 4, use_speculative=False)
    np.testing.assert_array_equal(found.stats["route"], expected["route"])
    given = generator.generate(PROMPTS, 4, use_speculative=False, **expected)  # in chunks of two
    streamed = np.stack(list(model.stream(PROMPTS, 4)), axis=1)
    for row, (a, b) in enumerate(zip(found.tokens, given.tokens)):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, streamed[row])


def test_what_was_decided_is_told():
    model = speaking()
    _, stats = model.generate(PROMPTS, 4, use_speculative=False)
    counts = np.array(stats["router_actions"]).sum(0)
    found = model.get_router_stats()
    assert [found[f"{name}_count"] for name in ("skip", "execute", "repeat")] == counts.tolist()
    skipped = [1 + layer for layer in range(2) if (stats["route"][:, layer] == 0).any()]
    assert found["skip_layers"] == skipped
    told = model.get_metrics()["etd"]
    assert told["router_actions"] == stats["router_actions"]
    assert told["expert_selections"] == stats["expert_selections"]
    model.reset_stats()
    assert model.get_router_stats()["execute_count"] == 0
