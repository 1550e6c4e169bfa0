"""The token ids by which a conversion judges or fits layers."""

from collections.abc import Sequence
from typing import Any

from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.models.inputs import check_token_ids, unpack


def check_sample(
    name: str, sample: Any, config: Qwen3NextConfig, others: Sequence[str] = ()
) -> None:
    """Raises `ValueError` for token ids that say nothing of a model, or that it does not take.

    Args:
        name: Of the argument.
        sample: Token ids `(N, T)`, or a dict.
        config: Of the model that reads them.
        others: What else of `models.inputs.KEYS` is read.
    """
    check_token_ids(sample, config.vocab_size)
    inputs = unpack(sample)
    for key, value in inputs.given().items():
        if key not in ("token_ids", *others):
            raise ValueError(
                f"`{key}` must be None in `{name}`, where nothing would read it. "
                f"Received: {key} of shape {tuple(value.shape)}"
            )
    shape, mask = tuple(inputs.token_ids.shape), inputs.padding_mask
    if shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"`{name}` must have rows of at most `max_position_embeddings`="
            f"{config.max_position_embeddings} tokens. Received: {shape[1]} tokens"
        )
    if shape[0] == 0 or (mask is not None and not ops.any(mask)):
        raise ValueError(
            f"`{name}` must hold at least one real token. Received: shape {shape}, all padding"
        )
