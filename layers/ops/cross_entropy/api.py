"""Cross-entropy over large vocabularies.

    loss_n = logsumexp_v(z_nv) - z_n,label(n)        z = hidden @ kernel

`linear_cross_entropy` never holds the logits of more than one chunk of rows, forward or backward;
the backward pass recomputes a chunk's logits and turns them into gradients at once, keeping only
the hidden states and the kernel from the forward pass.

    cross_entropy            loss of every row from its logits
    linear_cross_entropy     the same from hidden states and the head's kernel
    correct                  where the largest logit is the label's
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any

from keras import ops

from ..backend.autodiff import custom_gradient
from ..backend.loops import scan
from ..checks import require_shape, to_int32
from ..padding import pad_to_multiple
from ..tensor_types import Tensor

IGNORE = -100  # the label that has no loss
CHUNK_LOGITS = 1 << 24  # 64 MiB of float32


def cross_entropy(
    logits: Annotated[Tensor, "... V"], labels: Annotated[Tensor, "..."]
) -> Annotated[Tensor, "..."]:
    """Loss of every row from its logits.

    Args:
        logits: `(..., V)`, any float dtype; the loss is computed in float32.
        labels: `(...)` integers; `IGNORE` (-100) is ignored.

    Returns:
        `(...)` float32, 0 at ignored labels, NaN at any other label that is no class: a program
        cannot refuse a value, and a finite number would hide it.
    """
    logits = ops.cast(logits, "float32")
    labels = to_int32(labels)
    losses = ops.logsumexp(logits, axis=-1) - _logit_of(logits, labels)
    is_class = (labels >= 0) & (labels < logits.shape[-1])
    return ops.where(labels == IGNORE, 0.0, ops.where(is_class, losses, float("nan")))


def linear_cross_entropy(
    hidden: Annotated[Tensor, "N D"],
    kernel: Annotated[Tensor, "D V"],
    labels: Annotated[Tensor, "N"],
    *,
    chunk_rows: int | None = None,
    return_correct: bool = False,
) -> Any:
    """Loss of every row from its hidden state and the kernel of the language-model head.

    Args:
        hidden: `(N, D)`.
        kernel: `(D, V)`.
        labels: `(N,)` integers; `IGNORE` (-100) is ignored.
        chunk_rows: rows whose logits are held at a time. Defaults to what 64 MiB hold.
        return_correct: whether to say as well where the largest logit is the label's.

    Returns:
        `(N,)` float32, 0 at ignored labels; with `return_correct` two of them, the second one
        1 where the label was predicted.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require_shape("hidden", hidden, (None, None))
    require_shape("kernel", kernel, (hidden.shape[1], None))
    require_shape("labels", labels, (hidden.shape[0],))
    count = ops.shape(hidden)[0]
    if chunk_rows is None:
        chunk_rows = max(16, CHUNK_LOGITS // kernel.shape[1])
    if isinstance(count, int):
        chunk_rows = max(1, min(chunk_rows, count))
    hidden = pad_to_multiple(hidden, chunk_rows)
    labels = pad_to_multiple(to_int32(labels), chunk_rows, fill=IGNORE)
    hidden = ops.reshape(hidden, (-1, chunk_rows, hidden.shape[1]))
    labels = ops.reshape(labels, (-1, chunk_rows))
    kernel = ops.cast(kernel, hidden.dtype)
    results = _differentiable(return_correct)(hidden, kernel, labels)
    if return_correct:
        return tuple(ops.reshape(x, (-1,))[:count] for x in results)
    return ops.reshape(results, (-1,))[:count]


@functools.cache
def _differentiable(return_correct: bool) -> Callable[..., Any]:
    def forward(hidden, kernel, labels):
        def step(carry, xs):
            rows, label = xs
            logits = rows @ kernel
            results: tuple[Tensor, ...] = (cross_entropy(logits, label),)
            if return_correct:
                results += (correct(logits, label),)
            return carry, results

        into = (ops.zeros_like(labels, "float32"),) * (1 + return_correct)
        _, results = scan(step, (), (hidden, labels), into)
        return results if return_correct else results[0], (hidden, kernel, labels)

    def backward(residuals, d_losses, d_correct=None):
        del d_correct  # whole numbers: nothing to differentiate
        hidden, kernel, labels = residuals

        def step(carry, xs):
            (d_kernel,) = carry
            rows, label, d_loss = xs
            d_loss = ops.where(label == IGNORE, 0.0, d_loss)[:, None]
            logits = ops.cast(rows @ kernel, "float32")
            target = ops.arange(kernel.shape[1], dtype="int32") == label[:, None]
            d_logits = d_loss * (ops.softmax(logits) - ops.cast(target, "float32"))
            d_logits = ops.cast(d_logits, kernel.dtype)
            d_rows = d_logits @ ops.transpose(kernel)
            d_kernel = d_kernel + ops.cast(ops.transpose(rows) @ d_logits, "float32")
            return (d_kernel,), (d_rows,)

        carry = (ops.zeros(kernel.shape, "float32"),)
        xs = (hidden, labels, d_losses)
        (d_kernel,), (d_hidden,) = scan(step, carry, xs, (ops.zeros_like(hidden),))
        return d_hidden, ops.cast(d_kernel, kernel.dtype), None

    return custom_gradient(forward, backward)


def correct(
    logits: Annotated[Tensor, "... V"], labels: Annotated[Tensor, "..."]
) -> Annotated[Tensor, "..."]:
    """`(...)` float32, 1 where the largest of the logits `(..., V)` is the label's."""
    return ops.cast(ops.cast(ops.argmax(logits, axis=-1), "int32") == labels, "float32")


def _logit_of(logits: Tensor, labels: Tensor) -> Tensor:
    index = ops.expand_dims(ops.clip(labels, 0, logits.shape[-1] - 1), -1)
    return ops.take_along_axis(logits, index, axis=-1)[..., 0]
