"""Which layers should keep their attention: restore one at a time and see what it gives.

    D_0 = KL(teacher || student with no attention at all)
    D_l = KL(teacher || student with the attention of layer l alone)        fall of l: D_0 - D_l

The student is a hybrid all of whose layers were converted, after a short alignment. The layers
whose falls are the largest keep their attention.

Source: Distilling to Hybrid Attention Models via KL-Guided Layer Selection, arXiv 2512.20569.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from qwen3_next.checkpoints.staging import FILE, read_json, replaced
from qwen3_next.config import HybridAttentionConfig
from qwen3_next.config.model_config import FULL, LINEAR
from qwen3_next.config.validation import BOOLEAN, Rule, integer, is_list_of, number, require
from qwen3_next.layers import SparseMoE
from qwen3_next.layers.ops import linear_kl_divergence
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.inputs import unpack
from qwen3_next.models.values import checksum
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.think.figures import axes_for
from qwen3_next.transfer.conversion.sample_tokens import check_sample
from qwen3_next.transfer.distill.layer_streams import mixer_output

_FINITE = number("a finite number", lambda value: True)
_BY_LAYER = Rule(
    "a tuple of finite numbers, one for each layer",
    lambda values: is_list_of(values, _FINITE.fits) and len(values) > 0,
)


@dataclass(frozen=True)
class LayerSelection:
    """What the attention of every layer is worth.

    Args:
        baseline: Mean KL divergence from the teacher per token, in nats, with no attention at all.
        divergences: The same with the attention of one layer, for every layer.
        keep: How many layers keep their attention.

    Example:

    ```python
    from qwen3_next import LayerSelection

    selection = LayerSelection(baseline=2.0, divergences=(1.9, 1.2, 1.8, 1.5), keep=1)
    assert selection.kept == (1,)
    assert selection.hybrid_attention().should_use_deltanet(3)
    ```
    """

    baseline: float
    divergences: tuple[float, ...]
    keep: int

    def __post_init__(self) -> None:
        require(_FINITE, "baseline", self.baseline)
        require(_BY_LAYER, "divergences", self.divergences)
        require(integer(1, max(len(self.divergences) - 1, 1)), "keep", self.keep)

    @property
    def falls(self) -> tuple[float, ...]:
        """How much the attention of a layer takes off the divergence."""
        return tuple(self.baseline - value for value in self.divergences)

    @property
    def ranking(self) -> tuple[int, ...]:
        """The layers, that with the largest fall first."""
        return tuple(int(i) for i in np.argsort(self.divergences, kind="stable"))

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that keep their attention."""
        return tuple(sorted(self.ranking[: self.keep]))

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Kinds of the layers, for a configuration."""
        layers = range(len(self.divergences))
        return tuple(FULL if layer in self.kept else LINEAR for layer in layers)

    def hybrid_attention(self, **fields: Any) -> HybridAttentionConfig:
        """A `HybridAttentionConfig` with these layers, and other fields of it."""
        return HybridAttentionConfig(layer_types=self.layer_types, **fields)

    def plot(self, path: Any = None, ax: Any = None) -> Any:
        """Draws the falls with matplotlib, those of the kept layers in another colour.

        Args:
            path: File to write the figure to, or `None`.
            ax: Axes to draw on. `None` for a new figure, which is closed once it is written.

        Returns:
            The axes.
        """
        with axes_for(path, ax) as ax:
            layers = range(len(self.falls))
            colors = ["#c8553d" if layer in self.kept else "#33508c" for layer in layers]
            ax.bar(layers, self.falls, color=colors)
            ax.set(
                xlabel="layer",
                ylabel="fall of the KL divergence / nats",
                title=f"attention kept in layers {', '.join(map(str, self.kept))}",
            )
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.spines[["top", "right"]].set_visible(False)
        return ax

    def __str__(self) -> str:
        lines = ["layer  fall of KL"]
        for layer in self.ranking:
            mark = "  kept" if layer in self.kept else ""
            lines.append(f"{layer:5}  {self.falls[layer]:10.4f}{mark}")
        return "\n".join([*lines, f"from {self.baseline:.4f} nats per token with no attention"])


def select_attention_layers(
    teacher: Qwen3Next,
    student: Qwen3Next,
    token_ids: Any,
    keep: int,
    *,
    batch_size: int = 8,
    path: str | Path | None = None,
    progress: bool = True,
) -> LayerSelection:
    """Ranks the layers of a converted model by what their attention is worth.

    One program serves all layers: it runs both mixers everywhere and takes the one that is asked
    for.

    Args:
        teacher: The source of the student.
        student: A hybrid that was made of it with `allow_no_attention=True` and all layers
            converted, after `DistillationTrainer(stage="alignment")`.
        token_ids: `(N, T)`, or a dict with `"padding_mask"` and `"segment_ids"`, on which to
            compare.
        keep: Layers that keep their attention.
        batch_size: Rows per pass.
        path: A JSON file that holds what is known so far; a run that was stopped goes on there.
            `None` for none.
        progress: Whether to show a progress bar over layers.

    Raises:
        ValueError: models that are not such a pair, no tokens, or a file of another run.

    Example:

    ```python
    import numpy as np
    from qwen3_next import (
        HybridAttentionConfig, Qwen3Next, create_hybrid_from_qwen3, select_attention_layers
    )

    qwen3 = {
        "attention_type": "group_query_attention", "normalization_type": "rms_norm",
        "partial_rotary_factor": 1.0, "full_attention_interval": 1, "num_experts": 0,
    }
    teacher = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=3, head_dim=16, **qwen3
    )
    everywhere = HybridAttentionConfig((0,), pattern_period=1, allow_no_attention=True)
    student = create_hybrid_from_qwen3(teacher, everywhere)
    token_ids = np.random.default_rng(0).integers(0, 64, (4, 16))
    selection = select_attention_layers(teacher, student, token_ids, keep=1)
    hybrid = create_hybrid_from_qwen3(teacher, selection.hybrid_attention())
    ```
    """
    _check(teacher, student)
    check_sample("token_ids", token_ids, teacher.config, ("padding_mask", "segment_ids"))
    if path is not None:
        require(FILE, "path", path)
    layers = student.config.num_layers
    require(integer(1, layers - 1), "keep", keep)
    require(integer(1), "batch_size", batch_size)
    require(BOOLEAN, "progress", progress)
    run = None if path is None else _checksum(teacher, student, token_ids)
    known = _Known(path, run, layers)
    divergence = _divergence(teacher, student, token_ids, batch_size)
    bar = keras.utils.Progbar(layers + 1, unit_name="pass") if progress else None
    for restored in range(-1, layers):
        if restored not in known.found:
            known.add(restored, divergence(np.arange(layers) == restored))
        if bar is not None:
            bar.update(restored + 2)
    found = known.found
    return LayerSelection(found[-1], tuple(found[layer] for layer in range(layers)), keep)


def _check(teacher, student):
    for name, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, Qwen3Next) or model.config.etd is not None:
            raise ValueError(
                f"`{name}` must be a Qwen3Next without a think loop. Received: {name}={model!r}"
            )
    kinds = teacher.config.layer_types, student.config.layer_types
    if set(kinds[0]) != {FULL} or kinds[1] != (LINEAR,) * len(kinds[0]):
        raise ValueError(
            "`teacher` must have attention in all layers and `student` in none, as many of them. "
            f"Received: teacher.config.layer_types={kinds[0]}, "
            f"student.config.layer_types={kinds[1]}"
        )
    sizes = [(m.config.vocab_size, m.config.hidden_size) for m in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "`teacher` and `student` must have the same `vocab_size` and `hidden_size`. "
            f"Received: {sizes[0]} and {sizes[1]}"
        )


class _Pair:
    """Two models as `compile_with_weights` sees one."""

    def __init__(self, *models):
        self.models, self.name = models, " and ".join(model.name for model in models)

    @property
    def variables(self):
        return [variable for model in self.models for variable in model.variables]


def _divergence(teacher, student, token_ids, batch_size):
    """From which layers have attention `(L,)` to the mean divergence per real token."""

    def batch(inputs, restored):
        inputs = unpack(inputs)
        expected = teacher.backbone(inputs.given())
        hidden = _mixed_pass(teacher, student, inputs, restored)
        width = hidden.shape[-1]
        mask = inputs.padding_mask
        losses = linear_kl_divergence(
            ops.reshape(hidden, (-1, width)),
            student.head_kernel(),
            ops.reshape(expected, (-1, width)),
            teacher.head_kernel(),
            mask=None if mask is None else ops.reshape(mask, (-1,)),
        )
        count = ops.size(losses) if mask is None else ops.sum(ops.cast(mask, "int32"))
        return ops.sum(losses), count

    run = compile_with_weights(_Pair(teacher, student), batch)
    given = {name: np.asarray(value) for name, value in unpack(token_ids).given().items()}
    rows = len(given["token_ids"])

    def mean(restored):
        total, count = 0.0, 0
        for start in range(0, rows, batch_size):
            part = {name: value[start : start + batch_size] for name, value in given.items()}
            losses, tokens = run(keras.tree.map_structure(ops.convert_to_tensor, part), restored)
            total, count = total + float(losses), count + int(tokens)
        return total / count

    return mean


def _mixed_pass(teacher, student, inputs, restored):
    """Hidden states of the student with the teacher's mixers where `restored` says so."""
    hidden = student.backbone.embed_tokens(inputs.token_ids)
    pairs = zip(teacher.backbone.decoder_layers, student.backbone.decoder_layers, strict=True)
    for index, (old, new) in enumerate(pairs):
        mixed = ops.where(
            restored[index], mixer_output(old, hidden, inputs), mixer_output(new, hidden, inputs)
        )
        hidden = hidden + ops.cast(mixed, hidden.dtype)
        routed = isinstance(new.mlp, SparseMoE)
        options = {"padding_mask": inputs.padding_mask} if routed else {}
        fed = new.mlp(new.post_attention_layernorm(hidden), **options)
        hidden = hidden + ops.cast(fed, hidden.dtype)
    return student.backbone.norm(hidden)


def _checksum(teacher, student, inputs):
    """Tells runs of other models or tokens apart."""
    given = unpack(inputs).given()
    given = given if isinstance(given, dict) else {"token_ids": given}
    configs = [model.config.to_dict() for model in (teacher, student)]
    return checksum([*teacher.weights, *student.weights, *given.values()], configs, [*given])


class _Known:
    """Divergences that were found so far, in a file if there is one; -1 stands for no layer."""

    def __init__(self, path, run, layers):
        self.path = None if path is None else Path(path)
        self.run, self.found = run, {}
        if self.path is None or not self.path.exists():
            return
        saved = read_json(self.path)
        numbers = {str(number): number for number in range(-1, layers)}
        is_known = isinstance(saved, dict) and isinstance(saved.get("divergences"), dict)
        is_known = is_known and all(
            key in numbers and isinstance(value, int | float)
            for key, value in saved["divergences"].items()
        )
        if not is_known or saved.get("checksum") != run:
            raise ValueError(
                "`path` must be a file of the same models and tokens, or none. "
                f"Received: path={str(path)!r}"
            )
        self.found = {numbers[key]: float(v) for key, v in saved["divergences"].items()}

    def add(self, number, divergence):
        self.found[number] = divergence
        if self.path is None:
            return
        with replaced(self.path) as temporary:
            saved = {"checksum": self.run, "divergences": self.found}
            temporary.write_text(json.dumps(saved) + "\n", encoding="utf-8")
