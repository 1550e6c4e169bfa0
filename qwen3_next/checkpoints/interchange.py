"""Moves weights between models and published checkpoints, tensor by tensor, with a full account.

Which tensors make up a variable stands in `weights.weight_table`. A checkpoint is compared with it
by its headers alone, so that one that does not fit is refused before a variable changes; then one
variable at a time is read, laid out and assigned. Peak memory is the model and one variable.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np

from qwen3_next.checkpoints.hugging_face_config import config_to_hugging_face
from qwen3_next.checkpoints.safetensors_files import Checkpoint, TensorSpec, staged, write
from qwen3_next.models.weight_table import SAME, Layout, weight_table

MOST_NAMES = 10
HEAD = "score/kernel"
UNUSED_HEAD = "vocabulary head, not used by a classifier"
TIED_HEAD = "vocabulary head, tied to the embedding"


@dataclass(frozen=True)
class CoverageReport:
    """What became of the tensors of a checkpoint and the variables of a model.

    Args:
        copied: Paths of variables that are a tensor as it stands.
        transformed: Paths of variables that are tensors laid out anew.
        initialised: Paths of variables that the checkpoint has nothing for, which keep their
            values.
        unused: For every tensor that was not needed, the reason.
    """

    copied: tuple
    transformed: tuple
    initialised: tuple
    unused: dict

    def __str__(self):
        lines = [f"{len(self.copied)} copied, {len(self.transformed)} transformed"]
        for name in ("initialised", "unused"):
            names = getattr(self, name)
            lines.append(f"{len(names)} {name}" + (f": {_listed(names)}" if names else ""))
        reasons = sorted(set(self.unused.values()))
        return ", ".join(lines) + (f" ({'; '.join(reasons)})" if reasons else "")


class Source(NamedTuple):
    """Where a variable comes from: tensors of one shape and the layout they are put in."""

    variable: object
    names: tuple
    shape: tuple
    layout: Layout

    def found(self, checkpoint):
        """Whether a checkpoint has any of the tensors."""
        return any(name in checkpoint for name in self.names)


def load_hugging_face(model, directory, progress=True):
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
        for row in _table(model):
            names, shape, layout = row.tensors, row.tensor_shape, row.layout
            if row.fused is not None and row.fused[0] in checkpoint:
                names, shape, layout = (row.fused[0],), *row.fused[1:]
            sources.append(Source(variables.pop(row.path), names, shape, layout))
        return load_sources(checkpoint, sources, tuple(variables), progress)


def load_sources(checkpoint, sources, others=(), progress=True):
    """Assigns every variable from its tensors.

    Args:
        checkpoint: An open `Checkpoint`.
        sources: A list of `Source`, all of which the checkpoint must have, but for a
            classifier's head.
        others: Paths of variables that no checkpoint of this kind has.
        progress: Whether to show a progress bar.

    Returns:
        A `CoverageReport`.

    Raises:
        ValueError: tensors that are missing, unexpected or misshapen, before anything is loaded.
    """
    is_classifier = any(source.variable.path == HEAD for source in sources)
    new = [s.variable.path for s in sources if s.variable.path == HEAD and not s.found(checkpoint)]
    sources = [source for source in sources if source.variable.path not in new]
    used = {name for source in sources for name in source.names}
    reasons = {name: _reason(name, is_classifier) for name in checkpoint.names if name not in used}
    _check(checkpoint, sources, [name for name, reason in reasons.items() if reason is None])
    _check_tied_head(checkpoint, sources, reasons)
    bar = keras.utils.Progbar(len(sources), unit_name="weight") if progress else None
    for source in sources:
        dtype = np.dtype(source.variable.dtype)
        source.variable.assign(source.layout.load(_Tensors(checkpoint, source.names, dtype)))
        if bar is not None:
            bar.add(1)
    return CoverageReport(
        copied=tuple(s.variable.path for s in sources if s.layout is SAME),
        transformed=tuple(s.variable.path for s in sources if s.layout is not SAME),
        initialised=(*new, *others),
        unused=reasons,
    )


def export_hugging_face(model, directory, dtype=None, max_shard_size="5GB"):
    """Writes `config.json` and the weights as transformers reads them, one tensor an expert.

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
    rows, variables = _table(model), _variables(model)
    extra = sorted(set(variables) - {row.path for row in rows})
    if extra:
        raise ValueError(f"The published format has no place for the variables {_listed(extra)}")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(
            f"`dtype` must be None, 'float32', 'bfloat16' or 'float16'. Received: {dtype=}"
        )
    dtypes = {row.path: np.dtype(dtype or variables[row.path].dtype) for row in rows}
    fields["torch_dtype"] = dtypes[rows[0].path].name
    if getattr(model, "num_labels", None) is not None:
        fields |= _classifier_fields(fields, model.num_labels)
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


def _table(model):
    return weight_table(model.config, getattr(model, "num_labels", None))


def _variables(model):
    """All weights by path, but for counters, which no checkpoint has."""
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


def _reason(name, is_classifier):
    """Why a tensor that nothing asks for may be left over; `None` if there is no good reason."""
    name = name.replace("/", ".")
    if name.startswith("mtp."):
        return "multi-token prediction head, used with `mtp=MTPConfig()`"
    if name.endswith(".rotary_emb.inv_freq"):
        return "rotary frequencies, computed"
    if name in ("lm_head.weight", "lm_head.kernel"):
        return UNUSED_HEAD if is_classifier else TIED_HEAD
    return None


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
    problems = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in found.items() if names]
    if problems:
        raise ValueError(
            f"The checkpoint in {checkpoint.directory} does not fit the model. Tensors that are "
            + "; ".join(problems)
        )


def _listed(names):
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _check_tied_head(checkpoint, sources, reasons):
    for head, reason in reasons.items():
        if reason != TIED_HEAD:
            continue
        embedding = sources[0].names[0]
        if not np.array_equal(checkpoint.read(head), checkpoint.read(embedding)):
            raise ValueError(
                f"With `tie_word_embeddings` {head} must equal {embedding}, but they differ. "
                f"Received: the checkpoint in {checkpoint.directory}"
            )
