"""The gated delta rule (Gated Delta Networks, arXiv 2412.06464).

    S_t = exp(g_t) S_{t-1} + k_t d_t^T        d_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
    o_t = scale * S_t^T q_t                   decay first, then the write, then the read

Each head keeps one matrix S `(K, V)`, in float32, whatever the dtype of the inputs.

Public: `gated_delta_rule`. The maths is in `chunked`, `chunk_parallel` and `recurrent`, a kernel in
`chunk_states_on_gpu`, the layouts in `delta_inputs`.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from qwen3_next.config.validation import OPTIONAL_NUMBER, Rule, integer, require

from ..backend.autodiff import Shards, custom_gradient, full_precision
from ..backend.platform import choose, has_pallas, platform, require_pallas
from ..backend.sharding import devices, spec
from ..checks import as_mask, exact_int32, if_given
from ..padding import from_blocks
from ..sequence import segment_index
from ..tensor_types import Tensor
from . import chunk_parallel, chunk_states_on_gpu, chunked, recurrent
from .chunked import ChunkStarts
from .delta_inputs import (
    DeltaInputs,
    as_given,
    by_group,
    check_shapes,
    chunk_size_for,
    floats_given,
    state_by_group,
    to_chunks,
)

IMPLEMENTATIONS = ("chunked", "chunk_parallel", "pallas", "recurrent")
PARALLEL = chunk_parallel.forward, chunk_parallel.backward
PASSES: dict[str, tuple[Callable[..., Any], ...]] = {
    "chunked": (chunked.forward, chunked.backward),
    "chunk_parallel": PARALLEL,
    "pallas": PARALLEL,  # with a loop of its own
}
RECURRENT_LIMIT = 4
HALF = ("bfloat16", "float16")
CHUNK = 64
CPU_CHUNK = 32
SIZE = integer(1)
CHUNK_SIZE = Rule(
    "None or a power of two",
    lambda value: value is None or (SIZE.fits(value) and not value & (value - 1)),
)


class GatedDeltaRuleOutput(NamedTuple):
    """What `gated_delta_rule` returns.

    Attributes:
        output: `(B, T, H, V)` in the dtype of `value`.
        state: `(B, H, K, V)` float32, the state after the last token.
    """

    output: Annotated[Tensor, "B T H V"]
    state: Annotated[Tensor, "B H K V"]


def gated_delta_rule(
    query: Annotated[Tensor, "B T G K"],
    key: Annotated[Tensor, "B T G K"],
    value: Annotated[Tensor, "B T H V"],
    log_decay: Annotated[Tensor, "B T H"],
    beta: Annotated[Tensor, "B T H"],
    *,
    state: Annotated[Tensor, "B H K V"] | None = None,
    padding_mask: Annotated[Tensor, "B T"] | None = None,
    segment_ids: Annotated[Tensor, "B T"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> GatedDeltaRuleOutput:
    """Runs the gated delta rule over T tokens and returns the outputs and the final state.

    Value head h reads and writes with key head `h // (H // G)`. Queries and keys are used as they
    come: normalise them first. At a padded token the state stays as it is and the output is 0. A
    new segment starts from a zero state; the first segment of a row continues `state`.

    Args:
        query, key: `(B, T, G, K)`.
        value: `(B, T, H, V)`, H a multiple of G.
        log_decay: `(B, T, H)`, `g <= 0`; minus infinity leaves nothing of the state.
        beta: `(B, T, H)`, write strength, usually in [0, 1].
        state: `(B, H, K, V)` float32 or `None` for zeros.
        padding_mask: `(B, T)` bool, true at real tokens, anywhere in the row; or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`.
        scale: factor on the query. Defaults to `K ** -0.5`.
        chunk_size: tokens per chunk, a power of two. Defaults to 32 on a CPU, whose cost is the
            matrices of a chunk, and to 64 elsewhere.
        implementation: `"chunked"` (matrix products over chunks, one after the other),
            `"chunk_parallel"` (all chunks at once, but for the state), `"pallas"` (the same with
            the state in one kernel, for JAX on a GPU, which rounds factors of its products to 10
            bits of mantissa where the value, and so the output, is in half precision;
            interpreted, which is slow, on a CPU),
            `"recurrent"` (token by token, a static and small T without segments), or `None`:
            recurrent up to 4 tokens; beyond them chunked on a CPU, the kernel for JAX on a GPU,
            and parallel elsewhere.

    Returns:
        `GatedDeltaRuleOutput(output, state)`.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit together, a scale that is no number, rows
            without tokens, a chunk size that is no power of two, or an implementation that is
            unknown or not for this backend.
    """
    given, state = floats_given(DeltaInputs(query, key, value, log_decay, beta), state)
    query, key, value = given[:3]
    segment_ids = if_given(exact_int32, "segment_ids", segment_ids)
    padding_mask = as_mask(padding_mask)
    check_shapes(given._replace(segment=segment_ids), state, padding_mask)
    require(OPTIONAL_NUMBER, "scale", scale)
    require(CHUNK_SIZE, "chunk_size", chunk_size)
    if chunk_size is None:
        chunk_size = CPU_CHUNK if platform() == "cpu" else CHUNK
    implementation = _choose(implementation, value, segment_ids)
    if segment_ids is not None:
        given = given._replace(segment=segment_index(segment_ids, padding_mask))
    inputs = by_group(given, padding_mask, scale)
    start = state_by_group(state, inputs)
    if implementation == "recurrent":
        with full_precision():
            output, final = recurrent.run(inputs, start)
    else:
        length = ops.shape(value)[1]
        if isinstance(length, int):
            chunk_size = min(chunk_size, chunk_size_for(length))
        chunks = to_chunks(inputs, chunk_size)
        shards = _shards(value.shape[0], key.shape[2])
        # Queries and keys are often normalised in float32: how exact an output can be is for the
        # value, whose dtype it has.
        half = keras.backend.standardize_dtype(value.dtype) in HALF
        exact = implementation != "pallas" or not half
        output, final = _differentiable(implementation, shards, exact)(*chunks, start)
        output = from_blocks(output, length)
    batch, _, heads, value_dim = ops.shape(value)
    final = ops.reshape(final, (batch, heads, key.shape[3], value_dim))
    return GatedDeltaRuleOutput(as_given(output, value, padding_mask), final)


def _choose(implementation: str | None, value: Tensor, segment_ids: Tensor | None) -> str:
    length = ops.shape(value)[1]
    can_be_recurrent = isinstance(length, int) and segment_ids is None
    if can_be_recurrent and length <= RECURRENT_LIMIT:
        default = "recurrent"
    elif platform() == "cpu":
        default = "chunked"
    else:
        known = all(isinstance(size, int) for size in ops.shape(value)[:2])
        kernel = known and platform() == "gpu" and has_pallas()
        default = "pallas" if kernel else "chunk_parallel"
    implementation = choose(implementation, IMPLEMENTATIONS, default)
    if implementation == "pallas":
        require_pallas(implementation)
    if implementation == "recurrent" and not can_be_recurrent:
        raise ValueError(
            "implementation='recurrent' takes a static number of tokens and no segments. "
            f"Received: value.shape={tuple(value.shape)}, segment_ids={segment_ids}"
        )
    return implementation


def _shards(batch: int, groups: int) -> Shards | None:
    """Rows and key heads are spread: a device needs nothing of the others."""
    found = devices()
    if found is None:
        return None
    rows, heads = found.rows(batch), found.heads(groups)
    by_head, by_row = spec((), rows, (), heads), spec((), rows)
    state, states = spec(rows, heads), spec((), rows, heads)
    gradients = (by_head,) * 5
    return Shards(
        found.mesh,
        inputs=(*gradients, by_row, state),
        outputs=(by_head, state),
        residuals=(DeltaInputs(*gradients, by_row), ChunkStarts(states, by_row)),
        gradients=(*gradients, None, state),
    )


@functools.cache
def _differentiable(implementation: str, shards: Shards | None, exact: bool) -> Callable[..., Any]:
    """`f(*chunks, state) -> outputs (N, B, C, G, R, V), final state (B, G, R, K, V)`.

    `exact` says whether products keep all of a float32: the kernel needs not, for an output in
    half precision.
    """
    passes = PASSES[implementation]
    if implementation == "pallas":
        products = chunk_states_on_gpu.FULL if exact else chunk_states_on_gpu.HALF
        loop = functools.partial(chunk_states_on_gpu.over_chunks, products=products)
        passes = tuple(functools.partial(f, loop=loop) for f in passes)
    run_forward, run_backward = passes

    def forward(*inputs):
        chunks, state = DeltaInputs(*inputs[:-1]), inputs[-1]
        with full_precision():
            output, final, starts = run_forward(chunks, state)
        return (output, final), (chunks, starts)

    def backward(residuals, d_output, d_final):
        chunks, starts = residuals
        with full_precision():
            gradients, d_state = run_backward(chunks, starts, d_output, d_final)
        return (*gradients, None, d_state)

    return custom_gradient(forward, backward, shards=shards)
