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
    DTYPES,
    Checkpoint,
    TensorSpec,
    write,
)
from qwen3_next.checkpoints.staging import staged
from qwen3_next.models.weight_layouts import SAME, Layout
from qwen3_next.models.weight_table import Weight, unneeded_tensors, weight_table

TIED = "tied to another weight, which has the same values"


class Source(NamedTuple):
    """Where a variable comes from.

    Attributes:
        variable: The variable.
        names: The tensors it is made of.
        shape: Shape of each of them.
        layout: How they make it up.
        optional: Whether a checkpoint may lack them.
        tied: Tensors that may be there as well, with the values of the first of `names`.
    """

    variable: Any
    names: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    optional: bool = False
    tied: tuple[str, ...] = ()

    def is_absent(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint has none of the tensors, and may."""
        return self.optional and not any(name in checkpoint for name in self.names)


def table_of(model: Any) -> list[Weight]:
    """The weight table of a model."""
    return weight_table(model.config, _num_labels(model))


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
    variables = _variables(model)
    with Checkpoint(directory) as checkpoint:
        sources = []
        for row in table_of(model):
            names, shape, layout = row.tensors, row.tensor_shape, row.layout
            if row.fused is not None and row.fused.tensor in checkpoint:
                names, shape, layout = (row.fused.tensor,), row.fused.shape, row.fused.layout
            variable = variables.pop(row.path)
            sources.append(Source(variable, names, shape, layout, row.optional, row.tied))
        return load_sources(model, checkpoint, sources, tuple(variables), progress)


def load_sources(
    model: Any,
    checkpoint: Checkpoint,
    sources: list[Source],
    others: tuple[str, ...] = (),
    progress: bool = True,
) -> CoverageReport:
    """Assigns every variable from its tensors.

    Args:
        model: The model of the variables.
        checkpoint: An open `Checkpoint`.
        sources: A list of `Source`, all of which the checkpoint must have, the optional ones
            excepted.
        others: Paths of variables that no checkpoint of this kind has.
        progress: Whether to show a progress bar.

    Returns:
        A `CoverageReport`.

    Raises:
        ValueError: tensors that are missing, unexpected or misshapen, before anything is loaded.
    """
    absent = [source for source in sources if source.is_absent(checkpoint)]
    sources = [source for source in sources if not source.is_absent(checkpoint)]
    unused, unexpected = _left_over(model, checkpoint, sources)
    _check(checkpoint, sources, unexpected)
    _check_tied(checkpoint, sources)
    bar = keras.utils.Progbar(len(sources), unit_name="weight") if progress else None
    for source in sources:
        dtype = np.dtype(source.variable.dtype)
        source.variable.assign(source.layout.load(_Tensors(checkpoint, source.names, dtype)))
        if bar is not None:
            bar.add(1)
    return CoverageReport(
        copied=tuple(s.variable.path for s in sources if s.layout is SAME),
        transformed=tuple(s.variable.path for s in sources if s.layout is not SAME),
        initialised=(*(source.variable.path for source in absent), *others),
        unused=unused,
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
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(
            f"`dtype` must be None, 'float32', 'bfloat16' or 'float16'. Received: {dtype=}"
        )
    dtypes = {row.path: np.dtype(dtype or variables[row.path].dtype) for row in rows}
    fields["torch_dtype"] = dtypes[rows[0].path].name
    num_labels = _num_labels(model)
    if num_labels is not None:
        fields |= _classifier_fields(fields, num_labels)
    specs = [
        TensorSpec(name, row.tensor_shape, dtypes[row.path]) for row in rows for name in row.tensors
    ]

    def arrays():
        for row in rows:
            array = keras.ops.convert_to_numpy(variables[row.path].value)
            for tensor in row.layout.save(array):
                yield tensor.astype(dtypes[row.path], copy=False)

    with staged(directory) as folder:
        write(folder, specs, arrays(), max_shard_size)
        text = json.dumps(fields, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _num_labels(model):
    return getattr(model, "num_labels", None)


def _variables(model):
    """All weights by path, but for counters, which no published checkpoint has."""
    return {v.path: v for v in model.weights if "int" not in v.dtype}


def _classifier_fields(fields, num_labels):
    labels = [f"LABEL_{i}" for i in range(num_labels)]
    causal = fields["architectures"][0]
    return {
        "architectures": [causal.replace("ForCausalLM", "ForSequenceClassification")],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


class _Tensors(Sequence):
    """Tensors that are read, in the dtype of their variable, when a layout asks for them."""

    def __init__(self, checkpoint, names, dtype):
        self.checkpoint, self.names, self.dtype = checkpoint, names, dtype

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.checkpoint.read(self.names[index]).astype(self.dtype, copy=False)


def _left_over(model, checkpoint, sources):
    """Tensors that no source asks for: with a good reason, by name, and without one, a list."""
    used = {name for source in sources for name in source.names}
    tied = {name for source in sources for name in source.tied}
    kinds = unneeded_tensors(_num_labels(model))
    unused, unexpected = {}, []
    for name in checkpoint.names:
        if name in used:
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
                is_counter = "int" in source.variable.dtype
                checkpoint.dtype(name, COUNTER_DTYPES if is_counter else DTYPES)
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
