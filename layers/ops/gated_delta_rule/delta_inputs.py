"""The inputs of the delta rule, in the layouts that they go through.

                 query, key              value                   log_decay, beta     segment

    given        (B, T, G, K)            (B, T, H, V)            (B, T, H)           (B, T)
    by group     (B, T, G, 1, K)         (B, T, G, R, V)         (B, T, G, R)        (B, T)
    chunks       (N, B, C, G, 1, K)      (N, B, C, G, R, V)      (N, B, C, G, R)     (N, B, C)
    by head      (B, G, 1, C, K)         (B, G, R, C, V)         (B, G, R, C)        (B, C)

Value head h belongs to key head h // R. All is float32 but what is given. Chunks are kept token by
token and turned head by head inside the loop over them, while they are in the cache.

Shapes: B batch, T tokens, H value heads, G key heads, R = H / G, C tokens of a chunk, N chunks.

    DeltaInputs                     the inputs, in any of these layouts
    floats_given                    what is given, checked to be floats
    check_shapes                    whether what is given fits together
    by_group, state_by_group        from what is given
    chunk_size_for, to_chunks       into chunks
    by_head                         one chunk, head by head
    by_token, gradients_by_token    back from the layout by head
    as_given                        outputs by group as outputs by value head
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from keras import ops

from ..checks import as_floats, if_given, require_shape, require_tokens
from ..padding import to_blocks
from ..tensor_types import Tensor

# A logarithm of 0 in float32, as those below it are, that sums and products with 0 keep finite.
NOTHING_LEFT = -1e4


class DeltaInputs(NamedTuple):
    """What the delta rule reads besides its state; shapes by group, others in the module's table.

    Attributes:
        query: `(B, T, G, 1, K)` float32, scaled.
        key: `(B, T, G, 1, K)` float32.
        value: `(B, T, G, R, V)` float32.
        log_decay: `(B, T, G, R)` float32, 0 at padding.
        beta: `(B, T, G, R)` float32, 0 at padding.
        segment: `(B, T)` int32, numbers from 0 that never fall along T, or `None` for one segment.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    beta: Tensor
    segment: Tensor = None


def floats_given(given: DeltaInputs, state: Tensor | None) -> tuple[DeltaInputs, Tensor | None]:
    """Inputs and state as tensors; `ValueError` for integers, which outputs would be cast to."""
    floats = {name: as_floats(name, getattr(given, name)) for name in DeltaInputs._fields[:5]}
    return given._replace(**floats), if_given(as_floats, "state", state)


def check_shapes(
    given: DeltaInputs,
    state: Annotated[Tensor, "B H K V"] | None,
    padding_mask: Annotated[Tensor, "B T"] | None,
) -> None:
    """Raises `ValueError` unless the inputs, as they were given, fit together."""
    query, key, value, log_decay, beta, segment_ids = given
    require_shape("value", value, (None, None, None, None))
    require_tokens("value", value)
    batch, length, heads, value_dim = value.shape
    require_shape("key", key, (batch, length, None, None))
    groups, key_dim = key.shape[2:]
    require_shape("query", query, (batch, length, groups, key_dim))
    if heads % groups:
        raise ValueError(
            "The heads of `value` must be a multiple of those of `key`. "
            f"Received: value.shape={tuple(value.shape)}, key.shape={tuple(key.shape)}"
        )
    require_shape("log_decay", log_decay, (batch, length, heads))
    require_shape("beta", beta, (batch, length, heads))
    require_shape("state", state, (batch, heads, key_dim, value_dim))
    require_shape("padding_mask", padding_mask, (batch, length))
    require_shape("segment_ids", segment_ids, (batch, length))


def by_group(
    given: DeltaInputs, padding_mask: Annotated[Tensor, "B T"] | None, scale: float | None
) -> DeltaInputs:
    """Float32 inputs by group, with scaled queries, that neither decay nor write at padding."""
    batch, length, groups, key_dim = ops.shape(given.query)
    heads, value_dim = given.value.shape[2:]
    repeats = heads // groups
    query, key, value, log_decay, beta = (ops.cast(x, "float32") for x in given[:5])
    log_decay = ops.maximum(log_decay, NOTHING_LEFT)
    query = query * (key_dim**-0.5 if scale is None else float(scale))
    query, key = (ops.reshape(x, (batch, length, groups, 1, key_dim)) for x in (query, key))
    value = ops.reshape(value, (batch, length, groups, repeats, value_dim))
    log_decay, beta = (ops.reshape(x, (batch, length, groups, repeats)) for x in (log_decay, beta))
    if padding_mask is not None:
        real = padding_mask[:, :, None, None]
        log_decay = ops.where(real, log_decay, 0.0)
        beta = ops.where(real, beta, 0.0)
    return DeltaInputs(query, key, value, log_decay, beta, given.segment)


def state_by_group(
    state: Annotated[Tensor, "B H K V"] | None, inputs: DeltaInputs
) -> Annotated[Tensor, "B G R K V"]:
    """The state to start from, in float32, for inputs by group."""
    batch, _, groups, repeats, value_dim = ops.shape(inputs.value)
    shape = (batch, groups, repeats, inputs.key.shape[-1], value_dim)
    if state is None:
        return ops.zeros(shape, "float32")
    return ops.reshape(ops.cast(state, "float32"), shape)


def to_chunks(inputs: DeltaInputs, size: int) -> DeltaInputs:
    """Inputs by group -> chunks of `size` tokens."""
    batch, length = ops.shape(inputs.value)[:2]
    segment = inputs.segment
    if segment is None:
        segment = ops.zeros((batch, length), "int32")
    # What fills the last chunk neither decays nor writes, and keeps the state of the last segment.
    blocks = [to_blocks(x, size) for x in inputs[:5]]
    return DeltaInputs(*blocks)._replace(segment=to_blocks(segment, size, fill=segment[:, -1:]))


def chunk_size_for(length: int) -> int:
    """The smallest chunk size that holds `length` tokens."""
    return 1 << max(length - 1, 0).bit_length()


def by_head(chunk: Sequence[Tensor]) -> DeltaInputs:
    """One chunk `(B, C, G, R, ...)`, in the order of `DeltaInputs` -> by head."""
    *inputs, segment = chunk
    query, key, value = (ops.moveaxis(x, 1, -2) for x in inputs[:3])
    log_decay, beta = (ops.moveaxis(x, 1, -1) for x in inputs[3:])
    return DeltaInputs(query, key, value, log_decay, beta, segment)


def by_token(x: Annotated[Tensor, "B G R C ..."]) -> Annotated[Tensor, "B C G R ..."]:
    """A matrix per head -> a row per token and head."""
    return ops.moveaxis(x, -2, 1)


def gradients_by_token(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, log decay and beta by head -> by token."""
    *wide, d_log_decay, d_beta = gradients
    return *map(by_token, wide), *(ops.moveaxis(x, -1, 1) for x in (d_log_decay, d_beta))


def as_given(
    output: Annotated[Tensor, "B T G R V"],
    value: Annotated[Tensor, "B T H V"],
    padding_mask: Annotated[Tensor, "B T"] | None,
) -> Annotated[Tensor, "B T H V"]:
    """The output in the shape and dtype of `value`, 0 at padding."""
    output = ops.reshape(output, ops.shape(value))
    if padding_mask is not None:
        output = ops.where(padding_mask[:, :, None, None], output, 0.0)
    return ops.cast(output, value.dtype)
