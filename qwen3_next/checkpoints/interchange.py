"""Moves weights between models and published checkpoints, tensor by tensor, with a full account.

Which tensors make up a variable stands in `models.weight_table`. A checkpoint is compared with it
by its headers alone, so that one that does not fit is refused before a variable changes; then one
variable at a time is read, laid out and assigned. Peak memory is the model and one variable.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from qwen3_next.checkpoints.coverage import CoverageReport, listed
from qwen3_next.checkpoints.hugging_face_config import config_to_hugging_face
from qwen3_next.checkpoints.safetensors_files import (
    COUNTER_DTYPES,
    Checkpoint,
    TensorSpec,
    write,
)
from qwen3_next.checkpoints.shared_saving import save_once
from qwen3_next.checkpoints.staging import staged
from qwen3_next.config.validation import BOOLEAN, Rule, one_of, require
from qwen3_next.layers.ops.backend.shards import set_values
from qwen3_next.models.weight_layouts import SAME, Layout
from qwen3_next.models.weight_rows import Weight
from qwen3_next.models.weight_table import unneeded_tensors, weight_table

TIED = "tied to another weight, which has the same values"
_EXPORTED = Rule(
    "None, 'float32', 'bfloat16' or 'float16'",
    lambda dtype: dtype is None or one_of(("float32", "bfloat16", "float16")).fits(dtype),
)


class Source(NamedTuple):
    """Where a variable comes from.

    Attributes:
        path: Path of the variable.
        names: The tensors it is made of.
        shape: Shape of each of them.
        layout: How they make it up.
        optional: Whether a checkpoint may lack them.
        tied: Tensors that may be there as well, with the values of the first of `names`.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    optional: bool = False
    tied: tuple[str, ...] = ()


class Plan(NamedTuple):
    """A checkpoint that fits, compared by its headers alone.

    Attributes:
        sources: What is to be read.
        absent: Paths of optional variables that the checkpoint lacks.
        unused: For every tensor that is not needed, the reason.
    """

    sources: list[Source]
    absent: tuple[str, ...]
    unused: dict[str, str]


def table_of(model: Any) -> list[Weight]:
    """The weight table of a model."""
    return weight_table(model.config, _num_labels(model))


def require_no_other_weights(name: str, model: Any) -> None:
    """Raises `ValueError` for a model with weights that its table, and so a copy, would lack."""
    counters = {*map(str, COUNTER_DTYPES.values()), "uint32"}
    known = {row.path for row in table_of(model)}
    others = [v.path for v in model.weights if v.path not in known and v.dtype not in counters]
    if others:
        raise ValueError(
            f"`{name}` must have the weights of its configuration and no others, such as those "
            f"that `enable_lora` adds. Received: {listed(others)}"
        )


def load_hugging_face(model: Any, directory: str | Path, progress: bool = True) -> CoverageReport:
    """Loads a published checkpoint into a model that has its configuration.

    Args:
        model: A `Qwen3Next` or `Qwen3NextClassifier`.
        directory: Holds `model.safetensors`, or shards and their index.
        progress: Whether to show a progress bar.

    Returns:
        A `CoverageReport`.

    Raises:
        ValueError: a damaged file, or tensors that are missing, unexpected or misshapen. The
            model then has the weights it had.
    """
    require(BOOLEAN, "progress", progress)
    with Checkpoint(directory) as checkpoint:
        sources = published_sources(table_of(model), checkpoint)
        plan = plan_loading(checkpoint, sources, _num_labels(model))
        return load(model, checkpoint, plan, progress)


def published_sources(rows: list[Weight], checkpoint: Checkpoint) -> list[Source]:
    """The published tensors of every weight, experts in one tensor or in one each."""
    sources = []
    for row in rows:
        names, shape, layout = row.tensors, row.tensor_shape, row.layout
        if row.fused is not None and row.fused.tensor in checkpoint:
            names, shape, layout = (row.fused.tensor,), row.fused.shape, row.fused.layout
        sources.append(Source(row.path, names, shape, layout, row.optional, row.tied))
    return sources


def plan_loading(
    checkpoint: Checkpoint, sources: list[Source], num_labels: int | None = None
) -> Plan:
    """Compares a checkpoint with what a model needs, before there is a model.

    Args:
        checkpoint: An open `Checkpoint`.
        sources: A list of `Source`, all of which the checkpoint must have, the optional ones
            excepted.
        num_labels: Number of classes of a classifier, `None` for a language model.

    Raises:
        ValueError: tensors that are missing, unexpected, misshapen or of a wrong type.
    """
    found = [s for s in sources if not s.optional or any(name in checkpoint for name in s.names)]
    absent = {source.path for source in sources} - {source.path for source in found}
    unused, unexpected = _left_over(checkpoint, found, num_labels)
    _check(checkpoint, found, unexpected)
    _check_tied(checkpoint, found)
    return Plan(found, tuple(sorted(absent)), unused)


def load(model: Any, checkpoint: Checkpoint, plan: Plan, progress: bool = True) -> CoverageReport:
    """Assigns every variable of a model from its tensors, one after the other.

    Counters are read from a preset of one's own; published checkpoints have none.
    """
    variables = {variable.path: variable for variable in model.weights}
    bar = keras.utils.Progbar(len(plan.sources), unit_name="weight") if progress else None
    for source in plan.sources:
        variable = variables.pop(source.path)
        tensors = Tensors(checkpoint, source.names, np.dtype(variable.dtype))
        set_values(variable, source.layout.load(tensors))
        if bar is not None:
            bar.add(1)
    counters = [path for path in variables if path in checkpoint]
    for path in counters:
        set_values(variables.pop(path), checkpoint.read(path))
    copied = [source.path for source in plan.sources if source.layout is SAME]
    return CoverageReport(
        copied=(*copied, *counters),
        transformed=tuple(s.path for s in plan.sources if s.layout is not SAME),
        initialised=(*plan.absent, *(path for path in variables if path not in plan.absent)),
        unused=plan.unused,
    )


def export_hugging_face(
    model: Any,
    directory: str | Path,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Writes `config.json` and the weights as transformers reads them, one tensor per expert.

    Files of that name in `directory` are replaced once everything is written.

    Args:
        model: A `Qwen3Next` or `Qwen3NextClassifier`.
        directory: Where to write.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`. `None` for the dtype of each variable.
        max_shard_size: Size of a file, a string such as `"5GB"` or a number of bytes.

    Raises:
        ValueError: a configuration or variables that the published format cannot hold.
    """
    fields = config_to_hugging_face(model.config)
    rows, variables = table_of(model), _variables(model)
    extra = sorted(set(variables) - {row.path for row in rows})
    if extra:
        raise ValueError(f"The published format has no place for the variables {listed(extra)}")
    require(_EXPORTED, "dtype", dtype)
    dtypes = {row.path: np.dtype(dtype or variables[row.path].dtype) for row in rows}
    fields["torch_dtype"] = dtypes[rows[0].path].name
    num_labels = _num_labels(model)
    if num_labels is not None:
        fields |= _classifier_fields(fields, num_labels, model.pad_token_id)
    specs = [
        TensorSpec(name, row.tensor_shape, dtypes[row.path]) for row in rows for name in row.tensors
    ]

    def save(arrays):
        tensors = (
            tensor.astype(dtypes[row.path], copy=False)
            for row, array in zip(rows, arrays, strict=True)
            for tensor in row.layout.save(array)
        )
        with staged(directory) as folder:
            write(folder, specs, tensors, max_shard_size)
            text = json.dumps(fields, indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")

    save_once(save, [variables[row.path] for row in rows])


def _num_labels(model):
    return getattr(model, "num_labels", None)


def _variables(model):
    """All weights by path, but for counters, which no published checkpoint has."""
    return {v.path: v for v in model.weights if "int" not in v.dtype}


def _classifier_fields(fields, num_labels, pad_token_id):
    labels = [f"LABEL_{i}" for i in range(num_labels)]
    causal = fields["architectures"][0]
    return {
        "architectures": [causal.replace("ForCausalLM", "ForSequenceClassification")],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        # Without it transformers takes no more than one row at a time.
        "pad_token_id": pad_token_id,
    }


class Tensors(Sequence):
    """Tensors that are read when a layout asks for them.

    Args:
        checkpoint: An open `Checkpoint`.
        names: Their names.
        dtype: What to cast them to, `None` for what they are.
    """

    def __init__(self, checkpoint, names, dtype=None):
        self.checkpoint, self.names, self.dtype = checkpoint, names, dtype

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        tensor = self.checkpoint.read(self.names[index])
        return tensor if self.dtype is None else tensor.astype(self.dtype, copy=False)


def _left_over(checkpoint, sources, num_labels):
    """Tensors that no source asks for: with a good reason, by name, and without one, a list."""
    used = {name for source in sources for name in source.names}
    tied = {name for source in sources for name in source.tied}
    kinds = unneeded_tensors(num_labels)
    unused, unexpected = {}, []
    for name in checkpoint.names:
        if name in used or checkpoint.is_counter(name):
            continue
        dotted = name.replace("/", ".")
        reasons = [kind.reason for kind in kinds if kind.matches(dotted)]
        if name in tied:
            reasons = [TIED]
        if reasons:
            unused[name] = reasons[0]
        else:
            unexpected.append(name)
    return unused, unexpected


def _check(checkpoint, sources, unexpected):
    missing, misshapen = [], []
    for source in sources:
        for name in source.names:
            if name not in checkpoint:
                missing.append(name)
            elif checkpoint.shape(name) != tuple(source.shape):
                misshapen.append(
                    f"{name} {checkpoint.shape(name)} instead of {tuple(source.shape)}"
                )
            else:
                checkpoint.dtype(name)
    found = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{len(names)} {kind}: {listed(names)}" for kind, names in found.items() if names]
    if problems:
        raise ValueError(
            f"The checkpoint in {checkpoint.directory} does not fit the model. Tensors that are "
            + "; ".join(problems)
        )


def _check_tied(checkpoint, sources):
    for source in sources:
        for name in source.tied:
            if name not in checkpoint:
                continue
            if not np.array_equal(checkpoint.read(name), checkpoint.read(source.names[0])):
                raise ValueError(
                    f"With `tie_word_embeddings` {name} must equal {source.names[0]}, but they "
                    f"differ. Received: the checkpoint in {checkpoint.directory}"
                )
