"""From a curve to a split of the layers, as the knees say and along the hybrid's groups."""

import dataclasses

import numpy as np
import pytest

from qwen3_next import LayerProfile

L, F = "linear_attention", "full_attention"
BOWL = (0.4, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.35)


def profile(distances=BOWL, layer_types=None, **fields):
    types = (F,) * len(distances) if layer_types is None else layer_types
    return LayerProfile(tuple(distances), tuple(types), sequences=5, **fields)


def test_the_knees_and_what_lies_between_think():
    assert profile().knees == (2, 6)
    assert profile().raw_split == profile().split == (2, 5, 1)
    assert profile(BOWL[::-1]).raw_split == (1, 5, 2)


@pytest.mark.parametrize(
    ("layer_types", "aligned"),
    [
        ([L] * 8, (2, 5, 1)),  # no groups: every layer may be a boundary
        ([L, L, F, L, L, F, L, L], (3, 5, 0)),  # 7 is as near to 6 as to 8: the larger block
        ([L, F, L, F, L, F, L, F], (2, 6, 0)),
        ([L, L, L, L, L, L, F, L], (0, 7, 1)),
        ([L, L, L, F, L, L, L, F], (0, 8, 0)),
        ([L, L, L, L, L, L, L, F], (0, 8, 0)),  # one group thinks as a whole
    ],
)
def test_boundaries_move_to_those_of_the_groups(layer_types, aligned):
    assert profile(layer_types=layer_types).aligned_split == aligned


def test_a_think_block_is_never_empty():
    narrow = profile([0.9, 0.5, 0.02, 0.02, 0.6, 0.7, 0.9, 0.9], [L, L, L, F, L, L, L, F])
    assert narrow.raw_split == (2, 2, 4)
    assert narrow.aligned_split == (0, 4, 4)


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        ([0.5, 0.4, 0.3, 0.2, 0.1], "no knee from the front and the back"),
        ([0.9, 0.1, 0.1, 0.1, 0.1, 0.1], "no knee from the back"),
        ([0.5], "no knee"),
    ],
)
def test_a_curve_without_knees_gives_no_split(distances, message):
    flat = profile(distances)
    with pytest.raises(ValueError, match=f"`distances` has {message}.*sensitivity=1.0"):
        _ = flat.split
    assert "no split" in str(flat)
    flat.plot()


def test_knees_that_cross_give_no_split():
    crossed = profile([0.2, 0.2, 0.2, 0.5, 0.1, 0.1, 0.1])
    assert crossed.knees == (4, 2)
    with pytest.raises(ValueError, match="`distances` has knees that cross"):
        _ = crossed.raw_split
    assert "no split" in str(crossed)


def test_another_sensitivity_needs_no_new_profile():
    with pytest.raises(ValueError, match="sensitivity=50"):
        _ = dataclasses.replace(profile(), sensitivity=50.0).split


def test_a_profile_prints_every_layer_and_both_splits():
    text = str(profile(layer_types=[L, L, F, L, L, F, L, L]))
    lines = text.splitlines()
    assert len(lines) == 1 + 8 + 3
    assert lines[3].split() == ["2", "0.1000", F, "front", "knee"]
    assert "raw split: 2 encode, 5 think, 1 decode" in lines
    assert "aligned split: 3 encode, 5 think, 0 decode" in lines
    assert lines[-1] == "mean over 5 sequences, S = 1.0"


def test_the_plot_shows_curve_knees_and_boundaries(tmp_path):
    axes = profile(layer_types=[L, L, F, L, L, F, L, L]).plot(tmp_path / "profile.png")
    curve, knees = axes.lines
    assert list(curve.get_ydata()) == list(BOWL)
    assert list(knees.get_xdata()) == [2, 6]
    (block,) = axes.patches
    assert (block.get_x(), block.get_width()) == (2.5, 5)
    assert (tmp_path / "profile.png").stat().st_size > 0
    assert profile().plot(ax=axes) is axes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distances": ()}, "one entry per layer"),
        ({"layer_types": (L,)}, "one entry per layer"),
        ({"distances": (0.1, float("nan")), "layer_types": (L, F)}, "`distances` must be"),
        ({"distances": (-0.1, 0.1), "layer_types": (L, F)}, "`distances` must be"),
        ({"distances": (5.0, 0.1), "layer_types": (L, F)}, "`distances` must be"),
        ({"distances": np.array([0.1, 0.2]), "layer_types": (L, F)}, "`distances` must be"),
        ({"distances": 5}, "`distances` must be"),
        ({"layer_types": ("foo",) * 8}, "`layer_types` must be"),
        ({"layer_types": "abcdefgh"}, "`layer_types` must be"),
        ({"sequences": 0}, "`sequences`"),
        ({"sensitivity": -1.0}, "`sensitivity`"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(profile(), **fields)
