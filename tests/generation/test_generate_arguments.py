"""Arguments of `generate` are what they must be, and nothing is coerced."""

import functools

import numpy as np
import pytest

from qwen3_next import MTPConfig
from tests.support.mtp_models import LIGHT
from tests.support.small_models import logits, random_ids, small


@functools.cache
def shared():
    """A model of one layer, for arguments that do not depend on layers."""
    return small(**LIGHT)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 1e-39),
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("top_k", True),
        ("top_p", "all"),
        ("min_p", float("inf")),
        ("seed", 1.5),
        ("seed", "one"),
        ("seed", True),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 3),
        ("stop_token_ids", [[1, 2]]),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", True),
    ],
)
def test_a_value_of_another_kind_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be.*Received"):
        shared().generate([[1, 2]], **{name: value})


def test_a_number_that_is_too_large_is_told_so():
    with pytest.raises(ValueError, match=r"`seed` must be .*below 2\*\*31. Received: seed=2147"):
        shared().generate([[1, 2]], temperature=1.0, seed=2**31)


@pytest.mark.parametrize("name, value", [("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)])
def test_what_only_sampling_reads_is_refused_without_it(name, value):
    with pytest.raises(ValueError, match=f"`{name}` needs a `temperature` above 0: .*{value}"):
        shared().generate([[1, 2]], **{name: value})


@pytest.mark.parametrize("vocabulary", [[0.5], [True], ["a"], 3])
def test_a_draft_vocabulary_holds_integers(vocabulary):
    mtp = MTPConfig(num_predict_tokens=1, speculation_lookahead=1, mtp_head_type="shared_lm_head")
    model = small(**LIGHT, mtp=mtp)
    with pytest.raises(ValueError, match="`draft_vocabulary` must be"):
        model.generate([[1, 2]], 2, draft_vocabulary=vocabulary)


def test_numbers_of_numpy_are_numbers():
    options = {"temperature": np.float32(0.5), "stop_token_ids": np.array([3])}
    whole = {"seed": np.int64(1), "top_k": np.int32(5)}
    found = shared().generate([[1, 2]], np.int64(2), **whole, **options).tokens
    expected = shared().generate([[1, 2]], 2, seed=1, top_k=5, **options).tokens
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


def test_prompts_may_come_from_a_generator():
    expected = shared().generate([[1, 2]], 2).tokens
    found = shared().generate((prompt for prompt in ([1, 2],)), 2).tokens
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


@pytest.mark.parametrize(
    "prompts",
    [
        {1: 2, "a": 3},
        {"token_ids": [[1, 2]], "padding_mask": [["a", ""]]},
        {"token_ids": [[1, 2]], "padding_mask": [[0.5, np.nan]]},
        5,
        "ab",
    ],
)
def test_what_is_no_prompt_is_named(prompts):
    with pytest.raises(ValueError, match="Received"):
        shared().generate(prompts, 2)


def test_a_stream_names_arguments_that_it_does_not_take():
    for name in ("foo", "use_speculative"):
        with pytest.raises(TypeError, match=rf"`stream` .*temperature.*Received: \['{name}'\]"):
            shared().stream([[1, 2]], 2, **{name: 1})


@pytest.mark.parametrize("longest, prompt", [(100, 97), (8, 5)])
def test_a_prompt_may_fill_all_positions_but_the_new_ones(longest, prompt):
    model = small(**LIGHT, max_position_embeddings=longest)
    tokens, _ = model.generate([random_ids(prompt)], longest - prompt)
    assert len(tokens[0]) == longest - prompt


def test_generation_follows_a_change_of_the_variables():
    model = small(**LIGHT)
    prompt = random_ids(5)
    before, _ = model.generate([prompt], 6)
    projection = model.backbone.decoder_layers[0].mixer.q_proj
    projection.enable_lora(2)
    same, _ = model.generate([prompt], 6)
    np.testing.assert_array_equal(same[0], before[0])
    projection.lora_kernel_b.assign(np.full(projection.lora_kernel_b.shape, 9.0))
    tokens, _ = model.generate([prompt], 6)
    best = logits(model, np.concatenate([prompt, tokens[0][:-1]])[None]).argmax(-1)[0]
    np.testing.assert_array_equal(tokens[0], best[4:])
    assert (tokens[0] != before[0]).any()
