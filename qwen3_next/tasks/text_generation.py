"""What a language model offers of generation; how it is done stands in `generation`."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from qwen3_next.generation.generator import Generation, Generator


class TextGeneration:
    """A mixin of models with a `generator`."""

    generator: Generator

    def generate(
        self,
        prompts: Iterable | dict,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token_ids: Iterable[int] = (),
        use_speculative: bool | None = None,
        speculation_lookahead: int | None = None,
        draft_vocabulary: Iterable[int] | str | None = None,
        acceptance_threshold: float | None = None,
        measure_baseline: bool = False,
        think_iterations: int | None = None,
        route: Any = None,
        branch: Any = None,
    ) -> Generation:
        """Continues every prompt.

        With multi-token prediction the modules draft and the model verifies: the tokens follow the
        same distribution as without it, and are the same with `temperature=0` (in float32; in
        bfloat16 passes of different widths round differently).

        On a CPU a call of 16 steps and more that read 3 to 32 tokens each holds the kernel of a
        large head (2**23 numbers and more, float32, not tied) a second time, turned round, which is
        faster to read.

        Args:
            prompts: List of token-id sequences of any lengths, an array `(B, T)`, or a dict with
                `"token_ids"` and `"padding_mask"`, padded on any side.
            max_new_tokens: Most tokens to add to a row.
            temperature: 0 takes the likeliest token; above, logits are divided by it.
            top_k: Sample from the k likeliest tokens; 0 for all. This and the next two need a
                temperature above 0.
            top_p: Sample from the fewest tokens whose probability reaches this.
            min_p: Sample from the tokens at least this many times as likely as the likeliest.
            seed: Integer that makes sampling repeatable; by default drawn from Python's `random`,
                which `keras.utils.set_random_seed` seeds.
            stop_token_ids: Tokens that end a row. The row keeps the one it met.
            use_speculative: Whether to speculate. With `None` one of the arguments below asks for
                it. Without them, at `temperature=0`, it is done where it is faster: of new shapes
                the first calls measure, see `generation.lookahead_choice`. Other temperatures
                decode plainly, so that what is drawn does not depend on times, and a seed gives
                the same tokens in every run.
            speculation_lookahead: Tokens to draft before a verification, at most
                `num_predict_tokens`. Defaults to the configuration's.
            draft_vocabulary: Token ids that may be drafted: a smaller product for every draft. Any
                token may still be generated. `"all"` for all of them. Defaults to the
                `draft_vocab_size` most frequent tokens of the data the modules learned from in
                `fit`, to all before that.
            acceptance_threshold: Lossy: accept also every draft that the model gives at least this
                probability. The tokens no longer follow the model's distribution.
            measure_baseline: Whether to time plain decoding as well (both run once before).
            think_iterations: Iterations of the think loop, `None` for those of the configuration;
                with adaptive depth the most.
            route: How often each think layer runs, 0 to 2, for all rows `(L,)` or for each
                `(B, L)`, in place of what layer routers say of the prompt.
            branch: The LoRA expert of all rows, or of each `(B,)`, in place of what their router
                says; -1 for none.

        Returns:
            `Generation(tokens, stats)`: a list with one int32 array of new tokens per row, and a
            dict with `prompt_tokens`, `new_tokens`, `lookahead` (drafts per step, 0 in plain
            decoding), `steps`, `finish_reasons` (`"stop"` or `"length"`), `prefill_seconds`,
            `decode_seconds` (both with compilation where it was needed) and `tokens_per_second`.

            Speculation adds `verify_steps` (passes through the backbone after the prompt),
            `drafted` and `accepted` tokens, `acceptance_rate_by_position` (how often a draft and
            all before it were accepted), `avg_acceptance_rate`, `tokens_per_step` of a row,
            `draft_vocab_size` (tokens that were drafted from), `lossy`, and `speedup` over plain
            decoding: the measured one, `None` where none was measured. `measure_baseline` measures
            the whole call (also as `wall_clock_speedup`).

            Where `use_speculative=None` left the choice to measurements, `seconds_per_token` maps
            every number of drafts that was timed at these shapes to the time of a token, at the
            rate at which drafts are being accepted; `speedup` compares these.

            A think loop adds means over the tokens that were read behind the prompt:
            `think_iterations`, `early_exit` (share that left before the last iteration) and
            `exit_confidence` (sum of halting probabilities). Layer routers add `route` `(B, L)` and
            `router_actions` (for every think layer how many rows skip, run and repeat it), LoRA
            experts `expert_selections` (in how many iterations of these tokens each took part).

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, an argument out of range,
                or more tokens than `max_position_embeddings`.
        """
        return self.generator.generate(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop_token_ids=stop_token_ids,
            use_speculative=use_speculative,
            speculation_lookahead=speculation_lookahead,
            draft_vocabulary=draft_vocabulary,
            acceptance_threshold=acceptance_threshold,
            measure_baseline=measure_baseline,
            think_iterations=think_iterations,
            route=route,
            branch=branch,
        )

    def decide(
        self, prompts: Iterable | dict, think_iterations: int | None = None
    ) -> dict[str, np.ndarray]:
        """What the routers of a think loop decide for prompts.

        `generate` decides by itself. Whoever reads a prompt in pieces with `extend` decides first:
        the first piece goes with what is returned here, `{"token_ids": piece, **decided}`.

        Args:
            prompts: As for `generate`.
            think_iterations: Iterations of the think loop, `None` for the configuration's.

        Returns:
            A dict with `"route"` `(B, L)` where there are layer routers, and with `"branch"`
            `(B, k)` where rows choose LoRA experts.
        """
        return self.generator.decide(prompts, think_iterations)

    def stream(
        self, prompts: Iterable | dict, max_new_tokens: int = 128, **sampling: Any
    ) -> Iterator[np.ndarray]:
        """As `generate`, but an iterator that yields each step's tokens as they are made.

        Args:
            prompts, max_new_tokens: As for `generate`.
            **sampling: Its arguments on sampling, stop tokens, `think_iterations`, `route` and
                `branch`. Decoding is plain.

        Returns:
            Iterator of `(B,)` int32, -1 in rows that have ended.
        """
        return self.generator.stream(prompts, max_new_tokens, **sampling)
