"""What a student's next-token distribution lacks of a teacher's, over large vocabularies.

    loss_n = t^2 KL(p_n || q_n) = t^2 sum_v p_nv (log p_nv - log q_nv)
    q = softmax(hidden @ kernel / t)        p = the teacher's at the same temperature t

    d loss / d logits = t (q - p)

As `linear_cross_entropy`, neither op holds the logits of more than one chunk of rows, of the
student or of the teacher, forward or backward: the backward pass recomputes a chunk's logits. The
factor t^2 keeps the size of the gradient the same at every temperature. The teacher has none.

    linear_kl_divergence         from the teacher's hidden states and its head's kernel
    linear_top_kl_divergence     from its n largest log-probabilities
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any

from keras import ops

from ..backend.autodiff import custom_gradient
from ..backend.loops import scan
from ..checks import require_shape, to_int32
from ..cross_entropy.api import CHUNK_LOGITS
from ..padding import pad_to_multiple
from ..tensor_types import Tensor

NOWHERE = -1e30  # a logit without probability


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
        ValueError: shapes that do not fit together, or a temperature that is not above 0.

    Reference: Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
    """
    require_shape("teacher_hidden", teacher_hidden, (hidden.shape[0], None))
    require_shape("teacher_kernel", teacher_kernel, (teacher_hidden.shape[1], kernel.shape[-1]))
    teacher_kernel = ops.cast(teacher_kernel, teacher_hidden.dtype)
    teacher = _LINEAR, (teacher_hidden,), (teacher_kernel,)
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
        `(N,)` float32, 0 at rows that do not count, whatever they hold.

    Raises:
        ValueError: shapes that do not fit together, or a temperature that is not above 0.
    """
    require_shape("teacher_ids", teacher_ids, (hidden.shape[0], None))
    require_shape("teacher_log_probs", teacher_log_probs, tuple(teacher_ids.shape))
    log_probs = ops.cast(teacher_log_probs, "float32")
    teacher = _TOP, (to_int32(teacher_ids), log_probs), ()
    return _by_chunk(hidden, kernel, teacher, temperature, mask, chunk_rows)


def _by_chunk(hidden, kernel, teacher, temperature, mask, chunk_rows):
    require_shape("hidden", hidden, (None, None))
    require_shape("kernel", kernel, (hidden.shape[1], None))
    require_shape("mask", mask, (hidden.shape[0],))
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be above 0. Received: {temperature=}")
    count = ops.shape(hidden)[0]
    if chunk_rows is None:
        chunk_rows = max(16, CHUNK_LOGITS // kernel.shape[1])
    if isinstance(count, int):
        chunk_rows = max(1, min(chunk_rows, count))
    kind, by_row, shared = teacher
    mask = ops.ones_like(hidden[:, 0], "bool") if mask is None else ops.cast(mask, "bool")

    def chunked(x):
        x = pad_to_multiple(x, chunk_rows)
        return ops.reshape(x, (-1, chunk_rows, *x.shape[1:]))

    kernel = ops.cast(kernel, hidden.dtype)
    rows = [chunked(x) for x in (hidden, mask, *by_row)]
    function = _differentiable(kind, len(by_row), float(temperature))
    losses = function(kernel, *shared, *rows)
    return ops.reshape(losses, (-1,))[:count]


@functools.cache
def _differentiable(
    kind: tuple[Callable[..., Tensor], Callable[..., Tensor]], num_by_row: int, temperature: float
) -> Callable[..., Any]:
    divergence, probabilities = kind

    def split(inputs):
        kernel, *shared = inputs[: -(num_by_row + 2)]
        return kernel, shared, inputs[-(num_by_row + 2) :]

    def scaled(rows, kernel):
        return ops.cast(rows @ kernel, "float32") / temperature  # (R, V)

    def zeros_at_others(real, xs):
        """A product with 0 would keep what is not finite."""
        return [ops.where(real[:, None], x, ops.zeros_like(x)) for x in xs]

    def teacher_of(others, shared):
        """What the teacher gives of a chunk; its hidden states as logits."""
        return [scaled(*others, *shared)] if shared else others

    def forward(*inputs):
        kernel, shared, xs = split(inputs)

        def step(carry, xs):
            rows, real, *others = xs
            rows, *others = zeros_at_others(real, (rows, *others))
            found = divergence(scaled(rows, kernel), *teacher_of(others, shared))
            return carry, (ops.where(real, temperature**2 * found, 0.0),)

        into = (ops.zeros_like(xs[1], "float32"),)
        _, (losses,) = scan(step, (), tuple(xs), into)
        return losses, inputs

    def backward(inputs, d_losses):
        kernel, shared, xs = split(inputs)

        def step(carry, xs):
            (d_kernel,) = carry
            d_loss, rows, real, *others = xs
            rows, *others = zeros_at_others(real, (rows, *others))
            logits = scaled(rows, kernel)
            missing = ops.softmax(logits) - probabilities(logits, *teacher_of(others, shared))
            d_loss = ops.where(real, d_loss, 0.0)[:, None]
            d_logits = ops.cast(temperature * d_loss * missing, kernel.dtype)
            d_rows = d_logits @ ops.transpose(kernel)
            d_kernel = d_kernel + ops.cast(ops.transpose(rows) @ d_logits, "float32")
            return (d_kernel,), (d_rows,)

        carry = (ops.zeros(kernel.shape, "float32"),)
        (d_kernel,), (d_hidden,) = scan(step, carry, (d_losses, *xs), (ops.zeros_like(xs[0]),))
        nothing = [None] * (len(xs) - 1)
        return ops.cast(d_kernel, kernel.dtype), *([None] * len(shared)), d_hidden, *nothing

    return custom_gradient(forward, backward)


def _divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    logs, teacher_logs = ops.log_softmax(logits), ops.log_softmax(teacher_logits)
    return ops.sum(ops.exp(teacher_logs) * (teacher_logs - logs), axis=-1)


def _probabilities(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    del logits
    return ops.softmax(teacher_logits)


def _top_divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    total = ops.logsumexp(logits, axis=-1)
    logs = ops.take_along_axis(logits, ids, axis=-1) - total[:, None]  # (R, n)
    found = ops.sum(ops.exp(log_probs) * (log_probs - logs), axis=-1)
    if ids.shape[1] == logits.shape[1]:
        return found
    rest = _rest(log_probs)
    log_rest = ops.logsumexp(_written(logits, ids, NOWHERE), axis=-1) - total
    return found + rest * (ops.log(ops.maximum(rest, 1e-30)) - log_rest)


def _top_probabilities(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """The teacher's, with the rest shared as the student shares its own."""
    if ids.shape[1] == logits.shape[1]:
        others = ops.zeros_like(logits)
    else:
        others = _rest(log_probs)[:, None] * ops.softmax(_written(logits, ids, NOWHERE))
    return _written(others, ids, ops.exp(log_probs))


def _rest(log_probs):
    return ops.maximum(1.0 - ops.sum(ops.exp(log_probs), axis=-1), 0.0)


def _written(x, ids, values):
    """`x` `(R, V)` with `values`, a number or `(R, n)`, at `ids` `(R, n)` of each row."""
    rows, count = ids.shape
    places = ops.stack([ops.repeat(ops.arange(rows, dtype="int32"), count), ops.ravel(ids)], axis=1)
    values = ops.broadcast_to(ops.cast(values, x.dtype), (rows, count))
    return ops.scatter_update(x, places, ops.ravel(values))


_LINEAR = _divergence, _probabilities
_TOP = _top_divergence, _top_probabilities
