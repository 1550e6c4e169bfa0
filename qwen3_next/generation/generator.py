"""Generation with a cache: the prompts are read once, then one token after the other.

A few compiled functions do all of it: one reads a chunk of the prompts, one picks the first token,
one runs the decoding loop. Their shapes come from buckets, so that they compile once for a range
of prompt lengths, and everything else (sampling, stop tokens, limits) is data.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from qwen3_next.config.etd_config import THINKING_NAMES
from qwen3_next.config.validation import BOOLEAN, integer, require
from qwen3_next.generation.decoding import (
    Caches,
    DecodingMethod,
    Newest,
    Request,
    decode,
    prefill,
)
from qwen3_next.generation.drafting import Drafting, init_module_caches
from qwen3_next.generation.lookahead_choice import LookaheadChoice
from qwen3_next.generation.plain import PlainDecoding
from qwen3_next.generation.prompts import (
    Prompts,
    bucket,
    chunk_size,
    prefill_chunks,
    read_prompts,
)
from qwen3_next.generation.sampling import GREEDY, Sampling, make_sampling
from qwen3_next.generation.speculation_options import Candidate, SpeculationOptions
from qwen3_next.layers.ops.backend.sharding import devices
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.decisions import (
    check_decisions,
    decides_all,
    reads_prompts,
    with_decisions,
)
from qwen3_next.models.inputs import unpack

PREFILL_CHUNK = 512
SMALLEST_WIDTH = 16
SMALLEST_CAPACITY = 64


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: One int32 array of new tokens per row.
        stats: Dict of counts and times, see `Qwen3Next.generate`.
    """

    tokens: list[np.ndarray]
    stats: dict


class Generator:
    """Runs `generate` and `stream` for a language model and keeps what it has compiled.

    Args:
        model: `Qwen3Next`.
        prefill_chunk: Most tokens of every prompt that are read at a time.
    """

    def __init__(self, model: Any, prefill_chunk: int = PREFILL_CHUNK):
        self.model = model
        self.prefill_chunk = prefill_chunk
        self._functions: dict[tuple, Callable] = {}
        mtp = model.config.mtp
        self.choice = LookaheadChoice(0 if mtp is None else mtp.speculation_lookahead)

    def generate(
        self,
        prompts: Iterable | dict,
        max_new_tokens: int,
        *,
        use_speculative: bool | None = None,
        speculation_lookahead: int | None = None,
        draft_vocabulary: Iterable[int] | str | None = None,
        acceptance_threshold: float | None = None,
        measure_baseline: bool = False,
        think_iterations: int | None = None,
        route: Any = None,
        branch: Any = None,
        **sampling: Any,
    ) -> Generation:
        """See `Qwen3Next.generate`."""
        self.model.backbone.schedule.check_iterations(think_iterations)
        mode, sample_options = make_sampling(self.model.config.vocab_size, **sampling)
        require(BOOLEAN, "measure_baseline", measure_baseline)
        if measure_baseline and use_speculative is None:
            use_speculative = True
        candidates = SpeculationOptions(
            use_speculative, speculation_lookahead, draft_vocabulary, acceptance_threshold
        ).candidates(self.model, mode, think_iterations)
        if measure_baseline and candidates[0].drafting is None:
            raise ValueError(
                "`measure_baseline` compares speculative decoding with plain decoding. "
                f"Received: {measure_baseline=}, {use_speculative=}"
            )
        arrays = self._read(prompts, max_new_tokens, think_iterations, route, branch)
        if len(candidates) > 1:
            return self._run_fastest(arrays, max_new_tokens, candidates, sample_options)
        method, drafting = candidates[0]
        request = _request(max_new_tokens, sample_options, drafting)
        generation = self._run(arrays, max_new_tokens, method, request)
        if measure_baseline:
            # The first runs may compile, the second ones are timed.
            plain_request = request._replace(drafting=None)
            for _ in range(2):
                plain_method = PlainDecoding(mode, think_iterations)
                plain = self._run(arrays, max_new_tokens, plain_method, plain_request)
            generation = self._run(arrays, max_new_tokens, method, request)
            ratio = _seconds(plain.stats) / _seconds(generation.stats)
            generation.stats.update(speedup=ratio, wall_clock_speedup=ratio)
        return generation

    def stream(
        self,
        prompts: Iterable | dict,
        max_new_tokens: int,
        *,
        think_iterations: int | None = None,
        route: Any = None,
        branch: Any = None,
        **sampling: Any,
    ) -> Iterator[np.ndarray]:
        """See `Qwen3Next.stream`."""
        self.model.backbone.schedule.check_iterations(think_iterations)
        names = list(inspect.signature(make_sampling).parameters)[1:]
        unknown = sorted(sampling.keys() - set(names))
        if unknown:
            raise TypeError(
                "`stream` decodes plainly and takes `think_iterations`, `route`, `branch` and "
                f"{names}. Received: {unknown}"
            )
        # Not a generator itself, so that bad arguments raise here and not at the first token.
        mode, sample_options = make_sampling(self.model.config.vocab_size, **sampling)
        arrays = self._read(prompts, max_new_tokens, think_iterations, route, branch)
        method = PlainDecoding(mode, think_iterations)
        request = _request(max_new_tokens, sample_options)
        carry = self.prefill(arrays, max_new_tokens, method, request)
        return self._steps(method, carry, request, max_new_tokens)

    def prefill(
        self, prompts: Prompts, max_new_tokens: int, method: DecodingMethod, request: Request
    ) -> Any:
        """Reads the prompts and picks the first token: the carry that a method begins with."""
        config = self.model.config
        batch, capacity = len(prompts.lengths), self._capacity(prompts, max_new_tokens, method)
        caches = Caches(self.model.init_cache(batch, capacity, method.think_iterations))
        newest = Newest(ops.zeros((batch, config.hidden_size), self.model.compute_dtype))
        if request.drafting is not None:
            caches = caches._replace(modules=init_module_caches(self.model, batch, capacity))
            newest = newest._replace(mtp_input=ops.zeros_like(newest.hidden))
        for chunk in self._chunks(prompts):
            caches, newest = self._compiled(prefill)(caches, newest, chunk)
        new_tokens = ops.zeros((batch, bucket(max_new_tokens, SMALLEST_WIDTH)), "int32")
        return self._compiled(type(method).init, method)(caches, newest, request, new_tokens)

    def decide(self, prompts: Iterable | dict, think_iterations: int | None) -> dict[str, Any]:
        """See `Qwen3Next.decide`."""
        self.model.backbone.schedule.check_iterations(think_iterations)
        read = self._read(prompts, 1)
        method = PlainDecoding(GREEDY, think_iterations)
        batch = len(read.lengths)
        caches = Caches(
            self.model.init_cache(batch, self._capacity(read, 1, method), think_iterations)
        )
        newest = Newest(ops.zeros((batch, self.model.config.hidden_size), self.model.compute_dtype))
        for chunk in self._chunks(read):
            caches, newest = self._compiled(prefill)(caches, newest, chunk)
        found = {"route": caches.model.route, "branch": caches.model.branch}
        return {k: ops.convert_to_numpy(x) for k, x in found.items() if x is not None}

    def _chunks(self, prompts):
        """The prompts in chunks, the first with what is decided for a row or to decide it from.

        Routers read all of a prompt before its first think layer runs: it comes in one chunk.
        """
        config, size = self.model.config, self.prefill_chunk
        decisions = {
            name: ops.convert_to_tensor(value, "int32")
            for name, value in (("route", prompts.route), ("branch", prompts.branch))
            if value is not None
        }
        reads = reads_prompts(config) and not decides_all(config, decisions)
        longest = config.max_position_embeddings
        if reads:
            size = max(size, bucket(prompts.token_ids.shape[1], SMALLEST_WIDTH))
        elif devices() is None:
            size = chunk_size(prompts.lengths, size, longest)
        for chunk in prefill_chunks(prompts, size, longest):
            prompt = {"prompt_mask": chunk.mask} if reads else {}
            yield chunk._replace(decisions={**decisions, **prompt} or ())
            decisions = {}

    def _capacity(self, prompts, max_new_tokens, method):
        longest = prompts.token_ids.shape[1]
        capacity = bucket(longest + max_new_tokens + method.lookahead, SMALLEST_CAPACITY)
        return min(capacity, self.model.config.max_position_embeddings)

    def decode(self, method: DecodingMethod, carry: Any, request: Request) -> Any:
        """Decodes until every row has finished: the carry at the end. The first one is consumed."""
        return self._compiled(decode, method)(carry, request)

    def _read(
        self, prompts, max_new_tokens, think_iterations=None, route=None, branch=None
    ) -> Prompts:
        config = self.model.config
        require(integer(1), "max_new_tokens", max_new_tokens)
        arrays = read_prompts(prompts, config.vocab_size)
        longest = int(arrays.lengths.max())
        if longest + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                "The longest prompt and `max_new_tokens` must fit in `max_position_embeddings`="
                f"{config.max_position_embeddings}. Received: {longest} prompt tokens, "
                f"{max_new_tokens=}"
            )
        decided = with_decisions(config, {"token_ids": arrays.token_ids}, route, branch)
        check_decisions(config, unpack(decided), think_iterations)
        return arrays._replace(route=decided.get("route"), branch=decided.get("branch"))

    def _run_fastest(
        self, prompts: Prompts, max_new_tokens: int, candidates: list[Candidate], sampling: Sampling
    ) -> Generation:
        """Runs the candidate that `LookaheadChoice` picks, and lets it learn from the times."""
        requests = [_request(max_new_tokens, sampling, drafting) for _, drafting in candidates]
        programs = [
            self._program(prompts, max_new_tokens, method, request)
            for (method, _), request in zip(candidates, requests)
        ]
        choice = self.choice
        choice.follow(self.model)
        k = choice.pick(programs, max_new_tokens)
        is_new = max_new_tokens > 1 and not choice.has_timed(programs[k])
        generation = self._run(
            prompts, max_new_tokens, candidates[k].method, requests[k], compile_first=is_new
        )
        stats = generation.stats
        choice.record(programs[k], k, stats)
        seconds = choice.known(programs)
        if k and 0 in seconds and k in seconds:
            stats["speedup"] = seconds[0] / seconds[k]
        stats["seconds_per_token"] = seconds
        return generation

    def _program(self, prompts, max_new_tokens, method, request):
        """What the decoding loop is compiled for."""
        capacity = self._capacity(prompts, max_new_tokens, method)
        width = bucket(max_new_tokens, SMALLEST_WIDTH)
        shapes = [None if x is None else tuple(x.shape) for x in tree.flatten(request)]
        return method, len(prompts.lengths), capacity, width, *shapes

    def _run(self, prompts, max_new_tokens, method, request, *, compile_first=False) -> Generation:
        started = time.perf_counter()
        carry = self.prefill(prompts, max_new_tokens, method, request)
        if compile_first:  # and takes one step: the first run of a program is slower, too
            copied = tree.map_structure(lambda x: None if x is None else ops.copy(x), carry)
            one_step = request._replace(limit=ops.convert_to_tensor(np.int32(2)))
            ops.convert_to_numpy(self.decode(method, copied, one_step).token)
        ops.convert_to_numpy(carry.token)  # waits: JAX returns before it has computed
        prefilled = time.perf_counter()
        carry = self.decode(method, carry, request)
        counts = np.broadcast_to(ops.convert_to_numpy(carry.count), len(prompts.lengths))
        new_tokens = ops.convert_to_numpy(carry.new_tokens)
        rows, reasons = _cut(new_tokens, counts, request.sampling)
        finished = time.perf_counter()
        new = sum(len(row) for row in rows)
        stats = {
            "prompt_tokens": int(prompts.lengths.sum()),
            "new_tokens": new,
            "lookahead": method.lookahead,
            **method.stats(carry),
            **self._drafting_stats(request),
            "finish_reasons": reasons,
            "prefill_seconds": prefilled - started,
            "decode_seconds": finished - prefilled,
            "tokens_per_second": new / (finished - started),
        }
        if self.model.config.etd is not None:
            names = (*THINKING_NAMES, "router_actions", "expert_selections")
            found = {name: stats[name] for name in names if name in stats}
            self.model.thinking_of_generation = found
        return Generation(rows, stats)

    def _drafting_stats(self, request):
        if request.drafting is None:
            return {}
        vocabulary = request.drafting.vocabulary
        size = self.model.config.vocab_size if vocabulary is None else len(vocabulary.token_ids)
        return {"draft_vocab_size": size, "speedup": None}

    def _steps(self, method, carry, request, max_new_tokens):
        finished = np.zeros(carry.new_tokens.shape[0], bool)
        for count in range(1, max_new_tokens + 1):
            yield np.where(finished, -1, ops.convert_to_numpy(carry.token))
            finished = ops.convert_to_numpy(carry.finished)
            if finished.all() or count == max_new_tokens:
                return
            carry = self._compiled(type(method).step, method)(carry, request)

    def _compiled(self, function, method=None):
        """The compiled form of a function of (method,) model and tensors, the first consumed."""
        key = (function, method)
        if key not in self._functions:
            given = (self.model,) if method is None else (method, self.model)
            self._functions[key] = compile_with_weights(
                self.model, lambda *args: function(*given, *args), donate=(0,)
            )
        return self._functions[key]


def _request(max_new_tokens, sampling: Sampling, drafting: Drafting | None = None) -> Request:
    limit = ops.convert_to_tensor(np.int32(max_new_tokens))
    return Request(limit, sampling, drafting)


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


def _seconds(stats):
    return stats["prefill_seconds"] + stats["decode_seconds"]
