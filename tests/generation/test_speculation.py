"""Speculative decoding gives the tokens of plain decoding in fewer passes through the backbone."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
from keras import ops

from qwen3_next import MTPConfig
from qwen3_next.generation.decoding import Request
from qwen3_next.generation.generator import Generator
from qwen3_next.generation.prompts import read_prompts
from qwen3_next.generation.sampling import GREEDY, make_sampling
from qwen3_next.generation.speculation_options import SpeculationOptions
from qwen3_next.generation.speculative import SpeculativeDecoding
from tests.support.mtp_models import LIGHT
from tests.support.running import assert_close
from tests.support.small_models import TWO_LAYERS, random_ids, small, with_turned_heads

PROMPTS = [random_ids(n, seed=n) for n in (5, 23, 1)]
NEW = 13
VOCAB, LOOKAHEAD = 16, 3


@functools.cache
def model(**fields):
    return small(mtp=MTPConfig(**{"num_predict_tokens": 4, **fields}), **TWO_LAYERS)


@pytest.fixture(scope="module")
def plain():
    return model().generate(PROMPTS, NEW, use_speculative=False)


def assert_same(found, expected):
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(row, other)


@pytest.mark.parametrize("lookahead", [1, 3, 4])
def test_greedy_gives_the_tokens_of_plain_decoding(lookahead, plain):
    tokens, stats = model().generate(PROMPTS, NEW, speculation_lookahead=lookahead)
    assert_same(tokens, plain.tokens)
    assert stats["verify_steps"] <= NEW - 1
    assert len(stats["acceptance_rate_by_position"]) == lookahead


def test_a_head_turned_round_gives_the_same_tokens(plain, monkeypatch):
    used = with_turned_heads(monkeypatch)
    found = Generator(model()).generate(PROMPTS, NEW, speculation_lookahead=3)
    assert_same(found.tokens, plain.tokens)
    assert len(used) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"mtp_head_type": "mlp"},
        {"mtp_head_type": "shared_lm_head", "hidden_state": "before_norm"},
        {"share_weights_across_steps": False},
    ],
)
def test_every_kind_of_module_is_lossless(fields, plain):
    few = {"num_predict_tokens": 2, "speculation_lookahead": 2}
    found = model(**few, **fields).generate(PROMPTS, NEW, use_speculative=True)
    assert_same(found.tokens, plain.tokens)


def test_a_row_ends_with_its_first_stop_token(plain):
    for offset in range(NEW):
        stop = [int(plain.tokens[1][offset])]
        expected = model().generate(PROMPTS, NEW, use_speculative=False, stop_token_ids=stop)
        found = model().generate(PROMPTS, NEW, use_speculative=True, stop_token_ids=stop)
        assert_same(found.tokens, expected.tokens)
        assert found.stats["finish_reasons"] == expected.stats["finish_reasons"]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_limits_are_exact(limit, plain):
    tokens, _ = model().generate(PROMPTS, limit, use_speculative=True)
    assert_same(tokens, [row[:limit] for row in plain.tokens])


def test_a_smaller_draft_vocabulary_changes_nothing(plain):
    found = model().generate(PROMPTS, NEW, draft_vocabulary=range(0, 61, 3))
    assert_same(found.tokens, plain.tokens)
    assert found.stats["draft_vocab_size"] == 21


def prefilled(model, prompts, new, method=None, **options):
    """A decoding method, by default the one the options ask for, and what it begins with."""
    vocab_size = model.config.vocab_size
    mode, sampling = make_sampling(vocab_size)
    options = {"use_speculative": True, **options}
    ((chosen, drafting),) = SpeculationOptions(**options).candidates(model, mode)
    method = chosen if method is None else method
    request = Request(ops.convert_to_tensor(np.int32(new)), sampling, drafting)
    carry = model.generator.prefill(read_prompts(prompts, vocab_size), new, method, request)
    return method, carry, request


def test_the_cache_after_is_that_of_plain_decoding():
    carries = {}
    for speculative in (False, True):
        method, carry, request = prefilled(model(), PROMPTS, NEW, use_speculative=speculative)
        carries[speculative] = model().generator.decode(method, carry, request)
    plain, found = carries[False].cache, carries[True].caches.model
    lengths = ops.convert_to_numpy(found.lengths)
    np.testing.assert_array_equal(lengths, ops.convert_to_numpy(plain.lengths))
    for (one,), (other,) in zip(plain.layers, found.layers, strict=True):
        for name, a, b in zip(one._fields, one, other, strict=True):
            a, b = ops.convert_to_numpy(a), ops.convert_to_numpy(b)
            if name in ("keys", "values"):  # behind its length a row holds drafts
                real = np.arange(min(a.shape[1], b.shape[1])) < lengths[:, None]
                a, b = (x[:, : real.shape[1]][real] for x in (a, b))
            assert_close(b, a, 1e-5)


@pytest.fixture(scope="module")
def linear_language():
    """A model of t' = (3 t + 7) mod V, backbone and module trained together."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    ids = np.zeros((64, 24), "int32")
    ids[:, 0] = rng.integers(0, VOCAB, 64)
    for t in range(1, ids.shape[1]):
        ids[:, t] = (3 * ids[:, t - 1] + 7) % VOCAB
    options = {"vocab_size": VOCAB, "initializer_range": 0.05, **LIGHT}
    model = small(mtp=MTPConfig(num_predict_tokens=LOOKAHEAD), **options)
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(ids, batch_size=32, epochs=20, verbose=0)
    return model


def test_a_deterministic_language_is_drafted_without_error(linear_language):
    prompts, new = [[1, 10, 5], [4, 3, 0, 7, 12]], 1 + 5 * (LOOKAHEAD + 1)
    tokens, stats = linear_language.generate(prompts, new, use_speculative=True)
    for prompt, row in zip(prompts, tokens):
        follow = np.concatenate([prompt[-1:], row])
        np.testing.assert_array_equal(follow[1:], (3 * follow[:-1] + 7) % VOCAB)
    assert stats["acceptance_rate_by_position"] == [1.0] * LOOKAHEAD
    assert stats["tokens_per_step"] == LOOKAHEAD + 1
    # The backbone ran once for the prompt and once for every lookahead + 1 tokens.
    assert stats["verify_steps"] == 5


@dataclasses.dataclass(frozen=True)
class OffByOne(SpeculativeDecoding):
    """Every draft is the token that should stand one place later."""

    def draft(self, *args):
        draft, *modules = super().draft(*args)
        token_ids = draft.token_ids
        moved = ops.concatenate([token_ids[:, 1:], token_ids[:, -1:]], axis=1)
        return draft._replace(token_ids=moved), *modules


def test_drafts_off_by_one_are_rejected(linear_language):
    method = OffByOne(GREEDY, lookahead=LOOKAHEAD)
    method, carry, request = prefilled(linear_language, [[1, 10, 5]], 9, method)
    carry = linear_language.generator.decode(method, carry, request)
    tokens = ops.convert_to_numpy(carry.new_tokens)[0, :9]
    follow = np.concatenate([[5], tokens])
    np.testing.assert_array_equal(follow[1:], (3 * follow[:-1] + 7) % VOCAB)  # slow, but right
    assert method.stats(carry)["avg_acceptance_rate"] == 0.0


def test_a_lossy_threshold_says_so(plain):
    tokens, stats = model().generate(PROMPTS, NEW, acceptance_threshold=0.001)
    assert stats["lossy"]
    assert not model().generate(PROMPTS, NEW, use_speculative=True).stats["lossy"]
    assert any((row != other).any() for row, other in zip(tokens, plain.tokens))


def test_a_baseline_is_measured_when_asked_for():
    _, stats = model().generate(PROMPTS, NEW, measure_baseline=True)
    assert stats["speedup"] == stats["wall_clock_speedup"] > 0
    assert model().generate(PROMPTS, NEW, use_speculative=True).stats["speedup"] is None


def test_what_is_left_open_is_measured_and_changes_no_token(plain):
    found = [model().generate(PROMPTS, NEW) for _ in range(4)]
    for tokens, _ in found:
        assert_same(tokens, plain.tokens)
    first, second, *_, last = (stats for _, stats in found)
    assert (first["lookahead"], second["lookahead"]) == (0, 3)
    assert list(first["seconds_per_token"]) == [0]
    seconds = second["seconds_per_token"]
    assert second["speedup"] == pytest.approx(seconds[0] / seconds[3])
    assert last["lookahead"] in last["seconds_per_token"]


def test_drawn_tokens_do_not_depend_on_measurements():
    options = {"temperature": 1.0, "seed": 3}
    plain = model().generate(PROMPTS, NEW, use_speculative=False, **options)
    for _ in range(3):
        tokens, stats = model().generate(PROMPTS, NEW, **options)
        assert_same(tokens, plain.tokens)
        assert stats["lookahead"] == 0


@pytest.mark.parametrize(
    "name, options",
    [
        ("speculation_lookahead", {"speculation_lookahead": 5}),
        ("acceptance_threshold", {"acceptance_threshold": 0.0}),
        ("draft_vocabulary", {"draft_vocabulary": []}),
        ("use_speculative", {"use_speculative": 2}),
        ("speculation_lookahead", {"use_speculative": False, "speculation_lookahead": 2}),
        ("measure_baseline", {"use_speculative": False, "measure_baseline": True}),
    ],
)
def test_an_error_names_the_argument(name, options):
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        model().generate(PROMPTS, 4, **options)


def test_a_model_without_modules_cannot_speculate():
    with pytest.raises(ValueError, match="mtp=None"):
        small(**LIGHT).generate(PROMPTS, 4, use_speculative=True)
