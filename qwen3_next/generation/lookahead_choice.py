"""How many tokens to draft where it is left open: what was measured decides."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from keras import ops

HALF_LIFE = 300  # steps of a row after which what was accepted counts half
PROBING = 0.02  # share of the time that may go into looking whether drafts have come to pay


class LookaheadChoice:
    """Picks the number of drafts per step, 0 for plain decoding, that costs least per token.

        c_k / E_k,    E_k = 1 + a_1 + .. + a_k

    c_k is what a step with k drafts takes and E_k the tokens it gives: a_j is how often draft j
    and all before it were accepted. c_k depends on shapes and is kept for every compiled program,
    the least that was measured, as other work on the machine only adds. a_j depends on the text
    and is a running mean over the generations of this model. So:

    - Of new shapes the first call decodes plainly, the second with the most drafts K. Between two
      widths that were measured c_k is interpolated; where such a guess is the least, the next call
      measures it.
    - Every later call takes the least, and what it measures goes into the next choice.
    - Fewer drafts than K say nothing about the others. So 2 % of the time that passes meanwhile is
      saved up, and a call that can pay with it for what K drafts cost more makes K drafts.
    - Another set of variables forgets everything. After training the a_j are forgotten, and the
      next call makes K drafts.

    Args:
        lookahead: The most drafts K.
    """

    def __init__(self, lookahead: int) -> None:
        self.lookahead = lookahead
        self._variables: list = []
        self._trained: tuple = ()
        self._step_seconds: dict[Hashable, float] = {}
        self._tried, self._accepted = np.zeros((2, lookahead))
        self._saved = 0.0

    def follow(self, model: Any) -> None:
        """Forgets what a change of the model has made worthless; called before every choice."""
        variables = model.variables
        known = self._variables
        if len(variables) != len(known) or any(a is not b for a, b in zip(variables, known)):
            self._variables = variables
            self._step_seconds = {}
            self._forget_acceptance()
        optimizer = getattr(model, "optimizer", None)
        steps = None if optimizer is None else int(ops.convert_to_numpy(optimizer.iterations))
        trained = (optimizer, steps)
        if trained != self._trained:
            self._trained = trained
            self._forget_acceptance()

    def pick(self, programs: Sequence[Hashable], tokens: int) -> int:
        """The number of drafts of the next call.

        Args:
            programs: What decoding with 0, 1, .. K drafts is compiled for.
            tokens: Most new tokens of a row.
        """
        most = self.lookahead
        if tokens == 1 or not self.has_timed(programs[0]):  # one token comes from the prompt
            return 0
        if not self.has_timed(programs[most]) or not self._tried[-1]:
            return most
        costs = self._token_seconds(programs)
        best = int(np.argmin(costs))
        extra = tokens * (costs[most] - costs[best])
        if best != most and extra <= self._saved:
            self._saved = 0.0
            return most
        return best

    def has_timed(self, program: Hashable) -> bool:
        return program in self._step_seconds

    def record(self, program: Hashable, lookahead: int, stats: dict) -> None:
        """Learns from a generation whose program had been compiled before."""
        tokens_per_step = 1.0
        if lookahead:
            row_steps = stats["drafted"] // lookahead
            rates = np.array(stats["acceptance_rate_by_position"])
            keep = 0.5 ** (row_steps / HALF_LIFE)
            self._tried[:lookahead] = keep * self._tried[:lookahead] + row_steps
            self._accepted[:lookahead] = keep * self._accepted[:lookahead] + row_steps * rates
            tokens_per_step = stats["tokens_per_step"]
        seconds = seconds_per_token(stats)
        if seconds is not None:
            before = self._step_seconds.get(program, np.inf)
            self._step_seconds[program] = min(before, seconds * tokens_per_step)
            self._saved += PROBING * stats["decode_seconds"]

    def known(self, programs: Sequence[Hashable]) -> dict[int, float]:
        """Seconds per token and row by number of drafts, of those that were timed."""
        timed = [k for k, program in enumerate(programs) if self.has_timed(program)]
        return {k: float(self._token_seconds(programs)[k]) for k in timed}

    def _token_seconds(self, programs):
        timed = [k for k, program in enumerate(programs) if self.has_timed(program)]
        steps = [self._step_seconds[programs[k]] for k in timed]
        rates = self._accepted / np.maximum(self._tried, 1.0)
        tokens = 1.0 + np.concatenate([[0.0], np.cumsum(rates)])
        return np.interp(range(len(programs)), timed, steps) / tokens

    def _forget_acceptance(self):
        self._tried, self._accepted = np.zeros((2, self.lookahead))
        self._saved = 0.0


def seconds_per_token(stats: dict) -> float | None:
    """Decoding time per token and row behind the first ones, or `None` where there are none."""
    rows = len(stats["finish_reasons"])
    decoded = stats["new_tokens"] - rows  # the first tokens come from the prompts
    return stats["decode_seconds"] * rows / decoded if decoded else None
