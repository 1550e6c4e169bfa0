"""The arguments of `generate` that are about speculation."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from qwen3_next.config.validation import integer, number, require
from qwen3_next.generation.decoding import DecodingMethod
from qwen3_next.generation.drafting import Drafting, DraftVocabulary
from qwen3_next.generation.plain import PlainDecoding
from qwen3_next.generation.sampling import GREEDY, Mode
from qwen3_next.generation.speculative import SpeculativeDecoding
from qwen3_next.models.inputs import token_id_list

IN_UNIT_INTERVAL = number("in (0, 1]", lambda value: 0 < value <= 1)


ALL_TOKENS = "all"


class Candidate(NamedTuple):
    """A way to decode.

    Attributes:
        method: The decoding method.
        drafting: What it says about its drafts, or `None` for plain decoding.
    """

    method: DecodingMethod
    drafting: Drafting | None = None


@dataclasses.dataclass(frozen=True)
class SpeculationOptions:
    """Speculation as it is asked for; `None` leaves a choice to the model."""

    use_speculative: bool | None = None
    speculation_lookahead: int | None = None
    draft_vocabulary: Iterable[int] | str | None = None
    acceptance_threshold: float | None = None

    def candidates(self, model: Any, mode: Mode, iterations: int | None = None) -> list[Candidate]:
        """The way to decode, or if that is left to measurements, those with 0, 1, .. K drafts.

        It is left to them for the likeliest tokens alone, which are the same in every way. Drawn
        ones are not: they would depend on how busy the machine was.

        Raises:
            ValueError: an option out of range, or one that a model or plain decoding cannot use.
        """
        use, mtp = self.use_speculative, model.config.mtp
        if use is not None and not isinstance(use, bool):
            raise ValueError(
                f"`use_speculative` must be None, True or False. Received: use_speculative={use!r}"
            )
        if use and mtp is None:
            raise ValueError(
                "`use_speculative=True` needs a model with multi-token prediction, "
                "`Qwen3Next(..., mtp=MTPConfig())`. Received: mtp=None"
            )
        plain = Candidate(PlainDecoding(mode, iterations))
        if use is False or mtp is None:
            self._refuse_leftovers()
            return [plain]
        is_open = use is None and not self._given()
        if is_open and mode is not GREEDY:
            return [plain]
        threshold, lookahead = self._threshold(), self._lookahead(mtp)
        drafting = Drafting(
            ops.convert_to_tensor(np.float32(threshold or 1.0)), self._vocabulary(model)
        )
        speculative = [
            Candidate(SpeculativeDecoding(mode, k, threshold is not None, iterations), drafting)
            for k in range(1 if is_open else lookahead, lookahead + 1)
        ]
        return [plain, *speculative] if is_open else speculative

    def _given(self):
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del options["use_speculative"]
        return {name: value for name, value in options.items() if value is not None}

    def _refuse_leftovers(self):
        given = self._given()
        if given:
            raise ValueError(f"Plain decoding does not use {sorted(given)}. Received: {given}")

    def _lookahead(self, mtp):
        lookahead = self.speculation_lookahead
        lookahead = mtp.speculation_lookahead if lookahead is None else lookahead
        if not integer(1).fits(lookahead) or lookahead > mtp.num_predict_tokens:
            raise ValueError(
                "`speculation_lookahead` must be an integer from 1 to `num_predict_tokens`="
                f"{mtp.num_predict_tokens}. Received: speculation_lookahead={lookahead!r}"
            )
        return lookahead

    def _threshold(self):
        threshold = self.acceptance_threshold
        if threshold is not None:
            require(IN_UNIT_INTERVAL, "acceptance_threshold", threshold)
        return threshold

    def _vocabulary(self, model):
        vocab_size, given = model.config.vocab_size, self.draft_vocabulary
        if isinstance(given, str) and given == ALL_TOKENS:
            return None
        if given is None:
            token_ids = model.frequent_tokens()
            if token_ids is None:
                return None
        else:
            token_ids = np.unique(token_id_list("draft_vocabulary", given, vocab_size))
        if token_ids.size == 0:
            raise ValueError(
                "`draft_vocabulary` must hold at least one token id. Received: draft_vocabulary=[]"
            )
        places = np.full(vocab_size, len(token_ids), "int32")
        places[token_ids] = np.arange(len(token_ids))
        token_ids, places = (ops.convert_to_tensor(x.astype("int32")) for x in (token_ids, places))
        return DraftVocabulary(token_ids, places)
