"""From sequences of different lengths to the arrays a model takes."""

import numpy as np


def pad(sequences, length=None, side="right"):
    """Pads sequences to a common length.

    Args:
        sequences: List of non-empty sequences of token ids.
        length: Common length. Defaults to that of the longest.
        side: `"right"` or `"left"`.

    Returns:
        Dict with `"token_ids"` `(B, length)` int32 and `"padding_mask"`, true at real tokens.

    Raises:
        ValueError: an empty or too long sequence, or an unknown side.
    """
    if side not in ("left", "right"):
        raise ValueError(f"`side` must be 'left' or 'right'. Received: {side=}")
    rows = _rows(sequences, length)
    length = max(len(row) for row in rows) if length is None else length
    token_ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        token_ids[number, place] = row
        mask[number, place] = True
    return {"token_ids": token_ids, "padding_mask": mask}


def pack(sequences, length):
    """Packs sequences into rows of a common length, first fit, longest first.

    Args:
        sequences: List of non-empty sequences of token ids, none longer than `length`.
        length: Length of a row.

    Returns:
        Dict with `"token_ids"`, `"padding_mask"` and `"segment_ids"`, all `(B, length)`; segments
        are numbered from 1 in each row, 0 is padding.

    Raises:
        ValueError: an empty or too long sequence.
    """
    rows = _rows(sequences, length)
    packed = []
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


def _rows(sequences, length):
    rows = [np.asarray(sequence) for sequence in sequences]
    if not rows:
        raise ValueError("`sequences` must hold at least one sequence. Received: none")
    for number, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(
                "Every sequence must be a non-empty sequence of integer token ids. "
                f"Received: sequence {number} with shape {row.shape} and dtype {row.dtype}"
            )
        if length is not None and row.size > length:
            raise ValueError(
                f"Sequences must have at most `length`={length} tokens. "
                f"Received: sequence {number} with {row.size} tokens"
            )
    return rows
