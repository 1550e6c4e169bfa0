"""Caches of routed think loops hold what was decided, and what every turn of a layer left."""

import numpy as np
import pytest

from tests.support.routed_models import (
    FIRST,
    IDS,
    LENGTH,
    PROMPT,
    ROUTE,
    TOLERANCE,
    WHOLE,
    shared_routed,
)
from tests.support.running import assert_close, to_numpy
from tests.support.thinking_models import hidden, think


@pytest.mark.parametrize(("kind", "iterations"), [("both", 1), ("both", 3), ("by token", 3)])
def test_cached_is_uncached_and_the_cache_carries_the_decisions(kind, iterations):
    model = shared_routed(kind)
    whole = hidden(model, WHOLE, think_iterations=iterations)
    cache, found = model.init_cache(4, 32, think_iterations=iterations), []
    for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, LENGTH)):
        chunk = FIRST if start == 0 else {"token_ids": IDS[:, start:end]}
        output = think(model, chunk, cache)
        cache = output.cache
        found.append(to_numpy(output.hidden))
    assert_close(np.concatenate(found, axis=1), whole, TOLERANCE)


@pytest.mark.parametrize("kind", ["both"])
def test_a_prompt_in_pieces_goes_the_way_that_was_decided_for_it(kind):
    model = shared_routed(kind)
    expected = think(model, FIRST, model.init_cache(4, 32))
    given = {"route": to_numpy(expected.cache.route)}
    if expected.cache.branch is not None:
        given["branch"] = to_numpy(expected.cache.branch)
    cache, found = model.init_cache(4, 32), []
    for start, end in ((0, 5), (5, 6), (6, PROMPT)):
        pieces = {"token_ids": IDS[:, start:end], **(given if start == 0 else {})}
        output = think(model, pieces, cache)
        cache = output.cache
        found.append(to_numpy(output.hidden))
    assert_close(np.concatenate(found, axis=1), to_numpy(expected.hidden), TOLERANCE)
    np.testing.assert_array_equal(to_numpy(cache.route), given["route"])


def test_a_skipped_layer_leaves_its_cache_and_a_repeated_one_fills_two():
    model = shared_routed("routes")
    cache = think(model, {"token_ids": IDS, "route": ROUTE}, model.init_cache(4, 32)).cache
    keys = [to_numpy(cache.layers[1][number].keys) for number in range(6)]
    for number in range(3):
        written = [np.abs(keys[n]).sum((1, 2, 3)) > 0 for n in (number, 3 + number)]
        np.testing.assert_array_equal(written[0], ROUTE[:, 0] > 0)
        np.testing.assert_array_equal(written[1], ROUTE[:, 0] > 1)
