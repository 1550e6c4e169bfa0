"""Caches of routed think loops hold what was decided, and what every turn of a layer left."""

import numpy as np
import pytest

from tests.support.routed_models import (
    FIRST,
    IDS,
    LENGTH,
    ONE_RUNS,
    PROMPT,
    ROUTE,
    TOLERANCE,
    WHOLE,
    broken_layer,
    routed,
    shared_routed,
)
from tests.support.running import assert_close, to_numpy
from tests.support.thinking_models import commit, hidden, think

STEP = 4


def assert_cached_is_uncached(model, **options):
    whole = think(model, WHOLE, **options)
    cache, found = model.init_cache(4, 32, **options), []
    for start in (0, *range(PROMPT, LENGTH, STEP)):
        chunk = FIRST if start == 0 else {"token_ids": IDS[:, start : start + STEP]}
        output = think(model, chunk, cache)
        cache = output.cache
        found.append(to_numpy(output.hidden))
    assert_close(np.concatenate(found, axis=1), to_numpy(whole.hidden), TOLERANCE)
    return whole


@pytest.mark.parametrize(
    ("kind", "options"), [("experts", {"think_iterations": 1}), ("both", {})], ids=["once", "loop"]
)
def test_cached_is_uncached_and_the_cache_carries_the_decisions(kind, options):
    assert_cached_is_uncached(shared_routed(kind), **options)


def test_cached_is_uncached_in_the_midst_of_a_model_where_every_token_picks_its_expert():
    between = {"n_encoder_layers": 1, "n_think_layers": 1, "n_decoder_layers": 1}
    layers = {"num_layers": 3, "layer_types": None, "mlp_only_layers": (0, 2)}  # the loop has MoE
    model = routed(kind="by token", etd=between, **layers)
    selections = to_numpy(assert_cached_is_uncached(model).thinking.selections)
    assert np.count_nonzero(selections.sum(0)) > 1


def test_a_cache_for_fewer_iterations_begins_with_an_expert_for_each_of_them():
    model = shared_routed("both")
    branch = np.array([[0, 1], [2, 0], [-1, 2], [1, 1]])
    given = {"token_ids": IDS, "route": ROUTE, "branch": branch}
    output = think(model, given, model.init_cache(4, 32, think_iterations=2))
    assert_close(to_numpy(output.hidden), hidden(model, given, think_iterations=2), TOLERANCE)
    with pytest.raises(ValueError, match="each of the 2 iterations"):
        model({**given, "branch": np.zeros((4, 3), "int32")}, cache=output.cache)


def test_an_expert_that_is_given_holds_for_all_tokens_of_a_row_where_tokens_pick():
    model = shared_routed("by token")
    given = {"route": np.ones((4, 2), "int32"), "branch": np.array([0, 2, -1, 1])}
    cache, found = model.init_cache(4, 32), []
    for start, more in ((0, given), (LENGTH // 2, {})):
        output = think(model, {"token_ids": IDS[:, start : start + LENGTH // 2], **more}, cache)
        cache = output.cache
        found.append(to_numpy(output.hidden))
    whole = hidden(model, {"token_ids": IDS, **given})
    assert_close(np.concatenate(found, axis=1), whole, TOLERANCE)
    assert cache.branch is None  # of what rows choose


def test_a_prompt_in_pieces_goes_the_way_that_was_decided_for_it():
    model = shared_routed("both")
    expected = think(model, FIRST, model.init_cache(4, 32))
    given = {name: to_numpy(getattr(expected.cache, name)) for name in ("route", "branch")}
    cache, found = model.init_cache(4, 32), []
    for start in range(0, PROMPT, STEP):
        pieces = {"token_ids": IDS[:, start : start + STEP], **(given if start == 0 else {})}
        output = think(model, pieces, cache)
        cache = output.cache
        found.append(to_numpy(output.hidden))
    assert_close(np.concatenate(found, axis=1), to_numpy(expected.hidden), TOLERANCE)
    np.testing.assert_array_equal(to_numpy(cache.route), given["route"])


def test_a_skipped_layer_leaves_its_cache_and_a_repeated_one_fills_two():
    model = shared_routed("routes")
    cache = think(model, {"token_ids": IDS, "route": ROUTE}, model.init_cache(4, 32)).cache
    keys = [to_numpy(cache.layers[0][number].keys) for number in range(6)]
    for number in range(3):
        written = [np.abs(keys[n]).sum((1, 2, 3)) > 0 for n in (number, 3 + number)]
        np.testing.assert_array_equal(written[0], ROUTE[:, 0] > 0)
        np.testing.assert_array_equal(written[1], ROUTE[:, 0] > 1)


def test_a_verified_pass_is_committed_for_every_turn():
    model, kept = shared_routed("both"), [4, 2, 0, 3]
    whole = hidden(model, WHOLE)
    start = think(model, FIRST, model.init_cache(4, 32)).cache
    update = think(model, IDS[:, PROMPT : PROMPT + 4], start, replayable=True).update
    cache = commit(model, start, update, kept)
    following = np.stack([row[PROMPT + n : PROMPT + n + STEP] for row, n in zip(IDS, kept)])
    found = to_numpy(think(model, following, cache).hidden)
    for row, n in enumerate(kept):
        assert_close(found[row], whole[row, PROMPT + n : PROMPT + n + STEP], TOLERANCE)


def test_with_a_cache_a_layer_reaches_the_rows_that_run_it_and_no_others():
    with broken_layer(shared_routed("routes")) as model:
        for route, rows in ((np.zeros_like(ROUTE), []), (ONE_RUNS, [3])):
            output = think(model, {"token_ids": IDS, "route": route}, model.init_cache(4, 32))
            broken = np.isnan(to_numpy(output.hidden))
            np.testing.assert_array_equal(broken.all((1, 2)), np.isin(range(4), rows))
            np.testing.assert_array_equal(broken.any((1, 2)), np.isin(range(4), rows))


def test_a_cache_that_has_begun_takes_no_decisions():
    model = shared_routed("both")
    cache = think(model, FIRST, model.init_cache(4, 32)).cache
    with pytest.raises(ValueError, match="first tokens of a cache"):
        model({"token_ids": IDS[:, :2], "route": ROUTE}, cache=cache)
