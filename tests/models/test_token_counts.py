"""Tokens that MTP modules learn from are counted, kept, and drafted from."""

import keras
import numpy as np
import pytest
from keras import ops

from qwen3_next import MTPConfig, Qwen3Next, wrap_model_with_mtp
from qwen3_next.models.token_counts import MOST, TokenCounts
from tests.support.mtp_models import LIGHT
from tests.support.running import BACKEND
from tests.support.small_models import SMALL, random_ids, small

VOCAB = SMALL["vocab_size"]
MTP = MTPConfig(
    num_predict_tokens=1,
    speculation_lookahead=1,
    mtp_head_type="shared_lm_head",
    draft_vocab_size=5,
    warmup_steps=3,
)
PROMPT = random_ids(6)


def counts(model):
    return ops.convert_to_numpy(model.token_counts.counts.value)


def make():
    return small(**LIGHT, mtp=MTP)


@pytest.fixture(scope="module")
def counted():
    model = make()
    model.token_counts.counts.assign(np.random.default_rng(0).integers(0, 9, VOCAB))
    return model


@pytest.mark.parametrize("jit_compile", [True, False] if BACKEND == "tensorflow" else [True])
def test_fit_counts_the_labels_that_count(jit_compile):
    model = make()
    model.compile("sgd", jit_compile=jit_compile)
    x, y = random_ids(4, 12), random_ids(4, 12, seed=1)
    mask = np.arange(12) < 9
    y[:, ::4] = -100
    inputs = {"token_ids": x, "padding_mask": np.tile(mask, (4, 1))}
    model.fit(inputs, y, batch_size=2, epochs=2, verbose=0)
    model.evaluate(inputs, y, verbose=0)
    seen = y[:, mask]
    expected = 2 * np.bincount(seen[seen >= 0], minlength=VOCAB)
    np.testing.assert_array_equal(counts(model), expected)
    wanted = np.argsort(-expected, kind="stable")[:5]
    np.testing.assert_array_equal(model.frequent_tokens(), np.sort(wanted))


def test_a_count_stops_where_int32_ends():
    layer = TokenCounts(4)
    layer.counts.assign([MOST - 1, MOST, 0, 7])
    layer.add(ops.convert_to_tensor(np.array([[0, 0, 1], [2, -100, 4]], "int32")))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.counts.value), [MOST, MOST, 1, 7])


def test_drafts_are_the_frequent_tokens_once_some_were_counted(counted):
    plain = counted.generate([PROMPT], 9, use_speculative=False)
    found = counted.generate([PROMPT], 9, use_speculative=True)
    every = counted.generate([PROMPT], 9, use_speculative=True, draft_vocabulary="all")
    own = counted.generate([PROMPT], 9, use_speculative=True, draft_vocabulary=[3, 4])
    for generation in (found, every, own):
        np.testing.assert_array_equal(generation.tokens, plain.tokens)
    sizes = [g.stats["draft_vocab_size"] for g in (found, every, own)]
    assert sizes == [5, VOCAB, 2]
    assert make().frequent_tokens() is None


def test_counts_are_kept_with_the_model(counted, tmp_path):
    counted.save(tmp_path / "model.keras")
    counted.save_weights(tmp_path / "model.weights.h5")
    counted.save_to_preset(tmp_path / "preset")
    again = make()
    again.load_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    preset = Qwen3Next.from_preset(tmp_path / "preset", progress=False)
    for model in (again, loaded, preset):
        np.testing.assert_array_equal(counts(model), counts(counted))


def test_files_from_before_tokens_were_counted_load(counted, tmp_path):
    before = small(**LIGHT, mtp=MTP.replace(draft_vocab_size=0))
    before.mtp_steps.assign(2)
    before.save_weights(tmp_path / "model.weights.h5")
    before.save_to_preset(tmp_path / "preset")
    model = make()
    model.token_counts.counts.assign(counts(counted))
    model.load_weights(tmp_path / "model.weights.h5")
    assert int(model.mtp_steps.value) == 2
    preset = Qwen3Next.from_preset(tmp_path / "preset", progress=False, mtp=MTP)
    assert not counts(preset).any()


def test_only_models_that_draft_from_a_part_count():
    assert small(**LIGHT).token_counts is None
    base = small(**LIGHT)
    assert wrap_model_with_mtp(base, MTP.replace(draft_vocab_size=None)).token_counts is None
    model = small(**LIGHT, vocab_size=32769, mtp=MTP.replace(draft_vocab_size=None))
    assert model.token_counts.counts.shape == (32769,)
