"""Where to split a model into layers that encode, think and decode.

    d(l, l+1) = arccos( x_l . x_{l+1} / (|x_l| |x_{l+1}|) ) / pi

is how far layer l turns the residual stream x of a sequence's last token, taken before the final
norm; its mean over a data set is the curve in which Kneedle looks for the boundaries.

Reference: Encode, Think, Decode, arXiv 2510.07358; the distance is that of arXiv 2403.17887.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import keras
import numpy as np
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import NOT_NEGATIVE, Rule, integer, require
from qwen3_next.generation.prompts import SMALLEST_CHUNK, bucket
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.backbone import Qwen3NextBackbone
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.inputs import check_token_ids, last_hidden
from qwen3_next.tasks.task import Task
from qwen3_next.think.layer_profile import LayerProfile
from qwen3_next.think.token_sequences import token_sequences
from qwen3_next.training.data import Batch, pad

VERBOSE = Rule("0, 1 or 2", lambda value: type(value) is int and 0 <= value <= 2)


def profile_layers(
    model: Task,
    data: Any,
    *,
    batch_size: int = 8,
    sensitivity: float = 1.0,
    verbose: int = 1,
) -> LayerProfile:
    """Measures how far each layer turns the residual stream of the last token.

        d(l, l+1) = arccos( x_l . x_{l+1} / (|x_l| |x_{l+1}|) ) / pi,   mean over all sequences

    Layers that turn it little work on one representation and are those to think with: see
    `LayerProfile` for the split. Batches go through the model one by one; each width of batch, one
    of a few, is compiled once.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier`.
        data: Token ids `(N, T)`, a list of sequences of any lengths, or a dict with `"token_ids"`
            and optionally `"padding_mask"`; or batches of arrays or dicts, alone or in a tuple
            with labels, from a `tf.data.Dataset`, a generator or a `PyDataset`. Packed rows are
            refused: only the last of their sequences would count.
        batch_size: Sequences per pass, whatever the batches of the data.
        sensitivity: Sensitivity S of Kneedle; the larger, the more pronounced a knee must be.
        verbose: 0 for silence, 1 for a progress bar, 2 for a line at the end.

    Returns:
        `LayerProfile`.

    Raises:
        ValueError: data of another kind, a sequence that is empty, too long, or holds an id outside
            the vocabulary, no data at all, or a residual stream that is zero or not finite.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next, profile_layers

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=4)
    profile = profile_layers(model, np.random.randint(0, 64, (5, 12)), verbose=0)
    assert len(profile.distances) == 4 and profile.sequences == 5
    ```
    """
    if not isinstance(model, Task):
        raise ValueError(
            f"`model` must be a Qwen3Next or a Qwen3NextClassifier. Received: model={model!r}"
        )
    require(integer(1), "batch_size", batch_size)
    require(NOT_NEGATIVE, "sensitivity", sensitivity)
    require(VERBOSE, "verbose", verbose)
    backbone, config = model.backbone, model.config
    last_states = compile_with_weights(backbone, lambda *inputs: _last_states(backbone, *inputs))
    sequences = token_sequences(data)
    total = len(sequences) if isinstance(sequences, list) else None
    bar = keras.utils.Progbar(total, verbose=verbose, unit_name="sequence")
    sums, count = np.zeros(config.num_layers), 0
    for group in _groups(sequences, batch_size):
        batch = _padded(group, batch_size, config)
        states = last_states(*(ops.convert_to_tensor(value) for value in batch.values()))
        sums += angular_distances(ops.convert_to_numpy(states)[: len(group)]).sum(0)
        count += len(group)
        bar.update(count)
    if count == 0:
        raise ValueError(f"`data` must hold at least one sequence. Received: data={data!r}")
    if total is None:
        bar.update(count, finalize=True)
    distances = tuple(float(distance) for distance in sums / count)
    return LayerProfile(distances, config.layer_types, count, sensitivity)


def angular_distances(states: Annotated[np.ndarray, "B L+1 D"]) -> Annotated[np.ndarray, "B L"]:
    """Angles between consecutive states, in units of pi, in float64.

    Raises:
        ValueError: a state that is zero or not finite has no angle.
    """
    states = states.astype(np.float64)
    norms = np.linalg.norm(states, axis=-1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError(
            "The residual stream must be finite and not zero before and after every layer. "
            f"Received: norms from {norms.min()} to {norms.max()}"
        )
    units = states / norms
    cosines = (units[:, :-1] * units[:, 1:]).sum(-1)
    return np.arccos(np.clip(cosines, -1.0, 1.0)) / np.pi


def _last_states(
    backbone: Qwen3NextBackbone, token_ids: Tensor, padding_mask: Tensor
) -> Annotated[Tensor, "B L+1 D"]:
    """The last token's residual stream before the first layer and after each, float32."""
    hidden = backbone.embed_tokens(token_ids)
    states = [last_hidden(hidden, padding_mask)]
    for layer in backbone.decoder_layers:
        hidden = layer(hidden, padding_mask=padding_mask, training=False)
        states.append(last_hidden(hidden, padding_mask))
    return ops.cast(ops.stack(states, axis=1), "float32")


def _groups(sequences: Iterable, size: int) -> Iterator[list]:
    group = []
    for sequence in sequences:
        group.append(sequence)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _padded(group: list, rows: int, config: Qwen3NextConfig) -> Batch:
    """A batch of `rows` rows and one of a few widths, so that few programs are compiled."""
    longest = max(len(sequence) for sequence in group)
    if longest > config.max_position_embeddings:
        raise ValueError(
            "Sequences must have at most `max_position_embeddings`="
            f"{config.max_position_embeddings} tokens. Received: {longest} tokens"
        )
    for sequence in group:
        check_token_ids(sequence, config.vocab_size)
    width = min(bucket(longest, SMALLEST_CHUNK), config.max_position_embeddings)
    return pad(group + group[:1] * (rows - len(group)), width)
