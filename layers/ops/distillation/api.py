"""What a student's next-token distribution lacks of a teacher's, over large vocabularies.

    loss_n = t^2 KL(p_n || q_n) = t^2 sum_v p_nv (log p_nv - log q_nv)
    q = softmax(hidden @ kernel / t)        p = the teacher's at the same temperature t

    d loss / d logits = t (q - p)

As `linear_cross_entropy`, neither op holds the logits of more than one chunk of rows, of the
student or of the teacher, forward or backward: the backward pass recomputes a chunk's logits. The
factor t^2 keeps the size of the gradient the same at every temperature. The teacher has none.

    linear_kl_divergence         from the teacher's hidden states and its head's kernel
    linear_top_kl_divergence     from its n largest log-probabilities
    linear_top_log_probs         these, from hidden states and the head's kernel
"""

from typing import Annotated

import numpy as np
from keras import ops

from qwen3_next.config.validation import integer, number, require

from ..backend.loops import scan
from ..checks import as_floats, as_mask, require_shape, to_integers
from ..cross_entropy.api import CHUNK_LOGITS, CHUNK_ROWS, head_inputs
from ..padding import to_chunks_of_rows
from ..tensor_types import Tensor
from .divergences import LINEAR, TOP, differentiable

FLOAT32 = np.finfo("float32")
# Its square is a factor of the loss.
TEMPERATURE = number(
    "above 0, with a square that float32 holds",
    lambda value: value > 0 and float(FLOAT32.tiny) <= float(value) ** 2 <= float(FLOAT32.max),
)
CHUNK_OF_UNKNOWN = 512  # rows of a chunk at most where their number is not known in advance


def linear_kl_divergence(
    hidden: Annotated[Tensor, "N D"],
    kernel: Annotated[Tensor, "D V"],
    teacher_hidden: Annotated[Tensor, "N E"],
    teacher_kernel: Annotated[Tensor, "E V"],
    temperature: float = 1.0,
    mask: Annotated[Tensor, "N"] | None = None,
    *,
    chunk_rows: int | None = None,
) -> Annotated[Tensor, "N"]:
    """`t^2 KL(teacher || student)` of every row, from hidden states and the kernels of both heads.

    Args:
        hidden: `(N, D)`, the student's.
        kernel: `(D, V)`.
        teacher_hidden: `(N, E)`, any width and float dtype. It gets no gradient.
        teacher_kernel: `(E, V)`. It gets no gradient.
        temperature: t, by which the logits of both are divided; above 0.
        mask: `(N,)` bool, true at rows that count, or `None` for all.
        chunk_rows: rows whose logits are held at a time. Defaults to what 64 MiB hold.

    Returns:
        `(N,)` float32, 0 at rows that do not count, whatever they hold.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit together, or a temperature or `chunk_rows` out
            of range.

    Reference: Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
    """
    hidden, kernel = head_inputs(hidden, kernel)
    teacher_hidden, teacher_kernel = head_inputs(teacher_hidden, teacher_kernel, of="teacher_")
    require_shape("teacher_hidden", teacher_hidden, (hidden.shape[0], None))
    require_shape("teacher_kernel", teacher_kernel, (None, kernel.shape[1]))
    teacher_kernel = ops.cast(teacher_kernel, teacher_hidden.dtype)
    teacher = LINEAR, (teacher_hidden,), (teacher_kernel,)
    return _by_chunk(hidden, kernel, teacher, temperature, mask, chunk_rows)


def linear_top_kl_divergence(
    hidden: Annotated[Tensor, "N D"],
    kernel: Annotated[Tensor, "D V"],
    teacher_ids: Annotated[Tensor, "N n"],
    teacher_log_probs: Annotated[Tensor, "N n"],
    temperature: float = 1.0,
    mask: Annotated[Tensor, "N"] | None = None,
    *,
    chunk_rows: int | None = None,
) -> Annotated[Tensor, "N"]:
    """`t^2 KL(teacher || student)` of every row, from the teacher's n largest log-probabilities.

    All other tokens are one event, whose probability is what the n leave:

        KL = sum_top p (log p - log q) + P (log P - log Q),   P = 1 - sum_top p,   Q = 1 - sum_top q

    That is never more than the divergence over the whole vocabulary, and with n = V the same.
    How the student shares Q among the other tokens is left to it.

    Args:
        hidden: `(N, D)`, the student's.
        kernel: `(D, V)`.
        teacher_ids: `(N, n)` integers, tokens of the teacher, distinct within a row.
        teacher_log_probs: `(N, n)`, `log softmax(teacher logits / t)` over the vocabulary at these
            tokens. They belong to one temperature: those of another do not follow from them.
        temperature: t, by which the logits of both are divided; above 0.
        mask: `(N,)` bool, true at rows that count, or `None` for all.
        chunk_rows: rows whose logits are held at a time. Defaults to what 64 MiB hold.

    Returns:
        `(N,)` float32, 0 at rows that do not count, whatever they hold; NaN at others with an id
        that is no token, as a program cannot refuse a value.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit together, or a temperature or `chunk_rows` out
            of range.
    """
    hidden, kernel = head_inputs(hidden, kernel)
    teacher_ids = to_integers("teacher_ids", teacher_ids)
    teacher_log_probs = as_floats("teacher_log_probs", teacher_log_probs)
    require_shape("teacher_ids", teacher_ids, (hidden.shape[0], None))
    require_shape("teacher_log_probs", teacher_log_probs, tuple(teacher_ids.shape))
    known = (teacher_ids >= 0) & (teacher_ids < kernel.shape[-1])
    log_probs = ops.where(known, ops.cast(teacher_log_probs, "float32"), float("nan"))
    teacher = TOP, (ops.where(known, teacher_ids, 0), log_probs), ()
    return _by_chunk(hidden, kernel, teacher, temperature, mask, chunk_rows)


def linear_top_log_probs(
    hidden: Annotated[Tensor, "N D"],
    kernel: Annotated[Tensor, "D V"],
    count: int,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
) -> tuple[Annotated[Tensor, "N n"], Annotated[Tensor, "N n"]]:
    """The `count` largest of `log softmax(hidden @ kernel / t)` of every row, not differentiated.

    Args:
        hidden: `(N, D)`.
        kernel: `(D, V)`.
        count: n, 1 to V.
        temperature: t, above 0.
        chunk_rows: rows whose logits are held at a time. Defaults to what 64 MiB hold.

    Returns:
        Token ids `(N, n)` int32 and log-probabilities `(N, n)` float32, the largest first.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit together, or a count, a temperature or
            `chunk_rows` out of range.
    """
    hidden, kernel = head_inputs(hidden, kernel)
    _check_options(temperature, chunk_rows)
    require(integer(1, kernel.shape[1]), "count", count)
    rows, (xs,) = _chunks(kernel, chunk_rows, (hidden,))
    kernel = ops.cast(kernel, hidden.dtype)

    def step(carry, xs):
        logits = ops.cast(xs[0] @ kernel, "float32") / float(temperature)  # (R, V)
        values, ids = ops.top_k(logits, count)
        return carry, (ops.cast(ids, "int32"), values - ops.logsumexp(logits, -1, keepdims=True))

    into = tuple(
        ops.repeat(ops.zeros_like(xs[..., :1], dtype), count, axis=-1)
        for dtype in ("int32", "float32")
    )
    _, found = scan(step, (), (xs,), into)
    ids, log_probs = (ops.reshape(x, (-1, count))[:rows] for x in found)
    return ids, log_probs


def _by_chunk(hidden, kernel, teacher, temperature, mask, chunk_rows):
    _check_options(temperature, chunk_rows)
    mask = as_mask(mask, "mask")
    require_shape("mask", mask, (hidden.shape[0],))
    kind, by_row, shared = teacher
    if mask is None:
        mask = ops.ones_like(hidden[:, 0], "bool")
    count, rows = _chunks(kernel, chunk_rows, (hidden, mask, *by_row))
    function = differentiable(kind, len(by_row), float(temperature))
    losses = function(ops.cast(kernel, hidden.dtype), *shared, *rows)
    return ops.reshape(losses, (-1,))[:count]


def _check_options(temperature, chunk_rows):
    require(TEMPERATURE, "temperature", temperature)
    require(CHUNK_ROWS, "chunk_rows", chunk_rows)


def _chunks(kernel, chunk_rows, xs):
    """The number of rows, and tensors `(N, ...)` as `(chunks, rows of a chunk, ...)`."""
    count = ops.shape(xs[0])[0]
    if chunk_rows is None:
        chunk_rows = max(16, CHUNK_LOGITS // kernel.shape[1])
        if not isinstance(count, int):  # may be few, and are filled up to a chunk
            chunk_rows = min(chunk_rows, CHUNK_OF_UNKNOWN)
    if isinstance(count, int):
        chunk_rows = max(1, min(chunk_rows, count))
    return count, [to_chunks_of_rows(x, chunk_rows) for x in xs]
