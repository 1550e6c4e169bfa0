"""Generation with a cache: the prompt is absorbed once, then one token after the other.

A few compiled functions do all of it: one absorbs a piece of the prompts, one picks the first
token, one runs the decoding loop, plain or speculative. Their shapes come from buckets, so that
they compile once for a range of prompt lengths, and everything else (sampling, stop tokens, limits)
is data.
"""

import time
from typing import NamedTuple

import numpy as np
from keras import ops

from qwen3_next.generation.sampling import is_stop, make_sampling, sample
from qwen3_next.generation.speculative import (
    Counters,
    DraftVocabulary,
    Pending,
    Plan,
    Speculating,
    extend_modules,
    init_caches,
    speculate,
)
from qwen3_next.layers.ops.sequence import valid_lengths
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.inputs import check_token_ids, last_hidden

PREFILL_PIECE = 512  # tokens of a prompt absorbed at a time
SMALLEST_PIECE = 16
SMALLEST_CAPACITY = 64


class Generation(NamedTuple):
    """`tokens`, one int32 array of new tokens a row, and `stats`, a dict of counts and times."""

    tokens: list
    stats: dict


class Decoding(NamedTuple):
    """The carry of the decoding loop."""

    cache: object
    token: object  # (B,) int32, the newest token, not yet absorbed
    finished: object  # (B,) bool
    new_tokens: object  # (B, M) int32
    count: object  # () int32, columns of `new_tokens` written


class Prefilled(NamedTuple):
    """The carry of the prefill: every row's newest hidden state `last` `(B, D)`, and for models
    with multi-token prediction what their modules absorbed and read next."""

    cache: object
    last: object
    caches: tuple = ()
    mtp_last: object = None


class Speculative(NamedTuple):
    """How to speculate: `plan`, the `vocabulary` of drafts or `None`, the lossy `threshold`."""

    plan: Plan
    vocabulary: object
    threshold: object


class Prompts(NamedTuple):
    """Prompts on the host: `token_ids` `(B, T)` int32, padded on the right, and `lengths`."""

    token_ids: np.ndarray
    lengths: np.ndarray


class Generator:
    """Runs `generate` and `stream` for a language model and keeps what it has compiled."""

    def __init__(self, model):
        self.model = model
        self._functions = {}

    def generate(
        self,
        prompts,
        max_new_tokens,
        *,
        use_speculative=None,
        speculation_lookahead=None,
        draft_vocabulary=None,
        acceptance_threshold=None,
        measure_baseline=False,
        **options,
    ):
        speculative = self._speculative(
            use_speculative, speculation_lookahead, draft_vocabulary, acceptance_threshold
        )
        if measure_baseline and speculative is None:
            raise ValueError(
                "`measure_baseline` compares speculative decoding with plain decoding. "
                f"Received: {measure_baseline=}, {use_speculative=}"
            )
        generation = self._generate(prompts, max_new_tokens, options, speculative)
        if measure_baseline:
            # The first runs may compile, the second ones are timed.
            plain = [self._generate(prompts, max_new_tokens, options) for _ in range(2)][1]
            generation = self._generate(prompts, max_new_tokens, options, speculative)
            ratio = _seconds(plain.stats) / _seconds(generation.stats)
            generation.stats["wall_clock_speedup"] = ratio
        return generation

    def _generate(self, prompts, max_new_tokens, options, speculative=None):
        started = time.perf_counter()
        prompts, (mode, sampling), carry = self._prefill(
            prompts, max_new_tokens, options, speculative
        )
        ops.convert_to_numpy(carry.token)  # waits: JAX returns before it has computed
        prefilled = time.perf_counter()
        limit = ops.convert_to_tensor(np.int32(max_new_tokens))
        if speculative is None:
            carry = self._function("advance", mode)(carry, limit, sampling)
            counts = np.full(len(prompts.lengths), int(carry.count))
            stats = {"steps": int(carry.count)}
        else:
            plan, vocabulary, threshold = speculative
            speculate = self._function("speculate", plan._replace(mode=mode))
            carry = speculate(carry, limit, sampling, vocabulary, threshold)
            counts = ops.convert_to_numpy(carry.count)
            stats = _speculation_stats(carry, plan)
        rows, reasons = _cut(ops.convert_to_numpy(carry.new_tokens), counts, sampling)
        seconds = time.perf_counter() - prefilled
        new = sum(len(row) for row in rows)
        stats = {
            "prompt_tokens": int(prompts.lengths.sum()),
            "new_tokens": new,
            **stats,
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

    def _speculative(self, use, lookahead, vocabulary, threshold):
        """The `Speculative` that is asked for, or `None` for plain decoding."""
        mtp, size = self.model.config.mtp, self.model.config.vocab_size
        if use not in (None, True, False):
            raise ValueError(f"`use_speculative` must be None, True or False. Received: {use!r}")
        if use and mtp is None:
            raise ValueError(
                "`use_speculative=True` needs a model with multi-token prediction, "
                "`Qwen3Next(..., mtp=MTPConfig())`. Received: mtp=None"
            )
        if use is False or mtp is None:
            given = {
                "speculation_lookahead": lookahead,
                "draft_vocabulary": vocabulary,
                "acceptance_threshold": threshold,
            }
            given = {name: value for name, value in given.items() if value is not None}
            if given:
                raise ValueError(f"Plain decoding does not use {sorted(given)}. Received: {given}")
            return None
        lookahead = mtp.speculation_lookahead if lookahead is None else lookahead
        if not isinstance(lookahead, int) or not 1 <= lookahead <= mtp.num_predict_tokens:
            raise ValueError(
                "`speculation_lookahead` must be an integer from 1 to `num_predict_tokens`="
                f"{mtp.num_predict_tokens}. Received: speculation_lookahead={lookahead!r}"
            )
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(
                "`acceptance_threshold` must be in (0, 1]. "
                f"Received: acceptance_threshold={threshold}"
            )
        if vocabulary is not None:
            token_ids = np.unique(np.asarray(vocabulary))
            if token_ids.ndim != 1 or token_ids.size == 0:
                raise ValueError(
                    "`draft_vocabulary` must be a non-empty list of token ids. "
                    f"Received: shape {np.shape(vocabulary)}"
                )
            check_token_ids(token_ids, size)
            places = np.full(size, len(token_ids), "int32")
            places[token_ids] = np.arange(len(token_ids))
            vocabulary = DraftVocabulary(
                *(ops.convert_to_tensor(x.astype("int32")) for x in (token_ids, places))
            )
        plan = Plan(lookahead, None, threshold is not None)
        return Speculative(plan, vocabulary, ops.convert_to_tensor(np.float32(threshold or 1.0)))

    def _prefill(self, prompts, max_new_tokens, options, speculative=None):
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
        ahead = 0 if speculative is None else speculative.plan.lookahead
        capacity = _bucket(longest + max_new_tokens + ahead, SMALLEST_CAPACITY)
        capacity = min(capacity, config.max_position_embeddings)
        batch = len(prompts.lengths)
        last = ops.zeros((batch, config.hidden_size), self.model.compute_dtype)
        carry = Prefilled(self.model.init_cache(batch, capacity), last)
        if speculative is not None:
            caches = init_caches(self.model, batch, capacity)
            carry = carry._replace(caches=caches, mtp_last=ops.zeros_like(last))
        for piece in _pieces(prompts):
            carry = self._function("extend", speculative is not None)(carry, *piece)
        width = _bucket(max_new_tokens, SMALLEST_PIECE)
        new_tokens = ops.zeros((batch, width), "int32")
        begin = self._function("begin", mode, ahead)
        limit = ops.convert_to_tensor(np.int32(max_new_tokens))
        lasts = carry.last, carry.mtp_last
        carry = begin((carry.cache, carry.caches), lasts, new_tokens, sampling, limit)
        return prompts, (mode, sampling), carry

    def _function(self, name, *static):
        key = (name, *static)
        if key not in self._functions:
            method, donate = getattr(self, f"_{name}"), (0,)
            self._functions[key] = compile_with_weights(
                self.model, lambda *args: method(*args, *static), donate
            )
        return self._functions[key]

    def _extend(self, carry, token_ids, next_ids, mask, next_mask, with_modules):
        """One piece of the prompts, and with modules the pairs of its tokens and the next ones."""
        model, cache = self.model, carry.cache
        output = model.backbone({"token_ids": token_ids, "padding_mask": mask}, cache=cache)
        some = valid_lengths(mask)[:, None] > 0
        last = ops.where(some, last_hidden(output.hidden, mask), carry.last)
        if not with_modules:
            return Prefilled(output.cache, last)
        hidden = model.mtp_input(output)
        # All tokens before the piece have been paired: a token waits for the next one.
        pending = Pending(hidden, next_ids, next_mask)
        _, caches, _ = extend_modules(model, carry.caches, cache.lengths, pending)
        mtp_last = ops.where(some, last_hidden(hidden, mask), carry.mtp_last)
        return Prefilled(output.cache, last, caches, mtp_last)

    def _begin(self, memory, lasts, new_tokens, sampling, limit, mode, lookahead):
        """Picks the first token and sets up the carry of a loop, speculative if there is one."""
        (cache, caches), (last, mtp_last) = memory, lasts
        token = sample(self.model.logits(last), sampling, 0, mode)
        new_tokens = ops.slice_update(new_tokens, (0, 0), token[:, None])
        finished = is_stop(token, sampling)
        one = ops.ones((), "int32")
        if not lookahead:
            return Decoding(cache, token, finished, new_tokens, one)
        ahead = [[0, 0], [0, lookahead]]
        pending = Pending(
            hidden=ops.pad(mtp_last[:, None], [*ahead, [0, 0]]),
            token_ids=ops.pad(token[:, None], ahead),
            mask=ops.pad(ops.ones_like(token, "bool")[:, None], ahead),
        )
        zero = ops.zeros((), "int32")
        return Speculating(
            cache=cache,
            caches=caches,
            pairs=cache.lengths - 1,
            pending=pending,
            token=token,
            finished=finished | (limit <= 1),
            new_tokens=new_tokens,
            count=ops.ones_like(token),
            counters=Counters(zero, zero, ops.zeros((lookahead,), "int32")),
        )

    def _advance(self, carry, limit, sampling, mode):
        """Decodes until `limit` tokens stand in every row or all rows have met a stop token."""

        def unfinished(*carry):
            carry = Decoding(*carry)
            return (carry.count < limit) & ops.logical_not(ops.all(carry.finished))

        def step(*carry):
            cache, token, finished, new_tokens, count = carry
            inputs = {
                "token_ids": token[:, None],
                "padding_mask": ops.logical_not(finished)[:, None],
            }
            output = self.model.backbone(inputs, cache=cache)
            token = sample(self.model.logits(output.hidden[:, 0]), sampling, count, mode)
            new_tokens = ops.slice_update(new_tokens, (0, count), token[:, None])
            finished = finished | is_stop(token, sampling)
            return output.cache, token, finished, new_tokens, count + 1

        return Decoding(*ops.while_loop(unfinished, step, tuple(carry)))

    def _speculate(self, carry, limit, sampling, vocabulary, threshold, plan):
        return speculate(self.model, carry, limit, sampling, vocabulary, threshold, plan)


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
    """Cuts the prompts into pieces of bucketed widths: ids, those of the next tokens, and masks."""
    length = prompts.token_ids.shape[1]
    for start in range(0, length, PREFILL_PIECE):
        width = _bucket(min(length - start, PREFILL_PIECE), SMALLEST_PIECE)
        ids = np.zeros((len(prompts.lengths), width + 1), "int32")
        piece = prompts.token_ids[:, start : start + width + 1]
        ids[:, : piece.shape[1]] = piece
        mask = start + np.arange(width + 1) < prompts.lengths[:, None]
        arrays = ids[:, :-1], ids[:, 1:], mask[:, :-1], mask[:, 1:]
        yield tuple(ops.convert_to_tensor(array) for array in arrays)


def _bucket(size, smallest):
    """The power of two, or three quarters of one, that is at least `size` and `smallest`."""
    bucket = smallest
    while bucket < size:
        bucket *= 2
    three_quarters = bucket * 3 // 4
    return three_quarters if three_quarters >= max(size, smallest) else bucket


def _cut(new_tokens, counts, sampling):
    """Rows of new tokens up to and including the first stop token, and why each of them ended."""
    stops = ops.convert_to_numpy(sampling.stop_token_ids)
    rows, reasons = [], []
    for row, count in zip(new_tokens, counts):
        row = row[:count]
        hits = np.flatnonzero(np.isin(row, stops))
        rows.append(row[: hits[0] + 1] if hits.size else row)
        reasons.append("stop" if hits.size else "length")
    return rows, reasons


def _speculation_stats(carry, plan):
    counters = carry.counters
    row_steps = int(counters.row_steps)
    accepted = ops.convert_to_numpy(counters.accepted)
    # The first token of a row comes from its prompt.
    decoded = int(ops.convert_to_numpy(carry.count).sum()) - len(carry.count)
    rates = [float(n) / row_steps if row_steps else 0.0 for n in accepted]
    speed = decoded / row_steps if row_steps else 0.0
    return {
        "steps": int(counters.steps),
        "verify_steps": int(counters.steps),
        "drafted": row_steps * plan.lookahead,
        "accepted": int(accepted.sum()),
        "acceptance_rate_by_position": rates,
        "avg_acceptance_rate": sum(rates) / len(rates),
        "tokens_per_step": speed,
        "speedup": speed,
        "lossy": plan.lossy,
    }


def _seconds(stats):
    return stats["prefill_seconds"] + stats["decode_seconds"]
