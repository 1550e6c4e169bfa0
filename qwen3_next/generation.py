"""Generation with a state: the prompt is absorbed once, then one token after the other.

Three compiled functions do all of it: one absorbs a piece of the prompts, one picks the first
token, one runs the decoding loop. Their shapes come from buckets, so that they compile once for a
range of prompt lengths, and everything else (sampling, stop tokens, limits) is data.
"""

import time
from typing import NamedTuple

import numpy as np
from keras import ops

from qwen3_next.compiled import compile_with_weights
from qwen3_next.inputs import check_token_ids
from qwen3_next.layers.ops.sequence import token_ranks, valid_lengths
from qwen3_next.sampling import make_sampling, sample

PREFILL_PIECE = 512  # tokens of a prompt absorbed at a time
SMALLEST_PIECE = 16
SMALLEST_CAPACITY = 64


class Generation(NamedTuple):
    """`tokens`, one int32 array of new tokens a row, and `stats`, a dict of counts and times."""

    tokens: list
    stats: dict


class Decoding(NamedTuple):
    """The carry of the decoding loop."""

    state: object
    token: object  # (B,) int32, the newest token, not yet absorbed
    finished: object  # (B,) bool
    new_tokens: object  # (B, M) int32
    count: object  # () int32, columns of `new_tokens` written


class Prompts(NamedTuple):
    """Prompts on the host: `token_ids` `(B, T)` int32, padded on the right, and `lengths`."""

    token_ids: np.ndarray
    lengths: np.ndarray


class Generator:
    """Runs `generate` and `stream` for a language model and keeps what it has compiled."""

    def __init__(self, model):
        self.model = model
        self._functions = {}

    def generate(self, prompts, max_new_tokens, **options):
        started = time.perf_counter()
        prompts, sampler, carry = self._prefill(prompts, max_new_tokens, options)
        ops.convert_to_numpy(carry.token)  # waits: JAX returns before it has computed
        prefilled = time.perf_counter()
        mode, sampling = sampler
        limit = ops.convert_to_tensor(np.int32(max_new_tokens))
        carry = self._function("advance", mode)(carry, limit, sampling)
        rows, reasons = _cut(carry, sampling)
        seconds = time.perf_counter() - prefilled
        new = sum(len(row) for row in rows)
        stats = {
            "prompt_tokens": int(prompts.lengths.sum()),
            "new_tokens": new,
            "steps": int(carry.count),
            "finish_reasons": reasons,
            "prefill_seconds": prefilled - started,
            "decode_seconds": seconds,
            "tokens_per_second": new / (prefilled - started + seconds),
        }
        return Generation(rows, stats)

    def stream(self, prompts, max_new_tokens, **options):
        # Not a generator itself, so that bad arguments raise here and not at the first token.
        _, sampler, carry = self._prefill(prompts, max_new_tokens, options)
        return self._steps(sampler, carry, max_new_tokens)

    def _steps(self, sampler, carry, max_new_tokens):
        mode, sampling = sampler
        advance = self._function("advance", mode)
        over = np.zeros(len(ops.convert_to_numpy(carry.token)), bool)
        for count in range(1, max_new_tokens + 1):
            yield np.where(over, -1, ops.convert_to_numpy(carry.token))
            over = ops.convert_to_numpy(carry.finished)
            if over.all() or count == max_new_tokens:
                return
            carry = advance(carry, ops.convert_to_tensor(np.int32(count + 1)), sampling)

    def _prefill(self, prompts, max_new_tokens, options):
        """Absorbs the prompts and picks the first token: `(prompts, (mode, sampling), carry)`."""
        config = self.model.config
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` must be an integer of at least 1. Received: {max_new_tokens!r}"
            )
        prompts = read_prompts(prompts, config.vocab_size)
        mode, sampling = make_sampling(config.vocab_size, **options)
        longest = int(prompts.lengths.max())
        if longest + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                "The longest prompt and `max_new_tokens` must fit in `max_position_embeddings`="
                f"{config.max_position_embeddings}. Received: {longest} prompt tokens, "
                f"{max_new_tokens=}"
            )
        capacity = _bucket(longest + max_new_tokens, SMALLEST_CAPACITY)
        capacity = min(capacity, config.max_position_embeddings)
        batch = len(prompts.lengths)
        state = self.model.init_state(batch, capacity)
        last = ops.zeros((batch, config.hidden_size), self.model.compute_dtype)
        for token_ids, mask in _pieces(prompts):
            state, last = self._function("absorb")(state, last, token_ids, mask)
        width = _bucket(max_new_tokens, SMALLEST_PIECE)
        new_tokens = ops.zeros((batch, width), "int32")
        carry = self._function("begin", mode)(state, last, new_tokens, sampling)
        return prompts, (mode, sampling), carry

    def _function(self, name, *static):
        key = (name, *static)
        if key not in self._functions:
            method, donate = getattr(self, f"_{name}"), (0,)
            self._functions[key] = compile_with_weights(
                self.model, lambda *args: method(*args, *static), donate
            )
        return self._functions[key]

    def _absorb(self, state, last, token_ids, mask):
        """One piece of the prompts; `last` holds every row's newest hidden state."""
        inputs = {"token_ids": token_ids, "padding_mask": mask}
        output = self.model.backbone(inputs, state=state)
        newest = last_hidden(output.hidden, mask)
        return output.state, ops.where(valid_lengths(mask)[:, None] > 0, newest, last)

    def _begin(self, state, last, new_tokens, sampling, mode):
        token = sample(self.model.logits(last), sampling, 0, mode)
        new_tokens = ops.slice_update(new_tokens, (0, 0), token[:, None])
        finished = _is_stop(token, sampling)
        return Decoding(state, token, finished, new_tokens, ops.ones((), "int32"))

    def _advance(self, carry, limit, sampling, mode):
        """Decodes until `limit` tokens stand in every row or all rows have met a stop token."""

        def unfinished(*carry):
            carry = Decoding(*carry)
            return (carry.count < limit) & ops.logical_not(ops.all(carry.finished))

        def step(*carry):
            state, token, finished, new_tokens, count = carry
            inputs = {
                "token_ids": token[:, None],
                "padding_mask": ops.logical_not(finished)[:, None],
            }
            output = self.model.backbone(inputs, state=state)
            token = sample(self.model.logits(output.hidden[:, 0]), sampling, count, mode)
            new_tokens = ops.slice_update(new_tokens, (0, count), token[:, None])
            finished = finished | _is_stop(token, sampling)
            return output.state, token, finished, new_tokens, count + 1

        return Decoding(*ops.while_loop(unfinished, step, tuple(carry)))


def last_hidden(hidden, mask):
    """Hidden state `(B, D)` of every row's last real token; of any token where there is none."""
    if mask is None:
        return hidden[:, -1]
    # The first place that has the last rank is the last real token.
    ranks = token_ranks(mask)
    place = ops.argmax(ops.cast(ranks == ranks[:, -1:], "int32"), axis=-1)
    place = ops.cast(place, "int32")[:, None, None]
    return ops.take_along_axis(hidden, place, axis=1)[:, 0]


def read_prompts(prompts, vocab_size):
    """Turns what `generate` accepts into `Prompts`, checking every row."""
    if isinstance(prompts, dict):
        unknown = sorted(set(prompts) - {"token_ids", "padding_mask"})
        if unknown or "token_ids" not in prompts:
            raise ValueError(
                "Prompts must be a dict with 'token_ids' and optionally 'padding_mask'. "
                f"Received keys: {sorted(prompts)}"
            )
        token_ids = ops.convert_to_numpy(prompts["token_ids"])
        mask = prompts.get("padding_mask")
        mask = np.ones(token_ids.shape, bool) if mask is None else ops.convert_to_numpy(mask)
        if token_ids.ndim != 2 or mask.shape != token_ids.shape:
            raise ValueError(
                "`token_ids` must have shape (batch, tokens) and `padding_mask` the same. "
                f"Received: token_ids.shape={token_ids.shape}, padding_mask.shape={mask.shape}"
            )
        rows = [row[real] for row, real in zip(token_ids, mask.astype(bool))]
    else:
        rows = [np.asarray(row) for row in _as_rows(prompts)]
    if not rows:
        raise ValueError(f"`prompts` must hold at least one row. Received: {prompts!r}")
    for number, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(
                "Every prompt must be a non-empty sequence of integer token ids. "
                f"Received: prompt {number} with shape {row.shape} and dtype {row.dtype}"
            )
        check_token_ids(row, vocab_size)
    lengths = np.array([len(row) for row in rows], np.int32)
    token_ids = np.zeros((len(rows), lengths.max()), np.int32)
    for row, out in zip(rows, token_ids):
        out[: len(row)] = row
    return Prompts(token_ids, lengths)


def _as_rows(prompts):
    if isinstance(prompts, list | tuple):
        return prompts
    array = ops.convert_to_numpy(prompts)
    if array.ndim != 2:
        raise ValueError(
            "`prompts` must be a list of token-id sequences or have shape (batch, tokens). "
            f"Received: prompts.shape={array.shape}"
        )
    return list(array)


def _pieces(prompts):
    """Cuts the prompts into pieces of bucketed widths, with their masks."""
    length = prompts.token_ids.shape[1]
    for start in range(0, length, PREFILL_PIECE):
        piece = prompts.token_ids[:, start : start + PREFILL_PIECE]
        width = _bucket(piece.shape[1], SMALLEST_PIECE)
        piece = np.pad(piece, [(0, 0), (0, width - piece.shape[1])])
        mask = start + np.arange(width) < prompts.lengths[:, None]
        yield ops.convert_to_tensor(piece), ops.convert_to_tensor(mask)


def _bucket(size, smallest):
    """The power of two, or three quarters of one, that is at least `size` and `smallest`."""
    bucket = smallest
    while bucket < size:
        bucket *= 2
    three_quarters = bucket * 3 // 4
    return three_quarters if three_quarters >= max(size, smallest) else bucket


def _is_stop(token, sampling):
    return ops.any(token[:, None] == sampling.stop_token_ids, axis=-1)


def _cut(carry, sampling):
    """Rows of new tokens up to and including the first stop token, and why each of them ended."""
    count = int(carry.count)
    new_tokens = ops.convert_to_numpy(carry.new_tokens)[:, :count]
    stops = ops.convert_to_numpy(sampling.stop_token_ids)
    rows, reasons = [], []
    for row in new_tokens:
        hits = np.flatnonzero(np.isin(row, stops))
        rows.append(row[: hits[0] + 1] if hits.size else row)
        reasons.append("stop" if hits.size else "length")
    return rows, reasons
