"""Generation: cached equals uncached, limits are exact, prompts share programs."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from qwen3_next import pad
from qwen3_next.generation.decoding import Request
from qwen3_next.generation.generator import Generator
from qwen3_next.layers.ops import row_product
from tests.support.small_models import (
    ONE_LAYER,
    TWO_LAYERS,
    logits,
    random_ids,
    small,
    with_turned_heads,
)

PROMPTS = [random_ids(n, seed=n) for n in (5, 23, 1)]
NEW = 14


@functools.cache
def shared():
    """One layer of each mixer, one of them with experts."""
    return small(**TWO_LAYERS)


@pytest.fixture(scope="module")
def greedy():
    return shared().generate(PROMPTS, max_new_tokens=NEW)


def test_greedy_is_the_argmax_of_the_uncached_forward_pass(greedy):
    rows = [np.concatenate(row) for row in zip(PROMPTS, greedy.tokens, strict=True)]
    best = logits(shared(), **pad(rows, length=40)).argmax(-1)
    for prompt, tokens, found in zip(PROMPTS, greedy.tokens, best, strict=True):
        start = len(prompt) - 1
        np.testing.assert_array_equal(found[start : start + NEW], tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_generate_what_lists_do(side, greedy):
    tokens, _ = shared().generate(pad(PROMPTS, side=side), max_new_tokens=NEW)
    np.testing.assert_array_equal(tokens, greedy.tokens)


def test_rows_generate_what_they_generate_alone(greedy):
    for prompt, expected in zip(PROMPTS, greedy.tokens, strict=True):
        alone, _ = shared().generate([prompt], max_new_tokens=NEW)
        np.testing.assert_array_equal(alone[0], expected)


def test_long_prompts_are_read_in_chunks(greedy):
    tokens, _ = Generator(shared(), prefill_chunk=16).generate(PROMPTS, max_new_tokens=NEW)
    np.testing.assert_array_equal(tokens, greedy.tokens)


def test_a_head_turned_round_gives_the_same_tokens(greedy, monkeypatch):
    used = with_turned_heads(monkeypatch)
    tokens, _ = Generator(shared()).generate(PROMPTS, max_new_tokens=NEW)
    np.testing.assert_array_equal(tokens, greedy.tokens)
    assert len(used) == 1


@pytest.mark.parametrize(
    ("fields", "often", "seldom"),
    [
        ({}, True, False),
        ({"tie_word_embeddings": True}, True, True),
        ({"dtype": "mixed_bfloat16"}, False, False),
    ],
)
def test_a_head_is_turned_round_where_that_pays(fields, often, seldom, monkeypatch):
    monkeypatch.setattr(row_product, "SMALLEST_TURNED", 1)
    model = small(**ONE_LAYER, **fields)
    for steps, turned in ((16, often), (15, seldom)):
        found = Request(None, None).for_steps(model, tokens=4, steps=steps).turned_head
        assert (found is not None) == turned
        if turned:
            np.testing.assert_array_equal(found, ops.transpose(model.head_kernel()))


def test_a_row_ends_with_its_first_stop_token(greedy):
    for offset in (0, 3, NEW - 1):
        stop = int(greedy.tokens[0][offset])
        tokens, stats = shared().generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[stop])
        for row, full, reason in zip(tokens, greedy.tokens, stats["finish_reasons"]):
            hits = np.flatnonzero(full == stop)
            expected = full[: hits[0] + 1] if hits.size else full
            np.testing.assert_array_equal(row, expected)
            assert reason == ("stop" if hits.size else "length")


def test_generation_stops_once_every_row_has(greedy):
    stops = [int(tokens[2]) for tokens in greedy.tokens]
    _, stats = shared().generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=stops)
    assert stats["steps"] <= 3


@pytest.mark.parametrize("count", [1, 2, NEW])
def test_the_number_of_new_tokens_is_exact(count, greedy):
    tokens, stats = shared().generate(PROMPTS, max_new_tokens=count)
    for row, full in zip(tokens, greedy.tokens):
        np.testing.assert_array_equal(row, full[:count])
    assert stats["new_tokens"] == 3 * count
    assert stats["prompt_tokens"] == 29


def test_a_stream_yields_what_generate_returns(greedy):
    stop = int(greedy.tokens[1][4])
    expected, _ = shared().generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[stop])
    steps = list(shared().stream(PROMPTS, max_new_tokens=NEW, stop_token_ids=[stop]))
    streamed = np.stack(steps, axis=1)
    for row, tokens in zip(streamed, expected):
        np.testing.assert_array_equal(row[: len(tokens)], tokens)
        assert (row[len(tokens) :] == -1).all()


def test_a_seed_repeats_and_another_differs():
    def draw(seed):
        tokens, _ = shared().generate(PROMPTS, max_new_tokens=NEW, temperature=1.0, seed=seed)
        return np.stack(tokens)

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    keras.utils.set_random_seed(5)
    first = draw(None)
    keras.utils.set_random_seed(5)
    np.testing.assert_array_equal(first, draw(None))


def test_prompt_lengths_share_a_compilation(monkeypatch):
    model = shared()
    traced = []
    original = type(model.backbone).call

    def call(self, *args, **kwargs):
        traced.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model.backbone), "call", call)
    model.generate([random_ids(9)], max_new_tokens=4)
    traced.clear()
    for length in (10, 13, 16):
        model.generate([random_ids(length)], max_new_tokens=length // 2)
    assert not traced or keras.backend.backend() == "torch"


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "at least one row"),
        ([[1, 2], []], {}, "prompt 1"),
        ([[1.5]], {}, "integer"),
        ([[61]], {}, "vocab_size=61"),
        (np.zeros((2, 3, 4), int), {}, "prompts"),
        ({"token_ids": np.ones((1, 3), int), "padding_mask": np.zeros((1, 3))}, {}, "prompt 0"),
        ({"token_ids": np.ones((1, 3), int), "padding_mask": np.ones((1, 2))}, {}, "padding_mask"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"max_new_tokens": 256}, "max_position_embeddings"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"min_p": 2.0}, "min_p"),
        ([[1]], {"stop_token_ids": [99]}, "stop_token_ids"),
    ],
)
def test_bad_arguments_are_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        shared().generate(prompts, **options)
    with pytest.raises(ValueError, match=message):
        shared().stream(prompts, **options)
