"""Fits the Gated DeltaNets of a converted model to the attention that they replace.

Layer by layer, on the inputs x that the source's layer has, with t what its heads give:

    half-life of a head   n_h = mean over tokens of sum_j p_ij (i - j)       p: attention weights
    norm and output gate  w * n(o) * silu(x W_z) ~ t            n(o): the normed output of the rule
    output projection     (w * n(o) * silu(x W_z)) W_o ~ t W_o'         where that is asked for

all by (ridge) least squares; the gate, which is not linear, by a few Gauss-Newton steps.

Source of the decay: Taylor-Calibrate, arXiv 2606.16429. The gate starts from a nearly constant
opening, as a bias would give: hidden states have a common direction to regress it on.
"""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import keras
import numpy as np
from keras import ops

from qwen3_next.config import HybridAttentionConfig, Qwen3NextConfig
from qwen3_next.config.model_config import FULL, LINEAR
from qwen3_next.layers import GatedAttention, GatedDeltaNet
from qwen3_next.layers.ops import attention
from qwen3_next.models.inputs import unpack
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.transfer.conversion.hybrid_conversion import dt_bias_of
from qwen3_next.transfer.conversion.sample_tokens import check_sample

RIDGE = 1e-3  # of the mean of the squares that it is added to
GATE_STEPS = 8
SHORTEST, LONGEST = 0.25, 1e5  # half-lives, in tokens
_Z = np.linspace(-1.2, 30.0, 4096)
_SILU = _Z / (1.0 + np.exp(-_Z))


class Replaced(NamedTuple):
    """A layer that was converted, and what its mixer reads.

    Attributes:
        layer: Its number.
        attention: The source's mixer.
        deltanet: The new one.
        x: `(B, T, D)`, the input of both in the source.
    """

    layer: int
    attention: GatedAttention
    deltanet: GatedDeltaNet
    x: Any


def check_calibration(calibration: Any, config: Qwen3NextConfig) -> None:
    """Raises `ValueError` for calibration tokens that a model does not take."""
    if calibration is not None:
        check_sample("calibration", calibration, config, ("padding_mask",))


def calibrate_deltanets(
    teacher: Qwen3Next,
    student: Qwen3Next,
    calibration: Any,
    hybrid: HybridAttentionConfig,
    progress: bool = True,
) -> dict[str, str]:
    """Fits what `hybrid` asks for, in the student.

    Args:
        teacher: The source of the student.
        student: A hybrid with the source's projections.
        calibration: Token ids `(N, T)` or a dict with `"padding_mask"`; one row at a time runs
            through attention weights, all rows through a layer.
        hybrid: `HybridAttentionConfig`.
        progress: Whether to show a progress bar over layers.

    Returns:
        What was done and how well, for a report.
    """
    mask = unpack(calibration).padding_mask
    mask = None if mask is None else ops.convert_to_tensor(np.asarray(mask, bool))
    real = None if mask is None else ops.convert_to_numpy(mask)
    fits, lives = [], []
    count = student.config.layer_types.count(LINEAR)
    bar = keras.utils.Progbar(count, unit_name="layer") if progress else None
    for replaced in replaced_layers(teacher, student, calibration):
        if hybrid.decay_init != "half_life":
            lives.append(_fit_decay(replaced, mask, real))
        if hybrid.output_gate_init in (None, "least_squares"):
            fits.append(_fit_gate(replaced, mask, real))
        if hybrid.output_projection_init == "least_squares":
            _fit_output(replaced, mask, real)
        if bar is not None:
            bar.add(1)
    found = {}
    if lives:
        low, high = np.min(lives), np.max(lives)
        found["decay"] = f"half-lives of {low:.3g} to {high:.3g} tokens, from attention distance"
    if fits:
        shares = ", ".join(f"{100 * share:.0f}" for share in fits)
        found["output gate of Gated DeltaNets"] = (
            f"least squares; share of the heads' outputs explained, by layer: {shares} %"
        )
    if hybrid.output_projection_init == "least_squares":
        found["output projection of Gated DeltaNets"] = "least squares"
    return found


def replaced_layers(teacher: Qwen3Next, student: Qwen3Next, inputs: Any) -> Iterator[Replaced]:
    """The converted layers in order, each with its input in the source."""
    found = unpack(inputs)
    ids = ops.convert_to_tensor(np.asarray(found.token_ids, "int32"))
    mask = found.padding_mask
    mask = None if mask is None else ops.convert_to_tensor(np.asarray(mask, bool))
    hidden = teacher.backbone.embed_tokens(ids)
    pairs = zip(teacher.backbone.decoder_layers, student.backbone.decoder_layers, strict=True)
    kinds = zip(teacher.config.layer_types, student.config.layer_types, strict=True)
    for number, ((old, new), kind) in enumerate(zip(pairs, kinds, strict=True)):
        if kind == (FULL, LINEAR):
            yield Replaced(number, old.mixer, new.mixer, old.input_layernorm(hidden))
        hidden = old(hidden, padding_mask=mask)


def attention_distance(
    mixer: GatedAttention, x: Annotated[Any, "B T D"], mask: Annotated[Any, "B T"] | None = None
) -> Annotated[np.ndarray, "H"]:
    """How far every head looks back, in tokens, on average over all real tokens."""
    heads, tokens = mixer.num_attention_heads, 0
    total = np.zeros(heads)
    for row in range(x.shape[0]):
        keep = None if mask is None else mask[row : row + 1]
        query, key, _ = mixer.heads(x[row : row + 1], keep)
        real = slice(None) if keep is None else np.flatnonzero(ops.convert_to_numpy(keep)[0])
        query, key = (_to_numpy(part)[0][real] for part in (query, key))  # (T, H, D), (T, G, D)
        length, repeats = len(query), heads // key.shape[1]
        gaps = np.arange(length)[:, None] - np.arange(length)  # (T, T)
        for head in range(heads):
            scores = query[:, head] @ key[:, head // repeats].T / np.sqrt(query.shape[-1])
            scores = np.where(gaps >= 0, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
            weights /= weights.sum(axis=-1, keepdims=True)
            total[head] += (weights * gaps).sum()
        tokens += length
    return total / max(tokens, 1)


def _fit_decay(replaced, mask, real):
    """Sets the decay of every head; returns the half-lives."""
    deltanet = replaced.deltanet
    distance = attention_distance(replaced.attention, replaced.x, mask)
    lives = distance.reshape(deltanet.linear_num_value_heads, -1).mean(axis=1)
    lives = np.clip(lives, SHORTEST, LONGEST)
    deltanet.dt_bias.assign(dt_bias_of(lives).astype("float32"))
    return lives


def _fit_gate(replaced, mask, real):
    """Sets the norm and the output gate; returns the share of the outputs that they explain."""
    deltanet = replaced.deltanet
    x, normed, target = _samples(replaced, mask, real)  # (N, D), (N, V, K), (N, V, K)
    scale = (normed * target).mean(0) / np.maximum((normed**2).mean(0), 1e-12)  # (V, K)
    weight = np.sqrt(np.maximum((scale**2).mean(0), 1e-12))  # (K,), shared by the heads
    wanted = target / weight
    solve = _ridge_solver(x)
    gate = np.interp(scale / weight, _SILU, _Z)  # a constant gate of that opening
    kernel = solve(np.broadcast_to(gate.reshape(1, -1), (len(x), gate.size)))
    power = (normed**2).mean(0).reshape(-1)
    best = (np.inf, kernel)
    for step in range(GATE_STEPS + 1):
        z = x @ kernel  # (N, V K)
        opening = _sigmoid(z)
        missing = (wanted - normed * (z * opening).reshape(normed.shape)).reshape(z.shape)
        best = min(best, (float(np.mean(missing**2)), kernel), key=lambda found: found[0])
        if step == GATE_STEPS:
            break
        slope = np.maximum(opening * (1.0 + z * (1.0 - opening)), 0.3)  # of the SiLU
        pull = normed.reshape(z.shape) * missing / (power * slope)
        kernel = kernel + 0.5 * solve(pull)
    deltanet.norm.weight.assign(weight.astype("float32"))
    _set_gate(deltanet, best[1])
    return 1.0 - best[0] / float(np.mean(wanted**2))


def _fit_output(replaced, mask, real):
    """Sets the output projection from what the fitted heads give."""
    deltanet = replaced.deltanet
    x, normed, _ = _samples(replaced, mask, real)
    kernel = _gate_kernel(deltanet)
    z = x @ kernel
    weight = _to_numpy(deltanet.norm.weight)
    gated = (normed * weight).reshape(z.shape) * z * _sigmoid(z)  # (N, V K)
    output = replaced.attention(replaced.x, padding_mask=mask)
    solution = _ridge_solver(gated)(_rows(output, real))  # (V K, D)
    projection = deltanet.out_proj.kernel
    projection.assign(solution.reshape(projection.shape).astype("float32"))


def _samples(replaced, mask, real):
    """Inputs, normed outputs of the rule and wanted outputs of the heads, at real tokens."""
    deltanet, mixer, x = replaced.deltanet, replaced.attention, replaced.x
    output = _rows(deltanet.head_outputs(x, mask), real)  # (N, V, K)
    power = (output**2).mean(axis=-1, keepdims=True)
    normed = output / np.sqrt(power + deltanet.rms_norm_eps)
    query, key, value = mixer.heads(x, mask)
    target = _rows(attention(query, key, value, key_mask=mask), real)  # (N, H, K)
    heads = deltanet.linear_num_value_heads
    target = target.reshape(len(target), heads, -1, target.shape[-1]).mean(axis=2)
    return _rows(x, real), normed, target


def _sigmoid(z):
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def _rows(tensor, real):
    """`(B, T, ...)` -> `(N, ...)` float32, the real tokens alone."""
    array = _to_numpy(tensor)
    return array.reshape(-1, *array.shape[2:]) if real is None else array[real]


def _to_numpy(tensor):
    return np.asarray(ops.convert_to_numpy(tensor), "float32")


def _ridge_solver(x):
    """From targets `(N, M)` to the matrix `(D, M)` that takes x nearest to them."""
    x = x.astype("float64")
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
    inverse = np.linalg.inv(gram)
    return lambda targets: (inverse @ (x.T @ targets)).astype("float32")


def _set_gate(deltanet, kernel):
    """Puts the gate's `(D, V K)` where it stands in the projection: last for every key head."""
    projection = deltanet.in_proj_qkvz.kernel
    values = np.array(ops.convert_to_numpy(projection.value), "float32")
    width, key_heads, _ = values.shape
    values[..., deltanet.group_channels :] = kernel.reshape(width, key_heads, -1)
    projection.assign(values)


def _gate_kernel(deltanet):
    values = _to_numpy(deltanet.in_proj_qkvz.kernel.value)
    return values[..., deltanet.group_channels :].reshape(values.shape[0], -1)
