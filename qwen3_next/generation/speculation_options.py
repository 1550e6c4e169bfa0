"""The arguments of `generate` that are about speculation."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import integer, number, require
from qwen3_next.generation.decoding import DecodingMethod
from qwen3_next.generation.drafting import Drafting, DraftVocabulary
from qwen3_next.generation.plain import PlainDecoding
from qwen3_next.generation.sampling import Mode
from qwen3_next.generation.speculative import SpeculativeDecoding
from qwen3_next.models.inputs import token_id_list

IN_UNIT_INTERVAL = number("in (0, 1]", lambda value: 0 < value <= 1)


@dataclasses.dataclass(frozen=True)
class SpeculationOptions:
    """Speculation as it is asked for; `None` leaves a choice to the model's configuration."""

    use_speculative: bool | None = None
    speculation_lookahead: int | None = None
    draft_vocabulary: Iterable[int] | None = None
    acceptance_threshold: float | None = None

    def choose(self, config: Qwen3NextConfig, mode: Mode) -> tuple[DecodingMethod, Drafting | None]:
        """The decoding method and, where it speculates, what it says about its drafts.

        Raises:
            ValueError: an option out of range, or one that a model or plain decoding cannot use.
        """
        use, mtp = self.use_speculative, config.mtp
        if use is not None and not isinstance(use, bool):
            raise ValueError(
                f"`use_speculative` must be None, True or False. Received: use_speculative={use!r}"
            )
        if use and mtp is None:
            raise ValueError(
                "`use_speculative=True` needs a model with multi-token prediction, "
                "`Qwen3Next(..., mtp=MTPConfig())`. Received: mtp=None"
            )
        if use is False or mtp is None:
            self._refuse_leftovers()
            return PlainDecoding(mode), None
        threshold = self._threshold()
        method = SpeculativeDecoding(mode, self._lookahead(mtp), lossy=threshold is not None)
        return method, Drafting(
            ops.convert_to_tensor(np.float32(threshold or 1.0)),
            self._vocabulary(config.vocab_size),
        )

    def _refuse_leftovers(self):
        options = dataclasses.asdict(self)
        del options["use_speculative"]
        given = {name: value for name, value in options.items() if value is not None}
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

    def _vocabulary(self, vocab_size):
        if self.draft_vocabulary is None:
            return None
        token_ids = np.unique(token_id_list("draft_vocabulary", self.draft_vocabulary, vocab_size))
        if token_ids.size == 0:
            raise ValueError(
                "`draft_vocabulary` must hold at least one token id. Received: draft_vocabulary=[]"
            )
        places = np.full(vocab_size, len(token_ids), "int32")
        places[token_ids] = np.arange(len(token_ids))
        token_ids, places = (ops.convert_to_tensor(x.astype("int32")) for x in (token_ids, places))
        return DraftVocabulary(token_ids, places)
