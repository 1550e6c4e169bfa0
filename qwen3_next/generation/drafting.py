"""Drafting: the MTP modules read certain pairs and guess the tokens behind them.

A pair is the backbone's hidden state at a token and the token after it.
"""

from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from qwen3_next.generation.sampling import GREEDY, Mode, Sampling, warp
from qwen3_next.layers.ops.backend.seeds import DrawnSeed
from qwen3_next.layers.ops.sequence import valid_lengths
from qwen3_next.layers.ops.tensor_types import Tensor


class PendingPairs(NamedTuple):
    """Pairs that are certain and not yet read by the modules.

    Attributes:
        hidden: `(B, W, D)`, hidden states of the backbone.
        token_ids: `(B, W)` int32, the token after each.
        mask: `(B, W)` bool, true at real pairs.
    """

    hidden: Tensor
    token_ids: Tensor
    mask: Tensor


class ExtendedModules(NamedTuple):
    """The modules after some pairs.

    Attributes:
        hidden: `(B, W, D)`, hidden states of the first module.
        caches: Layer caches of the modules that have attention.
        pairs: `(B,)` int32, pairs in those caches.
    """

    hidden: Tensor
    caches: tuple
    pairs: Tensor


class DraftVocabulary(NamedTuple):
    """The tokens that may be drafted.

    Attributes:
        token_ids: `(n,)` int32.
        places: `(V,)` int32, the place of every token among them, n where it is none of them.
        kernel: `(D, n)`, their columns of the head, or `None` before `Drafting.with_kernel`.
    """

    token_ids: Tensor
    places: Tensor
    kernel: Tensor | None = None


class Drafting(NamedTuple):
    """What a call says about its drafts, as tensors.

    Attributes:
        threshold: `()` float32, probability from which a lossy method accepts any draft.
        vocabulary: `DraftVocabulary`, or `None` for all tokens.
    """

    threshold: Tensor
    vocabulary: DraftVocabulary | None = None

    def with_kernel(self, model: Any) -> "Drafting":
        """The same with the columns of the head gathered, once for all steps."""
        if self.vocabulary is None:
            return self
        kernel = ops.take(model.head_kernel(), self.vocabulary.token_ids, axis=1)
        return self._replace(vocabulary=self.vocabulary._replace(kernel=kernel))


class Draft(NamedTuple):
    """Drafted tokens.

    Attributes:
        token_ids: `(B, k)` int32.
        probabilities: `(B, k, V)` float32, the distributions they came from, or `None` in greedy
            decoding.
    """

    token_ids: Annotated[Tensor, "B k"]
    probabilities: Annotated[Tensor, "B k V"] | None


class StepSeeds:
    """Independent seeds for the draws of one step; number 0 was used for the first token."""

    def __init__(self, sampling: Sampling, step: Tensor, lookahead: int):
        self.seed = sampling.seed
        self.first = 1 + step * (lookahead + 2)

    def __call__(self, draw: int) -> DrawnSeed:
        number = ops.cast(self.first + draw, "uint32")
        return DrawnSeed(ops.stack([self.seed, number]))


def init_module_caches(model: Any, batch_size: int, max_length: int) -> tuple:
    """Empty layer caches of the modules that have attention."""
    caches = (module.init_cache(batch_size, max_length) for module in model.mtp_modules)
    return tuple(cache for cache in caches if cache is not None)


def extend_modules(
    model: Any, caches: tuple, lengths: Annotated[Tensor, "B"], pairs: PendingPairs
) -> ExtendedModules:
    """Reads certain pairs with every module."""
    embedding = model.backbone.embed_tokens(pairs.token_ids)
    outputs = [
        module(
            embedding,
            pairs.hidden,
            padding_mask=pairs.mask,
            cache=caches[number] if caches else None,
            lengths=lengths,
            full_output=True,
        )
        # Without attention only the first module has anything to do here.
        for number, module in enumerate(model.mtp_modules[: max(len(caches), 1)])
    ]
    extended = tuple(output.cache for output in outputs) if caches else ()
    return ExtendedModules(outputs[0].hidden, extended, lengths + valid_lengths(pairs.mask))


def draft_tokens(
    model: Any,
    modules: ExtendedModules,
    hidden: Annotated[Tensor, "B D"],
    active: Annotated[Tensor, "B"],
    sampling: Sampling,
    seeds: StepSeeds,
    vocabulary: DraftVocabulary | None,
    *,
    lookahead: int,
    mode: Mode,
) -> tuple[Draft, tuple]:
    """Drafts `lookahead` tokens behind the newest pair, one after the other.

    Args:
        model: `Qwen3Next` with MTP modules.
        modules: Their state after all certain pairs.
        hidden: `(B, D)`, the first module's hidden state at the newest pair.
        active: `(B,)` bool, rows that have not finished.
        sampling, seeds, vocabulary, mode: How to draw.
        lookahead: Number k of drafts.

    Returns:
        `Draft` and the caches of the modules. Behind `modules.pairs` these hold drafts, which the
        next certain pairs overwrite.
    """
    caches, shared = modules.caches, len(model.mtp_modules) == 1
    tokens: list[Tensor] = []
    probabilities: list[Tensor] = []
    drafted: list[tuple[Tensor, Tensor]] = []  # pairs that a module has not read
    for number in range(lookahead):
        token, probability = _pick(model, hidden, sampling, seeds(number), vocabulary, mode)
        tokens.append(token)
        probabilities.append(probability)
        if number + 1 == lookahead:
            break
        # One shared module has the drafts before this one in its cache; a module of its own per
        # step has to read them all.
        drafted = [*([] if shared else drafted), (hidden, token)]
        place = 0 if shared else number + 1
        output = model.mtp_module(number + 2)(
            model.backbone.embed_tokens(ops.stack([token for _, token in drafted], axis=1)),
            ops.stack([hidden for hidden, _ in drafted], axis=1),
            padding_mask=ops.repeat(active[:, None], len(drafted), axis=1),
            cache=caches[place] if caches else None,
            lengths=modules.pairs + (number if shared else 0),
            full_output=True,
        )
        hidden = output.hidden[:, -1]
        if caches:
            caches = (*caches[:place], output.cache, *caches[place + 1 :])
    stacked = None if mode is GREEDY else ops.stack(probabilities, axis=1)
    return Draft(ops.stack(tokens, axis=1), stacked), caches


def _pick(model, hidden, sampling, seed, vocabulary, mode):
    """A drafted token `(B,)` and the distribution over all tokens that it came from."""
    if vocabulary is None:
        logits = model.logits(hidden)
    else:
        logits = hidden @ ops.cast(vocabulary.kernel, hidden.dtype)
    if mode is GREEDY:
        token, probabilities = ops.cast(ops.argmax(logits, axis=-1), "int32"), None
    else:
        logits = warp(logits, sampling, mode)
        token = ops.cast(keras.random.categorical(logits, 1, seed=seed)[:, 0], "int32")
        probabilities = ops.softmax(logits, axis=-1)
    if vocabulary is None:
        return token, probabilities
    if probabilities is not None:
        nothing = ops.zeros_like(probabilities[:, :1])
        probabilities = ops.concatenate([probabilities, nothing], axis=-1)
        probabilities = ops.take(probabilities, vocabulary.places, axis=-1)
    return ops.take(vocabulary.token_ids, token), probabilities
