"""Depth as a histogram and as a coloured text."""

import re

import numpy as np
import pytest
from matplotlib import pyplot as plt

from qwen3_next import depth_text, plot_depth
from qwen3_next.think.depth_views import PALETTE

TOKENS, DEPTHS = ["if", " a<b", "\n", "&", "pad"], [1, 3, 2, 12, 0]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def test_the_histogram_counts_real_tokens_and_marks_their_mean(tmp_path):
    depths = np.array([[1, 1, 3], [3, 2, 0]])
    axes = plot_depth(depths, path=tmp_path / "depth.png")
    assert heights(axes) == [2, 1, 2]
    assert list(axes.lines[0].get_xdata()) == [2.0, 2.0]
    assert "mean 2.00" in axes.get_legend().get_texts()[0].get_text()
    assert (tmp_path / "depth.png").stat().st_size > 0
    assert heights(plot_depth(depths, mask=[[1, 1, 1], [0, 0, 1]])) == [2, 0, 1]
    assert heights(plot_depth([[1, 1, 3], [2]])) == [2, 1, 1]
    assert heights(plot_depth(depths[0])) == [2, 0, 1]
    assert plot_depth(depths, ax=axes) is axes


@pytest.mark.parametrize(
    ("iterations", "mask", "message"),
    [
        ([[1, 2]], [[1, 1, 1]], r"`mask` .* rows of \[3\] tokens"),
        ([[1, 2], [1, 2]], [[1, 1, 1, 1]], "`mask` must have the shape"),
        ([[1, -1]], None, "at least 0"),
        ([[1.5]], None, "float64"),
        ([[0, 0]], None, "one real token"),
        ([[1, 2]], [[0, 0]], "one real token"),
        ([], None, "one real token"),
        ([[2**40]], None, "at most 1000"),
        ("abc", None, "`iterations` must be"),
        (5, None, "`iterations` must be"),
        ([["a"]], None, "`iterations` must be"),
        ([[1, 2]], 5, "`mask` must be"),
        ([[1, 2]], [["a", ""]], "`mask` must be"),
    ],
)
def test_depths_that_cannot_be_drawn_are_refused(iterations, mask, message):
    with pytest.raises(ValueError, match=message):
        plot_depth(iterations, mask)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"path": 5}, "path"),
        ({"path": "no/such/depth.png"}, "path"),
        ({"path": "."}, "path"),
        ({"ax": "a"}, "ax"),
    ],
)
def test_what_cannot_be_drawn_to_is_refused(options, name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        plot_depth([[1, 2]], **options)


def test_a_figure_that_cannot_be_written_is_closed(tmp_path):
    before = plt.get_fignums()
    with pytest.raises(ValueError, match="foo"):
        plot_depth([[1, 2]], path=tmp_path / "depth.foo")
    assert plt.get_fignums() == before


def test_plain_text_has_its_depths_behind_the_tokens():
    assert depth_text(TOKENS, DEPTHS, "plain").splitlines()[1:] == ["if₁ a<b₃", "₂&₁₂"]


def test_ansi_text_is_the_text_between_colours_that_end_with_the_line():
    shown = depth_text([*TOKENS, "\x1b[2J"], [*DEPTHS, 1])
    legend, body = shown.split("\n", 1)
    plain = re.sub(r"\x1b\[[\d;]+m", "", body)
    assert plain == "if a<b\n&␛[2J"
    assert re.sub(r"\x1b\[[\d;]+m", "", legend).split() == ["iterations", *map(str, range(1, 13))]
    assert all(line.endswith("\x1b[0m") for line in body.splitlines())


def test_html_is_escaped_and_names_the_depth_of_every_token():
    shown = depth_text(['<b a="', "x"], [1, 2], "html")
    assert "&lt;b a=&quot;</span>" in shown and "<b" not in shown
    assert shown.count('title="iterations: 2"') == 2  # in the legend and in the text
    assert shown.startswith("<div") and shown.endswith("</div>")


def test_equal_depths_have_equal_colours_and_deeper_ones_are_darker():
    papers = re.findall(r"background:#(\w{6})", depth_text("abcde", [1, 2, 3, 2, 4], "html"))
    legend, text = papers[:4], papers[4:]
    assert text == [legend[depth - 1] for depth in (1, 2, 3, 2, 4)]
    lightness = [np.mean(list(bytes.fromhex(paper))) for paper in legend]
    assert lightness == sorted(set(lightness), reverse=True)


def test_the_palette_darkens_in_even_steps_of_perceived_lightness():
    linear = np.where(PALETTE <= 10, PALETTE / 3294.6, ((PALETTE / 255 + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16
    steps = -np.diff(lightness)
    assert steps.min() > 0.9 * steps.mean() and steps.max() < 1.1 * steps.mean()


def test_ids_are_decoded():
    words = {4: "four", 5: " five"}
    assert depth_text(np.array([4, 5]), [1, 1], "plain", words.get).endswith("four₁ five₁")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [1, 2]), "one entry for each"),
        ((["a"], [-1]), "at least 0"),
        ((["a"], [1.0]), "float64"),
        (([4], [1]), "`decode`"),
        ((["a"], [1], "latex"), "`style` must be one of"),
        ((5, [1]), "`tokens` must be"),
        (([4], [1], "plain", 5), "`decode` must be"),
        (([4], [1], "plain", lambda token: None), "`tokens` must be strings"),
        ((["a", "b"], [[1], [1, 2]]), "`iterations` must be an array"),
    ],
)
def test_what_cannot_be_coloured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        depth_text(*arguments)
