"""How many iterations each token thought: a histogram, and the text itself, coloured."""

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qwen3_next.config.validation import Rule, one_of, require, shown
from qwen3_next.models.inputs import host_array
from qwen3_next.think.figures import axes_for
from qwen3_next.think.token_sequences import MASK

# From light to dark in even steps of lightness, so that deeper is darker on screen and in print.
PALETTE = np.array([(253, 240, 208), (228, 169, 116), (201, 90, 98), (120, 41, 113), (38, 14, 66)])
DEEPEST = 1000  # every depth up to the largest has a bar, or a colour in the legend
_ROWS = Rule(
    "an array or a list of rows",
    lambda rows: isinstance(rows, list | tuple) or getattr(rows, "ndim", 0) > 0,
)
_TOKENS = Rule("the tokens of a sequence", lambda tokens: isinstance(tokens, Iterable))
_DECODE = Rule("None or a function", lambda decode: decode is None or callable(decode))
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def plot_depth(iterations: Any, mask: Any = None, path: Any = None, ax: Any = None) -> Any:
    """Draws how many tokens thought for how many iterations, and the mean.

    Args:
        iterations: Integers of any shape, or a list of rows of different lengths: iterations per
            token, 0 at padding, which is left out.
        mask: True at the tokens to count, in the shape of `iterations`. `None` for all.
        path: File to write the figure to, or `None`.
        ax: Matplotlib axes to draw on. `None` for a new figure, which is closed once it is written.

    Returns:
        The axes.

    Raises:
        ValueError: iterations that are no integers from 0 to 1000, a mask of another shape or kind,
            no token left to count, or a path or axes that cannot be drawn to.

    Example:

    ```python
    from qwen3_next import plot_depth

    axes = plot_depth([[1, 1, 3, 2], [2, 1, 0, 0]], path="depth.png")
    assert [bar.get_height() for bar in axes.patches] == [3, 2, 1]
    ```
    """
    rows = _flat_rows("iterations", iterations)
    depths = np.concatenate(rows) if rows else np.zeros(0, int)
    _check_depths(depths)
    if mask is not None:
        kept = _flat_rows("mask", mask)
        sizes, masked = ([row.size for row in each] for each in (rows, kept))
        if sizes != masked:
            raise ValueError(
                "`mask` must have the shape of `iterations`. Received: mask with rows of "
                f"{masked} tokens, iterations with rows of {sizes}"
            )
        for row in kept:
            require(MASK, "mask", row)
        depths = depths[np.concatenate(kept).astype(bool)]
    depths = depths[depths > 0]
    if not depths.size:
        raise ValueError("`iterations` must hold at least one real token. Received: none")
    deepest = int(depths.max())
    levels, counts = np.arange(1, deepest + 1), np.bincount(depths, minlength=deepest + 1)[1:]
    with axes_for(path, ax) as ax:
        bars = ax.bar(levels, counts, color=_colours(deepest) / 255, edgecolor="#4a4a4a", width=0.8)
        shares = [f"{share:.0%}" for share in counts / depths.size]
        ax.bar_label(bars, shares, padding=2, bbox={"fc": "white", "ec": "none", "pad": 0.5})
        mean = depths.mean()
        ax.axvline(mean, color="#333333", linestyle="--", label=f"mean {mean:.2f}")
        ax.set(
            xlabel="iterations",
            ylabel="tokens",
            title=f"Depth of {depths.size} tokens",
            xlim=(0.4, deepest + 0.6),
        )
        ax.margins(y=0.12)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    return ax


def depth_text(
    tokens: Iterable,
    iterations: Sequence[int] | np.ndarray,
    style: str = "ansi",
    decode: Callable[[int], str] | None = None,
) -> str:
    """A text whose tokens are coloured by the iterations they thought for, under a legend.

    Args:
        tokens: The tokens of one sequence, strings or, with `decode`, ids.
        iterations: Iterations of each token, 0 at padding, which is left out.
        style: `"ansi"` for a terminal, `"html"` for a page or a notebook, `"plain"` for numbers
            behind the tokens.
        decode: Gives the string of a token id.

    Returns:
        The text in that style.

    Raises:
        ValueError: lengths that differ, iterations that are no integers from 0 to 1000, tokens that
            are no strings, or an unknown style.

    Example:

    ```python
    from qwen3_next import depth_text

    print(depth_text(["Paris", " is", " in"], [3, 1, 2]))
    text = depth_text(["Paris", " is", " in"], [3, 1, 2], style="plain")
    assert text.endswith("Paris₃ is₁ in₂")
    ```
    """
    require(one_of(STYLES), "style", style)
    require(_TOKENS, "tokens", tokens)
    require(_DECODE, "decode", decode)
    texts = [token if decode is None else decode(token) for token in tokens]
    depths = host_array("iterations", iterations)
    if depths.shape != (len(texts),):
        raise ValueError(
            "`iterations` must have one entry for each of `tokens`. Received: "
            f"iterations.shape={depths.shape}, {len(texts)} tokens"
        )
    _check_depths(depths)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`tokens` must be strings, or ids with `decode`. Received: {text!r}")
    deepest = int(depths.max(initial=1))
    paint, frame = STYLES[style]
    label = " " if style == "plain" else " {} "
    levels = "".join(paint(label.format(n), n, deepest) for n in range(1, deepest + 1))
    body = "".join(paint(text, depth, deepest) for text, depth in zip(texts, depths) if depth)
    return frame(f"iterations {levels}", body)


def _flat_rows(name, values):
    require(_ROWS, name, values)
    return [host_array(name, row).ravel() for row in values]


def _check_depths(depths):
    is_integer = np.issubdtype(depths.dtype, np.integer)
    if not is_integer or not ((depths >= 0) & (depths <= DEEPEST)).all():
        raise ValueError(
            f"`iterations` must be integers of at least 0, where 0 is padding, and at most "
            f"{DEEPEST}. Received: {depths.dtype} {shown(depths.tolist())}"
        )


def _colours(deepest):
    """A colour for each depth from 1, `(deepest, 3)` in [0, 255]."""
    places = np.linspace(0, len(PALETTE) - 1, max(deepest, 2))[:deepest]
    channels = [np.interp(places, np.arange(len(PALETTE)), channel) for channel in PALETTE.T]
    return np.stack(channels, axis=-1).round().astype(int)


def _paper_and_ink(depth, deepest):
    paper = _colours(deepest)[depth - 1]
    light = paper @ (0.299, 0.587, 0.114) > 140
    return tuple(paper), (20, 20, 20) if light else (255, 255, 255)


def _paint_ansi(text, depth, deepest):
    paper, ink = (";".join(map(str, colour)) for colour in _paper_and_ink(depth, deepest))
    # Escape characters of the text itself stay visible; a colour must not run on to the next line.
    lines = text.replace("\x1b", "␛").split("\n")
    return "\n".join(line and f"\x1b[48;2;{paper};38;2;{ink}m{line}\x1b[0m" for line in lines)


def _paint_html(text, depth, deepest):
    paper, ink = ("#{:02x}{:02x}{:02x}".format(*each) for each in _paper_and_ink(depth, deepest))
    colours = f"background:{paper};color:{ink}"
    return f'<span style="{colours}" title="iterations: {depth}">{html.escape(text)}</span>'


def _paint_plain(text, depth, deepest):
    return text + str(depth).translate(SUBSCRIPTS)


def _frame_lines(legend, body):
    return f"{legend}\n{body}"


def _frame_html(legend, body):
    style = "font-family:monospace;line-height:1.6;white-space:pre-wrap"
    return f'<div style="{style}">{legend}\n\n{body}</div>'


STYLES = {
    "ansi": (_paint_ansi, _frame_lines),
    "html": (_paint_html, _frame_html),
    "plain": (_paint_plain, _frame_lines),
}
