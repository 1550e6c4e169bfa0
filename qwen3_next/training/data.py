"""From sequences to the arrays a model takes, and from prompts to a model's own continuations."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from qwen3_next.config.validation import BOOLEAN, LARGEST, Rule, integer, one_of, require, shown
from qwen3_next.models.inputs import token_rows

Batch = dict[str, np.ndarray]
_GENERATES = Rule("a model that generates", lambda model: hasattr(model, "generate"))


def pad(sequences: Iterable, length: int | None = None, side: str = "right") -> Batch:
    """Pads sequences to a common length.

    Args:
        sequences: List of non-empty sequences of token ids.
        length: Common length. Defaults to that of the longest.
        side: `"right"` or `"left"`.

    Returns:
        Dict with `"token_ids"` `(B, length)` int32 and `"padding_mask"`, true at real tokens.

    Raises:
        ValueError: an empty or too long sequence, an id that is negative or too large for int32,
            or an unknown side.

    Example:

    ```python
    from qwen3_next import pad

    batch = pad([[1, 2, 3], [4, 5]], side="left")
    assert batch["padding_mask"].tolist() == [[True, True, True], [False, True, True]]
    ```
    """
    require(one_of(("left", "right")), "side", side)
    rows = _rows(sequences, length)
    length = max(len(row) for row in rows) if length is None else length
    token_ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        token_ids[number, place] = row
        mask[number, place] = True
    return {"token_ids": token_ids, "padding_mask": mask}


def pack(sequences: Iterable, length: int) -> Batch:
    """Packs sequences into rows of a common length, first fit, longest first.

    Args:
        sequences: List of non-empty sequences of token ids, none longer than `length`.
        length: Length of a row.

    Returns:
        Dict with `"token_ids"`, `"padding_mask"` and `"segment_ids"`, all `(B, length)`; segments
        are numbered from 1 in each row, 0 is padding.

    Raises:
        ValueError: an empty or too long sequence, or an id that is negative or too large for int32.

    Example:

    ```python
    from qwen3_next import pack

    batch = pack([[1, 2, 3], [4, 5], [6]], length=4)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2], [1, 1, 0, 0]]
    ```
    """
    require(integer(1), "length", length)
    rows = _rows(sequences, length)
    packed: list[list[np.ndarray]] = []
    for row in sorted(rows, key=len, reverse=True):
        fits = (bin_ for bin_ in packed if sum(map(len, bin_)) + len(row) <= length)
        target = next(fits, None)
        if target is None:
            packed.append([row])
        else:
            target.append(row)
    batch = pad([np.concatenate(bin_) for bin_ in packed], length)
    segments = [np.repeat(np.arange(1, len(b) + 1), [len(row) for row in b]) for b in packed]
    batch["segment_ids"] = pad(segments, length)["token_ids"]
    return batch


def self_distillation_data(
    model: Any,
    prompts: Iterable,
    max_new_tokens: int = 128,
    *,
    batch_size: int = 8,
    progress: bool = True,
    **sampling: Any,
) -> Batch:
    """Prompts with the model's own continuations, to train its MTP modules on.

    Modules that learn the model's own continuations agree with it more often than modules that
    learn someone else's text. Decoding is plain, so it does not depend on the modules.

    Args:
        model: `Qwen3Next`.
        prompts: List of token-id sequences.
        max_new_tokens: Most tokens to add to a prompt.
        batch_size: Prompts that are continued at a time.
        progress: Whether to show a progress bar.
        **sampling: Other arguments of `generate`; greedy by default.

    Returns:
        Dict with `"token_ids"` and `"padding_mask"`, padded on the right, as `fit` takes it.

    Reference: FastMTP, arXiv 2509.18362, section 3.

    Example:

    ```python
    from qwen3_next import MTPConfig, Qwen3Next, self_distillation_data

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=1)
    data = self_distillation_data(model, [[1, 2, 3], [4, 5]], 4, progress=False)
    assert data["token_ids"].shape == (2, 7)
    ```
    """
    require(_GENERATES, "model", model)
    require(integer(1), "batch_size", batch_size)
    require(BOOLEAN, "progress", progress)
    if "use_speculative" in sampling:
        raise ValueError(
            "Decoding is plain here, so that it does not depend on the modules: leave out "
            f"`use_speculative`. Received: use_speculative={shown(sampling['use_speculative'])}"
        )
    prompts = token_rows("prompt", prompts)
    bar = keras.utils.Progbar(len(prompts), unit_name="prompt") if progress else None
    rows = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        tokens, _ = model.generate(batch, max_new_tokens, use_speculative=False, **sampling)
        rows += [np.concatenate(pair) for pair in zip(batch, tokens)]
        if bar is not None:
            bar.add(len(batch))
    return pad(rows)


def _rows(sequences, length):
    if length is not None:
        require(integer(1), "length", length)
    rows = token_rows("sequence", sequences)
    for number, row in enumerate(rows):
        if length is not None and row.size > length:
            raise ValueError(
                f"Sequences must have at most `length`={length} tokens. "
                f"Received: sequence {number} with {row.size} tokens"
            )
        if not 0 <= int(row.min()) <= int(row.max()) <= LARGEST:
            raise ValueError(
                f"Token ids must be in [0, {LARGEST}]. "
                f"Received: sequence {number} with ids from {row.min()} to {row.max()}"
            )
    return rows
