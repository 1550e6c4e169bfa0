"""Cross-entropy over large vocabularies.

    loss_n = logsumexp_v(z_nv) - z_n,label(n)        z = hidden @ kernel

`linear_cross_entropy` keeps the logits of its forward pass for its backward pass where they are
few, and never holds more of them than those of one chunk where they are many. Forward a chunk is
some rows with all words. Backward it is all rows with some words: with the log-sum-exp of every
row, kept from the forward pass, no word needs another, and the gradient of the kernel, as large as
the kernel, is written once and not added to for every chunk.

    cross_entropy            loss of every row from its logits
    linear_cross_entropy     the same from hidden states and the head's kernel
    correct                  where the largest logit is the label's
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from keras import ops

from qwen3_next.config.validation import BOOLEAN, Rule, optional_integer, require

from ..backend.autodiff import Shards, custom_gradient
from ..backend.loops import get_rows, scan, set_rows
from ..backend.sharding import all_sum, devices, gather, spec, sum_rows
from ..checks import as_floats, require_shape, require_words, to_integers
from ..padding import to_chunks_of_rows
from ..tensor_types import Tensor
from .spread_words import Words, argmax, log_sum_exp, logit_of

IGNORE = -100  # the label that has no loss
CHUNK_LOGITS = 1 << 24  # 64 MiB of float32
KEPT_LOGITS = 1 << 27  # 512 MiB of float32
UNKNOWN_ROWS = 4096  # how many there may be where only the run tells
WORDS_OF_VECTORS = 128
CHUNK_ROWS = optional_integer(1)
KEEP_LOGITS = Rule("None or a bool", lambda value: value is None or BOOLEAN.fits(value))


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

    Raises:
        TypeError: what is no array of numbers.
        ValueError: logits that are no floats, labels that are no integers, or not one per row.
    """
    logits, labels = as_floats("logits", logits), to_integers("labels", labels)
    require_shape("labels", labels, logits.shape[:-1])
    require_words("logits", logits)
    return _losses(logits, labels, Words())[0]


def _losses(logits: Tensor, labels: Tensor, how: Words) -> tuple[Tensor, Tensor]:
    """Losses and the log-sum-exp of every row."""
    logits = ops.cast(logits, "float32")
    lse = log_sum_exp(logits, how)
    losses = lse - logit_of(logits, labels, how)
    is_class = (labels >= 0) & (labels < how.count(logits.shape[-1]))
    losses = ops.where(labels == IGNORE, 0.0, ops.where(is_class, losses, float("nan")))
    return losses, lse


def linear_cross_entropy(
    hidden: Annotated[Tensor, "N D"],
    kernel: Annotated[Tensor, "D V"],
    labels: Annotated[Tensor, "N"],
    *,
    chunk_rows: int | None = None,
    keep_logits: bool | None = None,
    return_correct: bool = False,
) -> Any:
    """Loss of every row from its hidden state and the kernel of the language-model head.

    Args:
        hidden: `(N, D)`.
        kernel: `(D, V)`.
        labels: `(N,)` integers; `IGNORE` (-100) is ignored.
        chunk_rows: rows whose logits are held at a time; backward as many logits, of all rows.
            Defaults to what 64 MiB hold.
        keep_logits: whether the backward pass finds all logits kept instead of computing them once
            more. By default where N is known and those of a device fit in 512 MiB (float32), unless
            `chunk_rows` says how many to hold.
        return_correct: whether to say as well where the largest logit is the label's.

    Returns:
        `(N,)` float32, 0 at ignored labels; with `return_correct` two of them, the second one
        1 where the label was predicted.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: shapes or dtypes that do not fit together, or an option out of range.
    """
    require(CHUNK_ROWS, "chunk_rows", chunk_rows)
    require(KEEP_LOGITS, "keep_logits", keep_logits)
    require(BOOLEAN, "return_correct", return_correct)
    hidden, kernel = head_inputs(hidden, kernel)
    labels = to_integers("labels", labels)
    require_shape("labels", labels, (hidden.shape[0],))
    found = devices()
    how = Words()
    if found is not None:
        rows, words = found.rows(hidden.shape[0]), found.heads(kernel.shape[1])
        how = Words(found, rows, words, found.columns(kernel.shape[0], words, rows))
    if keep_logits is None:
        keep_logits = chunk_rows is None and _few_logits(hidden.shape[0], kernel.shape[1], how)
    if chunk_rows is None:
        chunk_rows = max(16, CHUNK_LOGITS // kernel.shape[1])
    kernel = ops.cast(kernel, hidden.dtype)
    plan = Plan(chunk_rows, keep_logits, return_correct, how)
    return _differentiable(plan)(hidden, kernel, labels)


def head_inputs(
    hidden: Any, kernel: Any, of: str = ""
) -> tuple[Annotated[Tensor, "N D"], Annotated[Tensor, "D V"]]:
    """Hidden states and the kernel of a head, checked; `of` is what their names begin with."""
    names = f"{of}hidden", f"{of}kernel"
    hidden, kernel = as_floats(names[0], hidden), as_floats(names[1], kernel)
    require_shape(names[0], hidden, (None, None))
    require_shape(names[1], kernel, (hidden.shape[1], None))
    require_words(names[1], kernel)
    return hidden, kernel


class Plan(NamedTuple):
    """How a loss is computed.

    Attributes:
        chunk_rows: Rows whose logits are held at a time.
        keeps: Whether all logits are, for the backward pass.
        return_correct: Whether the result says where the label was predicted.
        words: How rows and words are spread over devices.
    """

    chunk_rows: int
    keeps: bool
    return_correct: bool
    words: Words


def _few_logits(rows: int | None, words: int, how: Words) -> bool:
    """Whether the logits of a device are few enough to keep."""
    if rows is None:
        return False
    parts = 1 if how.devices is None else how.devices.size((*how.rows, *how.words))
    return rows * words <= KEPT_LOGITS * parts


@functools.cache
def _differentiable(plan: Plan) -> Callable[..., Any]:
    forward, backward, primal = (functools.partial(f, plan) for f in (_forward, _backward, _primal))
    return custom_gradient(forward, backward, primal if plan.keeps else None, _shards(plan))


def _forward(plan: Plan, hidden: Tensor, own: Tensor, labels: Tensor) -> tuple[Any, Any]:
    kernel = gather(own, plan.words.columns)
    kept = [hidden @ kernel] if plan.keeps else []
    if kept:
        losses, lse, *hits = _results(plan, kept[0], labels)
    else:
        losses, lse, *hits = _by_rows(plan, hidden, kernel, labels)
    return (losses, *hits) if hits else losses, (hidden, own, labels, lse, *kept)


def _primal(plan: Plan, hidden: Tensor, own: Tensor, labels: Tensor) -> Any:
    losses, _, *hits = _by_rows(plan, hidden, gather(own, plan.words.columns), labels)
    return (losses, *hits) if hits else losses


def _results(plan: Plan, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Losses, the log-sum-exp of every row and, if wanted, where the label was predicted."""
    found = _losses(logits, labels, plan.words)
    return (*found, _correct(logits, labels, plan.words)) if plan.return_correct else found


def _by_rows(plan: Plan, hidden: Tensor, kernel: Tensor, labels: Tensor) -> list[Tensor]:
    """The results from the logits of some rows at a time."""

    def step(carry, xs):
        rows, label = xs
        return carry, _results(plan, rows @ kernel, label)

    xs = _chunks(plan.chunk_rows, hidden, labels)
    into = (ops.zeros_like(xs[1], "float32"),) * (2 + plan.return_correct)
    _, results = scan(step, (), xs, into)
    count = ops.shape(hidden)[0]
    return [ops.reshape(x, (-1,))[:count] for x in results]


def _backward(plan: Plan, residuals: Any, d_losses: Tensor, d_correct: Any = None) -> Any:
    del d_correct  # whole numbers: nothing to differentiate
    hidden, own, labels, lse, *kept = residuals
    how = plan.words
    kernel = gather(own, how.columns)
    d_losses = ops.where(labels == IGNORE, 0.0, d_losses)

    def d_logits(logits, words):
        hits = ops.cast(words + how.first(kernel.shape[1]) == labels[:, None], "float32")
        chances = ops.exp(ops.cast(logits, "float32") - lse[:, None])
        return ops.cast(d_losses[:, None] * (chances - hits), kernel.dtype)

    if kept:
        slopes = d_logits(kept[0], ops.arange(kernel.shape[1], dtype="int32"))
        d_hidden, d_kernel = slopes @ ops.transpose(kernel), ops.transpose(hidden) @ slopes
    else:
        d_hidden, d_kernel = _by_words(plan, hidden, kernel, d_logits)
    d_kernel = sum_rows(d_kernel, how.rows, how.columns, 0)
    return all_sum(d_hidden, how.words), d_kernel, None


def _by_words(
    plan: Plan, hidden: Tensor, kernel: Tensor, d_logits: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of both from the logits of some words at a time."""
    count = kernel.shape[1]
    size = _chunk_words(plan.chunk_rows, count, hidden.shape[0])

    def step(i, carry):
        d_hidden, d_kernel = carry
        start = ops.minimum(i * size, count - size)
        columns = get_rows(kernel, start, size, axis=1)
        words = start + ops.arange(size, dtype="int32")
        slopes = d_logits(hidden @ columns, words)
        d_kernel = set_rows(d_kernel, start, ops.transpose(hidden) @ slopes, axis=1)
        # Where words are left over, the last chunk begins among those of the one before.
        slopes = ops.where(words >= i * size, slopes, ops.zeros_like(slopes))
        return d_hidden + ops.cast(slopes @ ops.transpose(columns), "float32"), d_kernel

    carry = ops.zeros_like(hidden, "float32"), ops.zeros_like(kernel)
    d_hidden, d_kernel = ops.fori_loop(0, -(-count // size), step, carry)
    return ops.cast(d_hidden, hidden.dtype), d_kernel


def _shards(plan: Plan) -> Shards | None:
    how = plan.words
    if how.devices is None:
        return None
    rows, kernel = spec(how.rows), spec(how.columns, how.words)
    outputs = (rows, rows) if plan.return_correct else rows
    inputs = rows, kernel, rows
    kept = (spec(how.rows, how.words),) if plan.keeps else ()
    return Shards(how.devices.mesh, inputs, outputs, (*inputs, rows, *kept), (rows, kernel, None))


def _chunk_words(chunk_rows: int, words: int, rows: int | None) -> int:
    """Words with which all rows have as many logits as `chunk_rows` rows have with all words."""
    rows = UNKNOWN_ROWS if rows is None else max(rows, 1)
    size = max(1, chunk_rows * words // rows)
    if size > WORDS_OF_VECTORS:
        size -= size % WORDS_OF_VECTORS
    return min(size, words)


def _chunks(chunk_rows: int, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and labels as `(chunks, rows of a chunk, ...)`, what fills them without a loss."""
    count = ops.shape(hidden)[0]
    if isinstance(count, int):
        chunk_rows = max(1, min(chunk_rows, count))
    chunks = to_chunks_of_rows(hidden, chunk_rows)
    return chunks, to_chunks_of_rows(labels, chunk_rows, fill=IGNORE)


def correct(
    logits: Annotated[Tensor, "... V"], labels: Annotated[Tensor, "..."]
) -> Annotated[Tensor, "..."]:
    """`(...)` float32, 1 where the largest of the logits `(..., V)` is the label's."""
    return _correct(logits, labels, Words())


def _correct(logits: Tensor, labels: Tensor, how: Words) -> Tensor:
    return ops.cast(argmax(logits, how) == labels, "float32")
