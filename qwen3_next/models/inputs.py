"""What a model accepts: token ids, alone or with masks, segment ids, and decisions for its rows."""

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from qwen3_next.config.validation import Rule, require, shown
from qwen3_next.layers.ops.checks import (
    as_mask,
    exact_int32,
    known_values,
    require_floatx,
    to_int32,
    to_integers,
)
from qwen3_next.layers.ops.cross_entropy import IGNORE
from qwen3_next.layers.ops.sequence import token_ranks
from qwen3_next.layers.ops.tensor_types import Tensor

KEYS = ("token_ids", "padding_mask", "segment_ids", "prompt_mask", "route", "branch")
BY_TOKEN = ("padding_mask", "segment_ids", "prompt_mask")
BY_ROW = {"route": (2,), "branch": (1, 2)}  # with so many dims
_INPUTS = Rule(
    "an array (batch, tokens) of token ids, or a dict of arrays",
    lambda x: all(map(_is_array, x.values())) if isinstance(x, dict) else _is_array(x),
)
_SEQUENCES = Rule(
    "a list of sequences",
    lambda x: (
        isinstance(x, Iterable)
        and not isinstance(x, str | bytes | dict)
        and getattr(x, "ndim", 1) > 0  # an array without dims calls itself iterable, too
    ),
)


class Inputs(NamedTuple):
    """A batch of token ids.

    Attributes:
        token_ids: `(B, T)` int32.
        padding_mask: `(B, T)` bool, true at real tokens, or `None`.
        segment_ids: `(B, T)` int32, or `None`.
        prompt_mask: `(B, T)` bool, true at the tokens that the routers of a think loop decide from,
            or `None`.
        route: `(B, L)` int32, how often each of L think layers runs for a row, or `None`.
        branch: `(B,)` or `(B, k)` int32, the LoRA expert of a row, in all or in each of k
            iterations, or `None`.
    """

    token_ids: Tensor
    padding_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    prompt_mask: Tensor | None = None
    route: Tensor | None = None
    branch: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """The fields that are not `None`, as a model takes them."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def unpack(inputs: Tensor | dict | Inputs) -> Inputs:
    """Turns a tensor `(B, T)` or a dict with `KEYS` into `Inputs`, checking shapes and dtypes."""
    require_floatx()
    if isinstance(inputs, Inputs):
        return inputs
    fields = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
    unknown = set(fields) - set(KEYS)
    if unknown or "token_ids" not in fields:
        raise ValueError(
            f"Inputs must be token ids or a dict with 'token_ids' and optionally {KEYS[1:]}. "
            f"Received keys: {shown([*fields])}"
        )
    token_ids = _integers("token_ids", fields["token_ids"])
    if len(token_ids.shape) != 2:
        raise ValueError(
            "`token_ids` must have shape (batch, tokens). "
            f"Received: token_ids.shape={tuple(token_ids.shape)}"
        )
    if token_ids.shape[1] == 0:
        raise ValueError("`token_ids` must hold at least one token per row. Received: 0 tokens")
    others = {}
    for key in BY_TOKEN:
        if fields.get(key) is not None:
            value = _tensor(key, fields[key], "buif")
            if not _same_shape(value.shape, token_ids.shape):
                raise ValueError(
                    f"`{key}` must have the shape of `token_ids`, {tuple(token_ids.shape)}. "
                    f"Received: {key}.shape={tuple(value.shape)}"
                )
            others[key] = _by_token(key, value)
    for key, dims in BY_ROW.items():
        if fields.get(key) is not None:
            value = _integers(key, fields[key])
            rows = (token_ids.shape[0], *value.shape[1:])
            if len(value.shape) not in dims or not _same_shape(value.shape, rows):
                raise ValueError(
                    f"`{key}` must have {' or '.join(map(str, dims))} dims and as many rows as "
                    f"`token_ids`, {token_ids.shape[0]}. Received: {key}.shape={tuple(value.shape)}"
                )
            others[key] = value
    return Inputs(token_ids, **others)


def next_token_labels(inputs: Inputs, labels: Tensor | None = None) -> Tensor:
    """Labels that line up with the logits: at t the label of the next token, or -100.

    -100 stands at the last token, at padding, before padding and at the end of a segment.

    Args:
        inputs: `Inputs`.
        labels: `(B, T)` unshifted, -100 where ignored. Defaults to the token ids.
    """
    labels = inputs.token_ids if labels is None else _integers("labels", labels)
    if not _same_shape(labels.shape, inputs.token_ids.shape):
        raise ValueError(
            f"`labels` must have the shape of `token_ids`, {tuple(inputs.token_ids.shape)}. "
            f"Received: labels.shape={tuple(labels.shape)}"
        )
    shifted = labels[:, 1:]
    if inputs.padding_mask is not None:
        both = inputs.padding_mask[:, :-1] & inputs.padding_mask[:, 1:]
        shifted = ops.where(both, shifted, IGNORE)
    if inputs.segment_ids is not None:
        same = inputs.segment_ids[:, :-1] == inputs.segment_ids[:, 1:]
        shifted = ops.where(same, shifted, IGNORE)
    return ops.pad(shifted, [[0, 0], [0, 1]], constant_values=IGNORE)


def step_labels(inputs: Inputs, y: Any) -> Tensor:
    """The labels `(B, T)` of a step, -100 where ignored: `y` at real tokens, or the next tokens."""
    if y is None:
        return next_token_labels(inputs)
    labels = to_int32(y)
    if inputs.padding_mask is not None:
        labels = ops.where(inputs.padding_mask, labels, IGNORE)
    return labels


def last_hidden(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden cache `(B, D)` of every row's last real token; of any token where there is none."""
    if mask is None:
        return hidden[:, -1]
    # The first place that has the last rank is the last real token.
    ranks = token_ranks(mask)
    place = ops.argmax(ops.cast(ranks == ranks[:, -1:], "int32"), axis=-1)
    place = ops.cast(place, "int32")[:, None, None]
    return ops.take_along_axis(hidden, place, axis=1)[:, 0]


def require_inputs(inputs: Any) -> None:
    """Raises `ValueError` for what is no array, nor a dict or a named tuple of arrays."""
    require(_INPUTS, "inputs", inputs)


def check_token_ids(inputs: Any, vocab_size: int) -> None:
    """Raises `ValueError` for ragged rows, a token id outside the vocabulary, and for masks and
    segment ids that a cast would change.

    Looks at arrays that are on the host or were computed already; inside a compiled function
    there are no values to look at.
    """
    token_ids = inputs.get("token_ids") if isinstance(inputs, dict) else inputs
    if hasattr(token_ids, "row_splits"):  # a tensor to Keras, but not to its ops
        raise ValueError(
            "`token_ids` must be an array: `pad` makes one of rows of different lengths. "
            f"Received: token_ids={shown(token_ids)}"
        )
    for key in BY_TOKEN if isinstance(inputs, dict) else ():
        _check_by_token(key, inputs.get(key))
    values = host_values("token_ids", token_ids)
    if values is None or values.size == 0 or not np.issubdtype(values.dtype, np.integer):
        return  # `unpack` refuses what are no integers
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"Token ids must be in [0, vocab_size={vocab_size}). Received ids from {low} to {high}"
        )


def check_labels(labels: Any, num_classes: int, ignored: bool) -> None:
    """Raises `ValueError` for labels that are no class; -100 may be `ignored`.

    Looks at values where there are some, as `check_token_ids` does.
    """
    values = host_values("labels", labels)
    if values is None or values.size == 0:
        return
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"Labels must be integers. Received: labels of dtype {values.dtype}")
    wrong = (values < 0) | (values >= num_classes)
    if ignored:
        wrong &= values != IGNORE
    if wrong.any():
        what = f" or {IGNORE}" if ignored else ""
        raise ValueError(
            f"Labels must be in [0, {num_classes}){what}. Received: {values[wrong].flat[0]}"
        )


def token_rows(what: str, sequences: Iterable) -> list[np.ndarray]:
    """Sequences of token ids as arrays, each one checked; `what` is the word for one of them."""
    require(_SEQUENCES, f"{what}s", sequences)
    rows = [host_array(f"{what}s[{number}]", sequence) for number, sequence in enumerate(sequences)]
    if not rows:
        raise ValueError(f"`{what}s` must hold at least one row. Received: none")
    for number, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(
                f"Every {what} must be a non-empty sequence of integer token ids. "
                f"Received: {what} {number} with shape {row.shape} and dtype {row.dtype}"
            )
    return rows


def token_id_list(name: str, values: Any, vocab_size: int) -> list[int]:
    """Token ids of a list, a range or an array, each one checked; `name` is the argument's."""
    try:
        given = list(values)
        found = [operator.index(value) for value in given]
    except TypeError as error:
        raise ValueError(
            f"`{name}` must be a list of integers. Received: {name}={shown(values)}"
        ) from error
    if any(isinstance(value, bool | np.bool_) for value in given):
        raise ValueError(f"`{name}` must be a list of integers. Received: {name}={shown(values)}")
    if any(not 0 <= value < vocab_size for value in found):
        raise ValueError(
            f"`{name}` must be in [0, vocab_size={vocab_size}). Received: {name}={shown(found)}"
        )
    return found


def host_values(name: str, x: Any) -> np.ndarray | None:
    """An argument as a NumPy array, or `None` where it has no values yet."""
    if type(x) in (list, tuple):
        return host_array(name, x)
    return known_values(x)


def _is_array(x):
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind in "buif"
    known = x is None or isinstance(x, keras.KerasTensor) or ops.is_tensor(x)
    return known or hasattr(x, "__array__") or hasattr(x, "_fields")


def host_array(name: str, x: Any) -> np.ndarray:
    """An argument as a NumPy array; `ValueError` for what cannot be one, such as ragged lists."""
    try:
        return ops.convert_to_numpy(x) if ops.is_tensor(x) else np.asarray(x)
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
        raise ValueError(f"`{name}` must be an array. Received: {name}={shown(x)}") from error


def host_mask(name: str, x: Any) -> np.ndarray:
    """A mask as a NumPy array of bools; `ValueError` for what is no array of numbers."""
    mask = host_array(name, x)
    if mask.dtype.kind not in "buif" or not np.isfinite(mask).all():
        raise ValueError(f"`{name}` must be an array of numbers. Received: {name}={shown(x)}")
    return mask.astype(bool)


def _tensor(name, x, kinds):
    """`x` as a tensor; `ValueError` for an array of another kind than NumPy's `kinds`."""
    if not ops.is_tensor(x) and not isinstance(x, keras.KerasTensor | keras.Variable):
        x = host_array(name, x)
        if x.dtype.kind not in kinds:
            raise ValueError(f"`{name}` must be an array of numbers. Received: {name}={shown(x)}")
    return ops.convert_to_tensor(x)


def _check_by_token(key, x):
    if ops.is_tensor(x) and keras.backend.standardize_dtype(x.dtype) in ("bool", "int32"):
        return  # nothing to find, so nothing to fetch
    values = host_values(key, x)
    if values is not None and values.dtype.kind in "uif":
        _by_token(key, values)  # Keras narrows it on the way to `unpack`


def _by_token(key, value):
    """Masks as bool and segment ids as int32; `ValueError` for what a cast would change."""
    return exact_int32(key, value) if key == "segment_ids" else as_mask(value, key)


def _integers(name, x):
    return to_integers(name, _tensor(name, x, "buif"))


def _same_shape(a, b):
    return len(a) == len(b) and all(m == n or m is None or n is None for m, n in zip(a, b))
