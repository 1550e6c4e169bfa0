"""What a model promises with a think loop: the properties of the base, at every depth."""

import functools

import numpy as np
import pytest

from qwen3_next import Qwen3NextBackbone
from tests.support import float64_model
from tests.support.mtp_models import DENSE, LIGHT
from tests.support.routed_models import LAYERS
from tests.support.running import assert_close, to_numpy
from tests.support.small_models import random_ids, small
from tests.support.thinking_models import commit, hidden, shared_thinking, think, thinking

LENGTH = 25
IDS = random_ids(3, LENGTH)
LENGTHS = np.array([LENGTH, 13, 5])
TOLERANCE = 5e-5
KINDS = ["fixed", "sequence"]  # at a depth for all, and at one that depends on the tokens before


def masks():
    right = np.arange(LENGTH) < LENGTHS[:, None]
    rng = np.random.default_rng(1)
    return {"left": right[:, ::-1], "scattered": np.stack([rng.permutation(r) for r in right])}


def placed(mask):
    ids = random_ids(*mask.shape, seed=9)
    for row, real, source in zip(ids, mask, IDS):
        row[real] = source[: real.sum()]
    return ids


def unpadded(ids):
    """As all inputs that have a padding mask, so that they share a program."""
    return {"token_ids": ids, "padding_mask": np.ones(ids.shape, bool)}


@functools.cache
def shared_base():
    return small(Qwen3NextBackbone)


def weights_of(model):
    return {v.path: np.asarray(to_numpy(v.value), np.float64) for v in model.weights}


@functools.cache
def easy_and_hard():
    """A model whose tokens below 30 halt at once, and the others never."""
    model = thinking(**LAYERS, **DENSE, etd={"n_encoder_layers": 0})
    embeddings = to_numpy(model.embed_tokens.embeddings).copy()
    embeddings[:, 0] = np.where(np.arange(len(embeddings)) < 30, 8.0, -8.0)
    model.embed_tokens.embeddings.assign(embeddings)
    score = np.zeros((embeddings.shape[1], 1), "float32")
    score[0] = 3.0
    model.think_loop.halting_unit.score.kernel.assign(score)
    return model


@pytest.mark.parametrize("kind", [*KINDS, "token", "injected"])
def test_the_loop_is_that_of_the_oracle(kind):
    model = shared_thinking(kind)
    output = think(model, unpadded(IDS) if kind in KINDS else IDS)
    config, weights = model.config, weights_of(model)
    x = weights["model/embed_tokens/embeddings"][IDS]
    x = float64_model.decoder_layer(float64_model.below(weights, "model/layers_0/"), config, 0, x)
    final = config.etd.inference_state == "final"
    expected, depth = float64_model.think_loop(weights, config, x, 3, final)
    assert_close(to_numpy(output.before_norm), expected, TOLERANCE)
    np.testing.assert_array_equal(to_numpy(output.thinking.iterations), depth)
    if kind in ("token", "sequence"):
        assert len(set(depth.flat)) > 1


def test_one_iteration_is_the_base_to_the_bit():
    base, model = shared_base(), shared_thinking("token")
    once = think(model, IDS, think_iterations=1)
    np.testing.assert_array_equal(to_numpy(once.hidden), hidden(base, IDS))
    assert (to_numpy(once.thinking.iterations) == 1).all()
    assert not to_numpy(once.thinking.early_exit).any()
    assert np.abs(hidden(model, IDS) - to_numpy(once.hidden)).max() > 0.1


def test_one_iteration_is_the_base_to_the_bit_when_called_eagerly():
    base = small(Qwen3NextBackbone, **LIGHT)
    model = thinking(**LIGHT, etd={"n_encoder_layers": 0, "n_think_layers": 1})
    once = to_numpy(model(IDS, think_iterations=1))
    np.testing.assert_array_equal(once, to_numpy(base(IDS)))


@pytest.mark.parametrize("kind", [*KINDS, "token"])
def test_padding_does_not_change_real_tokens(kind):
    model = shared_thinking(kind)
    whole = hidden(model, unpadded(IDS))
    for mask in masks().values():
        output = think(model, {"token_ids": placed(mask), "padding_mask": mask})
        padded = to_numpy(output.hidden)
        for row, real, expected in zip(padded, mask, whole):
            np.testing.assert_allclose(row[real], expected[: real.sum()], atol=TOLERANCE)
        assert (to_numpy(output.thinking.iterations)[~mask] == 0).all()


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_packed_is_separate(kind):
    model = shared_thinking(kind)
    # Cut here, the third row has a token that the rounding of its embedding alone moves by 1e-4.
    ids = IDS[:2]
    segments = np.tile(np.repeat([0, 1, 2], [5, 1, LENGTH - 6]), (2, 1))
    packed = hidden(model, {"token_ids": ids, "segment_ids": segments})
    for start, end in ((0, 5), (5, 6), (6, LENGTH)):
        alone = hidden(model, unpadded(np.roll(ids, -start, axis=1)))[:, : end - start]
        np.testing.assert_allclose(packed[:, start:end], alone, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_future_nor_another_row_is_seen(kind):
    model = shared_thinking(kind)
    changed = IDS.copy()
    changed[:, 15:] = random_ids(3, LENGTH - 15, seed=5)
    changed[0] = random_ids(LENGTH, seed=6)
    before, after = hidden(model, unpadded(IDS)), hidden(model, unpadded(changed))
    np.testing.assert_allclose(before[1:, :15], after[1:, :15], atol=TOLERANCE)
    assert np.abs(before[1:, 15:] - after[1:, 15:]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_uncached(kind):
    model, mask = shared_thinking(kind), masks()["left"]
    whole, ids, cache = think(model, unpadded(IDS)), placed(mask), model.init_cache(3, 32)
    found, depth = [], []
    for start, end in ((0, 8), (8, 16), (16, 24), (24, 25)):
        chunk = {"token_ids": ids[:, start:end], "padding_mask": mask[:, start:end]}
        output = think(model, chunk, cache)
        cache = output.cache
        found.append(to_numpy(output.hidden))
        depth.append(to_numpy(output.thinking.iterations))
    found, depth = np.concatenate(found, axis=1), np.concatenate(depth, axis=1)
    for row, real in enumerate(mask):
        count = real.sum()
        expected = to_numpy(whole.hidden)[row, :count]
        np.testing.assert_allclose(found[row, real], expected, atol=TOLERANCE)
        iterations = to_numpy(whole.thinking.iterations)[row, :count]
        np.testing.assert_array_equal(depth[row, real], iterations)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_verified_pass_is_committed_for_all_iterations(kind):
    model, kept = shared_thinking(kind), [4, 2, 0]
    whole = hidden(model, unpadded(IDS))
    chunk = unpadded(IDS[:, :8])
    start = think(model, chunk, model.init_cache(3, 32)).cache
    update = think(model, IDS[:, 8:12], start, replayable=True).update
    cache = commit(model, start, update, kept)
    following = np.stack([row[8 + n : 16 + n] for row, n in zip(IDS, kept)])
    found = to_numpy(think(model, {**chunk, "token_ids": following}, cache).hidden)
    for row, n in enumerate(kept):
        np.testing.assert_allclose(found[row], whole[row, 8 + n : 16 + n], atol=TOLERANCE)


@pytest.mark.parametrize("replayed", [False, True])
def test_iterations_that_no_token_needs_still_write(replayed):
    model, width = easy_and_hard(), 4
    ids = np.concatenate([random_ids(2, 8) % 30, 30 + random_ids(2, 8) % 30], axis=1)
    whole = think(model, ids)
    expected = np.repeat([[1, 3]], 8, axis=1)
    np.testing.assert_array_equal(to_numpy(whole.thinking.iterations), [*expected] * 2)
    cache = model.init_cache(2, 16)
    for start in range(0, 16, width):
        output = think(model, ids[:, start : start + width], cache, replayable=replayed)
        cache = commit(model, cache, output.update, [width] * 2) if replayed else output.cache
        found = to_numpy(output.hidden)
        close = to_numpy(whole.hidden)[:, start : start + width]
        np.testing.assert_allclose(found, close, atol=TOLERANCE)


def test_every_pass_has_a_cache_of_its_own():
    cache = shared_thinking("token").init_cache(2, 16, think_iterations=2)
    names = [[type(one).__name__ for one in passes] for passes in cache.layers]
    assert names == [["DeltaNetCache"], ["AttentionCache"] * 2, ["DeltaNetCache"] * 2]
    assert cache.think_iterations == 2


def test_all_experts_of_all_iterations_are_counted():
    routed = []
    for iterations in (1, 3):
        options = {} if iterations == 3 else {"think_iterations": iterations}
        output = think(shared_thinking("token"), IDS, **options)
        routed.append(to_numpy(output.expert_load))
    assert routed[0].shape == routed[1].shape == (2, 5)
    np.testing.assert_array_equal(routed[0][0], routed[1][0])
    assert np.abs(routed[0][1] - routed[1][1]).max() > 0


def test_halted_tokens_are_not_routed():
    model = shared_thinking("token")
    loop, x = model.think_loop, np.random.default_rng(0).normal(size=(2, 8, 24))
    output = loop(x.astype("float32"), full_output=True)
    routed = float(to_numpy(output.routing[0].tokens))
    assert routed == to_numpy(output.thinking.iterations).sum() < 3 * 16


@pytest.mark.parametrize("iterations", [0, 4, 2.0, True, "2"])
def test_a_number_of_iterations_out_of_range_is_refused(iterations):
    model = shared_thinking("token")
    with pytest.raises(ValueError, match="think_iterations"):
        model(IDS, think_iterations=iterations)
    with pytest.raises(ValueError, match="think_iterations"):
        model.init_cache(1, 8, think_iterations=iterations)


def test_a_cache_for_other_iterations_is_refused():
    model = shared_thinking("token")
    with pytest.raises(ValueError, match="a cache for 2"):
        think(model, IDS[:, :4], model.init_cache(3, 8, think_iterations=2), think_iterations=3)


def test_a_model_without_a_loop_takes_no_iterations():
    with pytest.raises(ValueError, match="etd=None"):
        shared_base()(IDS, think_iterations=1)
