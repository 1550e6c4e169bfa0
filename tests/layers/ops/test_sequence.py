import numpy as np
import pytest

from qwen3_next.layers.ops.rows import permute_tokens, take_rows
from qwen3_next.layers.ops.sequence import (
    compaction,
    running_mean,
    segment_index,
    segment_positions,
    token_ranks,
    valid_lengths,
)
from tests.support.running import gradients, run

LENGTH = 12
MASKS = np.array(
    [
        [1] * LENGTH,
        [0] * LENGTH,
        [0, 0, 0] + [1] * 9,
        [1] * 5 + [0] * 7,
        [1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
    ],
    bool,
)
IDS = np.array(
    [
        [5, 5, 5, 5, 2, 2, 2, 9, 9, 9, 9, 9],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0],
        [3, 3, -1, -1, 3, 3, 3, 3, 3, 3, 3, 3],
        [1, 1, 8, 8, 1, 8, 2, 2, 8, 2, 8, 1],
        [7, 0, 7, 0, 7, 1, 7, 1, 7, 1, 7, 2],
    ]
)


def runs_of_real_tokens(ids, mask):
    """Per row, the run number and the place in its run of every real token, in plain Python."""
    index, position = np.full(ids.shape, -1), np.full(ids.shape, -1)
    for b in range(len(ids)):
        number, place, previous = -1, 0, None
        for t in np.flatnonzero(mask[b]):
            starts = previous is None or ids[b, t] != previous
            number, place, previous = number + starts, 0 if starts else place + 1, ids[b, t]
            index[b, t], position[b, t] = number, place
    return index, position


@pytest.mark.portable
def test_lengths_and_ranks_count_real_tokens():
    assert run(valid_lengths, MASKS).tolist() == MASKS.sum(1).tolist()
    assert np.array_equal(run(token_ranks, MASKS), MASKS.cumsum(1) - 1)


@pytest.mark.portable
def test_compaction_moves_real_tokens_to_the_front_in_order():
    sort_indices, inverse_sort = run(compaction, MASKS)
    for b, mask in enumerate(MASKS):
        real = np.flatnonzero(mask)
        assert sort_indices[b, : len(real)].tolist() == real.tolist()
        assert sorted(sort_indices[b]) == list(range(LENGTH))
        assert sort_indices[b][inverse_sort[b]].tolist() == list(range(LENGTH))


@pytest.mark.portable
def test_segments_are_runs_of_equal_ids_among_real_tokens():
    index = run(segment_index, IDS, MASKS)
    expected, _ = runs_of_real_tokens(IDS, MASKS)
    assert np.array_equal(index[MASKS], expected[MASKS])


def test_segments_without_padding():
    everything = np.ones_like(MASKS)
    assert np.array_equal(run(segment_index, IDS), runs_of_real_tokens(IDS, everything)[0])


def test_padding_takes_the_segment_of_the_real_token_before_it():
    index = run(segment_index, IDS, MASKS)
    assert (np.diff(index, axis=1) >= 0).all()
    changed = np.diff(index, axis=1) > 0
    assert MASKS[:, 1:][changed].all()
    assert not index[:, 0].any()


@pytest.mark.portable
def test_positions_count_from_the_start_of_the_segment():
    position = run(segment_positions, run(segment_index, IDS, MASKS), MASKS)
    _, expected = runs_of_real_tokens(IDS, MASKS)
    assert np.array_equal(position[MASKS], expected[MASKS])
    assert (position >= 0).all()


def test_positions_without_padding():
    everything = np.ones_like(MASKS)
    position = run(segment_positions, run(segment_index, IDS))
    assert np.array_equal(position, runs_of_real_tokens(IDS, everything)[1])


def test_positions_without_segments_are_ranks():
    position = run(segment_positions, None, MASKS)
    assert np.array_equal(position, np.maximum(MASKS.cumsum(1) - 1, 0))


@pytest.mark.portable
def test_rows_are_taken_forward_and_summed_backward(compiled):
    rng = np.random.default_rng(0)
    index = rng.permutation(np.repeat(np.arange(10), 3)).astype("int32")
    inverse = np.argsort(index, kind="stable").reshape(10, 3).astype("int32")
    rows = rng.normal(size=(10, 4)).astype("float32")
    cotangent = rng.normal(size=(30, 4)).astype("float32")
    assert np.array_equal(run(take_rows, rows, index, inverse, mode=compiled), rows[index])
    grad, *_ = gradients(take_rows, (rows, index, inverse), cotangent, mode=compiled)
    expected = np.zeros_like(rows)
    np.add.at(expected, index, cotangent)
    assert np.allclose(grad, expected, atol=1e-6)


def test_permuted_tokens_come_back_and_so_do_their_gradients():
    rng = np.random.default_rng(0)
    sort_indices, inverse_sort = run(compaction, MASKS)
    x = rng.normal(size=(*MASKS.shape, 2, 3)).astype("float32")
    compact = run(permute_tokens, x, sort_indices, inverse_sort)
    assert np.array_equal(compact, np.take_along_axis(x, sort_indices[..., None, None], axis=1))
    assert np.array_equal(run(permute_tokens, compact, inverse_sort, sort_indices), x)
    cotangent = rng.normal(size=x.shape).astype("float32")
    grad, *_ = gradients(permute_tokens, (x, sort_indices, inverse_sort), cotangent)
    assert np.array_equal(
        grad, np.take_along_axis(cotangent, inverse_sort[..., None, None], axis=1)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_running_means_are_those_of_the_real_tokens_of_a_segment(packed, padded):
    rng = np.random.default_rng(4)
    values = rng.normal(size=(3, 9)).astype("float32")
    mask = rng.uniform(size=(3, 9)) < 0.7 if padded else None
    ids = np.sort(rng.integers(0, 3, (3, 9)), axis=1) if packed else None
    means, sums = run(running_mean, values, mask, ids)
    real = np.ones((3, 9), bool) if mask is None else mask
    segment = np.zeros((3, 9)) if ids is None else ids
    for row, t in zip(*np.nonzero(real)):
        same = real[row] & (segment[row] == segment[row, t]) & (np.arange(9) <= t)
        assert means[row, t] == pytest.approx(values[row][same].mean(), abs=1e-5)
        assert sums[row, t] == pytest.approx(values[row][same].sum(), abs=1e-5)


def test_a_running_mean_continues_a_sum():
    values = np.random.default_rng(5).normal(size=(2, 8)).astype("float32")
    whole, _ = run(running_mean, values)
    _, sums = run(running_mean, values[:, :5])
    start = sums[:, -1], np.full(2, 5, "int32")
    means, _ = run(running_mean, values[:, 5:], None, None, start)
    np.testing.assert_allclose(means, whole[:, 5:], atol=1e-6)
