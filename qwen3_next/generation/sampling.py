"""Choosing the next token from logits."""

import enum
import random
from collections.abc import Iterable
from typing import Annotated, NamedTuple

import keras
import numpy as np
from keras import ops

from qwen3_next.config.validation import integer, number, optional_integer, require
from qwen3_next.layers.ops.backend.seeds import DrawnSeed
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.inputs import token_id_list


class Mode(enum.Enum):
    """What is compiled into a program: the likeliest token, all tokens, or those filters leave."""

    GREEDY = enum.auto()
    PLAIN = enum.auto()
    FILTERED = enum.auto()


GREEDY, PLAIN, FILTERED = Mode
# Logits divided by less leave the range of float32.
LOWEST_TEMPERATURE = 1e-6
TEMPERATURE = number(
    f"0 or at least {LOWEST_TEMPERATURE}", lambda value: value == 0 or value >= LOWEST_TEMPERATURE
)


class Sampling(NamedTuple):
    """How to sample, as tensors: changing a value compiles nothing anew.

    Attributes:
        temperature: `()` float32.
        top_k: `()` int32, 0 for all.
        top_p: `()` float32.
        min_p: `()` float32.
        seed: `()` uint32.
        stop_token_ids: `(S,)` int32, filled up with -1.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    stop_token_ids: Tensor


def make_sampling(
    vocab_size: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop_token_ids: Iterable[int] = (),
) -> tuple[Mode, Sampling]:
    """Checks the arguments of `generate` and returns `(mode, Sampling)`."""
    temperature, top_p, min_p = (
        x.item() if isinstance(x, np.generic) else x for x in (temperature, top_p, min_p)
    )
    rules = (
        ("temperature", temperature, TEMPERATURE),
        ("top_k", top_k, integer(0)),
        ("top_p", top_p, number("in (0, 1]", lambda value: 0 < value <= 1)),
        ("min_p", min_p, number("in [0, 1]", lambda value: 0 <= value <= 1)),
        ("seed", seed, optional_integer(0)),
    )
    for name, value, rule in rules:
        require(rule, name, value)
    stops = token_id_list("stop_token_ids", stop_token_ids, vocab_size)
    given = ("top_k", top_k, 0), ("top_p", top_p, 1.0), ("min_p", min_p, 0.0)
    filters = {name: value for name, value, none in given if value != none}
    mode = GREEDY if temperature == 0 else FILTERED if filters else PLAIN
    if mode == GREEDY and filters:
        name, value = next(iter(filters.items()))
        raise ValueError(
            f"`{name}` needs a `temperature` above 0: at 0 nothing is drawn. "
            f"Received: {name}={value}, temperature={temperature}"
        )
    seed = random.getrandbits(31) if seed is None else seed
    stops = stops + [-1] * (-len(stops) % 8 or (0 if stops else 8))
    values = (
        np.float32(temperature or 1.0),
        np.int32(top_k),
        np.float32(top_p),
        np.float32(min_p),
        np.uint32(seed % 2**32),
        np.asarray(stops, np.int32),
    )
    return mode, Sampling(*(ops.convert_to_tensor(value) for value in values))


def sample(
    logits: Annotated[Tensor, "B V"], sampling: Sampling, step: Tensor | int, mode: Mode
) -> Annotated[Tensor, "B"]:
    """Next tokens `(B,)` int32 from logits `(B, V)`.

    The noise of a row depends on the seed, the step and the row's number alone.
    """
    logits = ops.cast(logits, "float32")
    if mode is GREEDY:
        return ops.cast(ops.argmax(logits, axis=-1), "int32")
    logits = warp(logits, sampling, mode)
    seed = ops.stack([sampling.seed, ops.cast(step, "uint32")])
    return ops.cast(keras.random.categorical(logits, 1, seed=DrawnSeed(seed))[:, 0], "int32")


def warp(
    logits: Annotated[Tensor, "N V"], sampling: Sampling, mode: Mode
) -> Annotated[Tensor, "N V"]:
    """Logits of the distribution that is sampled from, `-inf` at what the filters remove.

    Temperature first; then the `top_k` most likely tokens; then the smallest set of them whose
    probability reaches `top_p`; then those at least `min_p` times as likely as the likeliest.
    Tokens tied with the last one kept are kept.
    """
    logits = ops.cast(logits, "float32") / sampling.temperature
    if mode is not FILTERED:
        return logits
    ordered = ops.flip(ops.sort(logits, axis=-1), axis=-1)  # (B, V), likeliest first
    rank = ops.arange(logits.shape[-1], dtype="int32")
    keep = (sampling.top_k == 0) | (rank < sampling.top_k)
    probabilities = ops.softmax(ops.where(keep, ordered, -float("inf")), axis=-1)
    before = ops.cumsum(probabilities, axis=-1) - probabilities
    keep = keep & (before < sampling.top_p)
    keep = keep & (probabilities >= sampling.min_p * probabilities[:, :1])
    last = ops.maximum(ops.sum(ops.cast(keep, "int32"), axis=-1, keepdims=True) - 1, 0)
    threshold = ops.take_along_axis(ordered, last, axis=-1)
    return ops.where(logits >= threshold, logits, -float("inf"))


def is_stop(token_ids: Tensor, sampling: Sampling) -> Tensor:
    """`(...)` bool: which token ids end a row."""
    return ops.any(token_ids[..., None] == sampling.stop_token_ids, axis=-1)
