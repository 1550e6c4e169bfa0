"""Causal depthwise convolution over the real tokens of a row.

    y_t[c] = activation(sum_{j < W} kernel[W-1-j, c] * x_{t-j}[c])

where x_{t-j} is the j-th real token before t in the same segment, taken from the state once the
row itself runs out, and 0 where there is none. W taps are W shifted products: for the few taps of
a short convolution that is faster than a convolution primitive on every backend.

Public: `causal_conv1d`.
"""

import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import keras
from keras import ops

from qwen3_next.config.validation import Rule, require

from ..activations import ACTIVATIONS
from ..backend.autodiff import custom_gradient
from ..backend.loops import zero_after
from ..checks import as_floats, as_mask, exact_int32, if_given, require_shape, require_tokens
from ..rows import permute_tokens
from ..sequence import compaction, segment_index, valid_lengths
from ..sums import column_sums
from ..tensor_types import Tensor


def _is_activation(value):
    if value is not None and not isinstance(value, str):
        return False
    try:
        return keras.activations.get(value) is not None
    except ValueError:
        return False


ACTIVATION = Rule("None or the name of a Keras activation", _is_activation)


class CausalConv1DOutput(NamedTuple):
    """What `causal_conv1d` returns.

    Attributes:
        output: `(B, T, C)` in the dtype of the inputs, 0 at padding.
        state: `(B, W-1, C)` in the dtype of the inputs, the inputs of the last real tokens.
    """

    output: Annotated[Tensor, "B T C"]
    state: Annotated[Tensor, "B W-1 C"]


def causal_conv1d(
    inputs: Annotated[Tensor, "B T C"],
    kernel: Annotated[Tensor, "W C"],
    *,
    state: Annotated[Tensor, "B W-1 C"] | None = None,
    padding_mask: Annotated[Tensor, "B T"] | None = None,
    segment_ids: Annotated[Tensor, "B T"] | None = None,
    activation: str | None = "silu",
) -> CausalConv1DOutput:
    """Convolves `inputs` with a depthwise kernel of W taps and returns the new tail as state.

    Padding may stand anywhere: the taps of a token are the real tokens before it.

    Args:
        inputs: `(B, T, C)`.
        kernel: `(W, C)`; the last tap multiplies the current token.
        state: `(B, W-1, C)`, the inputs of the W-1 tokens before these, or `None` for zeros.
        padding_mask: `(B, T)` bool, true at real tokens, or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`. The first
            segment continues `state`.
        activation: a Keras activation name, or `None`.

    Returns:
        `CausalConv1DOutput(output, state)`; the state keeps the tokens of the last segment only.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit together, an unknown activation, or rows
            without tokens.
    """
    inputs, kernel = as_floats("inputs", inputs), as_floats("kernel", kernel)
    state = if_given(as_floats, "state", state)
    segment_ids = if_given(exact_int32, "segment_ids", segment_ids)
    padding_mask = as_mask(padding_mask)
    _check(inputs, kernel, state, padding_mask, segment_ids)
    require(ACTIVATION, "activation", activation)
    taps, channels = kernel.shape
    kernel = ops.cast(kernel, inputs.dtype)
    if state is None:
        state = ops.zeros((ops.shape(inputs)[0], taps - 1, channels), inputs.dtype)
    state = ops.cast(state, inputs.dtype)

    segment = None if segment_ids is None else segment_index(segment_ids, padding_mask)
    if padding_mask is not None:
        sort_indices, inverse_sort = compaction(padding_mask)
        inputs = ops.where(padding_mask[..., None], inputs, 0.0)
        inputs = permute_tokens(inputs, sort_indices, inverse_sort)
        if segment is not None:
            segment = ops.take_along_axis(segment, sort_indices, axis=-1)
    extended = ops.concatenate([state, inputs], axis=1)  # (B, W-1+T, C)
    if segment is not None:
        # Numbers start at 0 with the segment that continues the state.
        segment = ops.pad(segment, [[0, 0], [taps - 1, 0]])

    inside = activation if activation in ACTIVATIONS else None
    output = _differentiable(inside)(extended, kernel, *([] if segment is None else [segment]))
    if inside is None:
        output = keras.activations.get(activation)(output)
    if padding_mask is not None:
        output = permute_tokens(output, inverse_sort, sort_indices)
        output = ops.where(padding_mask[..., None], output, 0.0)
    return CausalConv1DOutput(output, _new_state(extended, segment, taps, padding_mask))


def _new_state(
    extended: Annotated[Tensor, "B W-1+T C"],
    segment: Annotated[Tensor, "B W-1+T"] | None,
    taps: int,
    padding_mask: Annotated[Tensor, "B T"] | None,
) -> Annotated[Tensor, "B W-1 C"]:
    """The inputs of the last W-1 real tokens, 0 before the last segment."""
    kept = None
    if padding_mask is None:
        length = ops.shape(extended)[1] - taps + 1
        state = extended[:, length:]
        if segment is not None:
            kept = segment[:, length:] == segment[:, -1:]
    else:
        index = valid_lengths(padding_mask)[:, None] + ops.arange(taps - 1, dtype="int32")
        state = ops.take_along_axis(extended, index[..., None], axis=1)
        if segment is not None:
            numbers = ops.take_along_axis(segment, index, axis=1)
            kept = numbers == numbers[:, -1:]
    return state if kept is None else ops.where(kept[..., None], state, 0.0)


@functools.cache
def _differentiable(activation: str | None) -> Callable[..., Tensor]:
    """Shifted products of `extended (B, W-1+T, C)`, activated.

    Autodiff would keep what goes into the activation and comes out of it, and every shift of the
    inputs: several times as much as the inputs, from which the backward pass computes it again.
    """

    def terms(extended, taps, segment=None):
        """The inputs under every tap, `(B, T, C)`, and where they belong to the segment."""
        length = ops.shape(extended)[1] - taps + 1
        for tap in range(taps):
            same = None
            if segment is not None and tap < taps - 1:
                same = segment[:, tap : tap + length] == segment[:, taps - 1 :]
                same = ops.expand_dims(same, -1)
            yield tap, extended[:, tap : tap + length], same

    def convolved(extended, kernel, *segment):
        output = 0.0
        for tap, rows, same in terms(extended, kernel.shape[0], *segment):
            term = rows * kernel[tap]
            output = output + (term if same is None else ops.where(same, term, 0.0))
        return output

    def forward(extended, kernel, *segment):
        output = convolved(extended, kernel, *segment)
        if activation is not None:
            output = ACTIVATIONS[activation].function(output)
        return output, (extended, kernel, *segment)

    def backward(residuals, d_output):
        extended, kernel, *segment = residuals
        taps = kernel.shape[0]
        if activation is not None:
            # Not the same expression to a compiler, which would keep the forward pass' results.
            again = kernel + zero_after(d_output, kernel.dtype)
            inner = convolved(extended, again, *segment)
            d_output = d_output * ACTIVATIONS[activation].derivative(inner)
        d_extended, d_kernel = 0.0, []
        for tap, rows, same in terms(extended, taps, *segment):
            d_term = d_output if same is None else ops.where(same, d_output, 0.0)
            d_kernel.append(column_sums(d_term * rows))
            place = [[0, 0], [tap, taps - 1 - tap], [0, 0]]
            d_extended = d_extended + ops.pad(d_term * kernel[tap], place)
        d_kernel = ops.cast(ops.stack(d_kernel), kernel.dtype)
        return d_extended, d_kernel, *(None for _ in segment)

    return custom_gradient(forward, backward)


def _check(
    inputs: Tensor,
    kernel: Tensor,
    state: Tensor | None,
    padding_mask: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    require_shape("inputs", inputs, (None, None, None))
    require_tokens("inputs", inputs)
    require_shape("kernel", kernel, (None, inputs.shape[2]))
    taps, channels = kernel.shape
    require_shape("state", state, (inputs.shape[0], taps - 1, channels))
    require_shape("padding_mask", padding_mask, inputs.shape[:2])
    require_shape("segment_ids", segment_ids, inputs.shape[:2])
