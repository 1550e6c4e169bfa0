"""Prompts on the host: read, checked, and cut into chunks of a few widths."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
from keras import ops

from qwen3_next.config.validation import shown
from qwen3_next.layers.ops.backend.sharding import devices
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.inputs import check_token_ids, host_array, host_mask, token_rows

SMALLEST_CHUNK = 16
PASS = 64  # tokens: what one more pass costs, whatever it reads (118 M parameters, two CPU cores)


class Prompts(NamedTuple):
    """Prompts as arrays.

    Attributes:
        token_ids: `(B, T)` int32, padded on the right.
        lengths: `(B,)` int32.
        route: `(B, L)` int32, a route through the think layers, or `None`.
        branch: `(B,)` or `(B, k)` int32, LoRA experts, or `None`.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    route: np.ndarray | None = None
    branch: np.ndarray | None = None


class PrefillChunk(NamedTuple):
    """Some tokens of R prompts, and beside each the token that follows it.

    Attributes:
        token_ids: `(R, C)` int32.
        mask: `(R, C)` bool, true at real tokens.
        next_ids: `(R, C)` int32.
        next_mask: `(R, C)` bool, true where the following token is real.
        rows: `(R,)` int32, which prompts they are; an empty tuple for all.
        decisions: What goes with the first tokens of a prompt: `"prompt_mask"`, `"route"` and
            `"branch"`, as a model takes them; an empty tuple for nothing.
    """

    token_ids: Tensor
    mask: Tensor
    next_ids: Tensor
    next_mask: Tensor
    rows: Any = ()
    decisions: Any = ()


def read_prompts(prompts: Iterable | dict | np.ndarray, vocab_size: int) -> Prompts:
    """Turns what `generate` accepts into `Prompts`, checking every row."""
    rows = token_rows("prompt", _rows_of(prompts))
    for row in rows:
        check_token_ids(row, vocab_size)
    lengths = np.array([len(row) for row in rows], np.int32)
    token_ids = np.zeros((len(rows), lengths.max()), np.int32)
    for row, out in zip(rows, token_ids):
        out[: len(row)] = row
    return Prompts(token_ids, lengths)


def prefill_chunks(prompts: Prompts, size: int, longest: int) -> Iterator[PrefillChunk]:
    """Cuts the prompts into chunks of `size` tokens, the last one of a bucketed width.

    No chunk reaches beyond `longest` tokens, the most that the model takes. Prompts that have ended
    are left out of those that follow, but for as many as make their number a power of two.
    """
    for start, width in _spans(prompts.lengths.max(), size, longest):
        ids = np.zeros((len(prompts.lengths), width + 1), "int32")
        here = prompts.token_ids[:, start : start + width + 1]
        ids[:, : here.shape[1]] = here
        mask = start + np.arange(width + 1) < prompts.lengths[:, None]
        arrays = ids[:, :-1], mask[:, :-1], ids[:, 1:], mask[:, 1:]
        rows = _unfinished(prompts.lengths, start)
        if len(rows) < len(mask) and devices() is None:
            arrays = *(array[rows] for array in arrays), rows
        yield PrefillChunk(*(ops.convert_to_tensor(array) for array in arrays))


def chunk_size(lengths: np.ndarray, most: int, longest: int) -> int:
    """Tokens of a chunk: `most`, or half as many where ragged prompts are read sooner so."""
    if len(set(lengths)) == 1:
        return most

    def cost(size):
        spans = _spans(lengths.max(), size, longest)
        return sum(PASS + width * len(_unfinished(lengths, start)) for start, width in spans)

    return min(most, max(most // 2, 1), key=cost)


def _spans(length: int, size: int, longest: int) -> Iterator[tuple[int, int]]:
    """Where chunks begin, and how many tokens they have."""
    for start in range(0, length, size):
        yield start, min(bucket(min(length - start, size), SMALLEST_CHUNK), size, longest - start)


def _unfinished(lengths: np.ndarray, start: int) -> np.ndarray:
    """The prompts that go on at `start`, and the longest others up to a power of two."""
    count = 1 << int(np.sum(lengths > start) - 1).bit_length()
    return np.sort(np.argsort(-lengths, kind="stable")[:count]).astype("int32")


def bucket(size: int, smallest: int) -> int:
    """The power of two, or three quarters of one, that is at least `size` and `smallest`."""
    found = smallest
    while found < size:
        found *= 2
    three_quarters = found * 3 // 4
    return three_quarters if three_quarters >= max(size, smallest) else found


def _rows_of(prompts) -> Iterable[Annotated[np.ndarray, "T"]]:
    if isinstance(prompts, dict):
        return _unpadded_rows(prompts)
    if not ops.is_tensor(prompts) and not hasattr(prompts, "__array__"):
        return prompts
    array = host_array("prompts", prompts)
    if array.ndim != 2:
        raise ValueError(
            "`prompts` must be a list of token-id sequences or have shape (batch, tokens). "
            f"Received: prompts.shape={array.shape}"
        )
    return list(array)


def _unpadded_rows(prompts):
    unknown = set(prompts) - {"token_ids", "padding_mask"}
    if unknown or "token_ids" not in prompts:
        raise ValueError(
            "Prompts must be a dict with 'token_ids' and optionally 'padding_mask'. "
            f"Received keys: {shown([*prompts])}"
        )
    token_ids = host_array("token_ids", prompts["token_ids"])
    mask = prompts.get("padding_mask")
    mask = np.ones(token_ids.shape, bool) if mask is None else host_mask("padding_mask", mask)
    if token_ids.ndim != 2 or mask.shape != token_ids.shape:
        raise ValueError(
            "`token_ids` must have shape (batch, tokens) and `padding_mask` the same. "
            f"Received: token_ids.shape={token_ids.shape}, padding_mask.shape={mask.shape}"
        )
    return [row[real] for row, real in zip(token_ids, mask)]
