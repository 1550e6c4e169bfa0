"""Presets: directories that hold the configuration and the weights of a model.

Two layouts are read. The published one has a `config.json` with a `model_type`. Our own has a
`config.json` with the class and what its `get_config` gives, and the weights under the paths of
the variables; it also holds what no published model type can express.

A configuration is compared with the headers of the weight files before anything is allocated.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from qwen3_next.checkpoints.coverage import listed
from qwen3_next.checkpoints.hugging_face_config import check_model_type, config_from_hugging_face
from qwen3_next.checkpoints.interchange import (
    Source,
    Tensors,
    load,
    plan_loading,
    published_sources,
    table_of,
)
from qwen3_next.checkpoints.safetensors_files import COUNTER_DTYPES, Checkpoint, TensorSpec, write
from qwen3_next.checkpoints.shared_saving import save_once
from qwen3_next.checkpoints.staging import files_of, read_json, staged
from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, PATH, Rule, integer, require, shown
from qwen3_next.layers.initializers import Normal, weights_to_be_loaded
from qwen3_next.layers.ops.backend.shards import set_values
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.models.trainable_layers import FIELD
from qwen3_next.models.weight_layouts import SAME
from qwen3_next.models.weight_table import weight_table

HUB = "hf://"
_COUNTERS = {str(dtype) for dtype in COUNTER_DTYPES.values()}
_LABELS = Rule(
    "None or an object of labels", lambda value: value is None or isinstance(value, dict)
)
# What is listed item by item, and so must be no larger than the files before it is listed.
COUNTS = ("num_hidden_layers", "num_layers", "num_experts", "num_local_experts")


class Described(NamedTuple):
    """The model that a preset describes, before it is built.

    Attributes:
        cls: Its class.
        config: Its configuration.
        arguments: Other arguments of the class.
    """

    cls: Any
    config: Qwen3NextConfig
    arguments: dict[str, Any]


class PresetWeights(NamedTuple):
    """The weights of a preset, on the disk.

    Attributes:
        config: Configuration of its model.
        paths: Paths of the weights that it holds.
        read: From a path to the array of the weight.
        unused: For every tensor that the model does not need, the reason.
    """

    config: Qwen3NextConfig
    paths: tuple[str, ...]
    read: Callable[[str], np.ndarray]
    unused: dict[str, str]


def from_preset(
    cls: Any, preset: str | Path, *, dtype: Any = None, progress: bool = True, **options: Any
) -> Any:
    """Builds a model of class `cls` from a preset; see `Task.from_preset`."""
    require(BOOLEAN, "progress", progress)
    with _opened(cls, preset, dtype, options) as (described, checkpoint, plan):
        with weights_to_be_loaded():
            model = described.cls(described.config, **described.arguments)
        report = load(model, checkpoint, plan, progress)
    _draw_initialised(model, report)
    model.coverage_report = report
    if progress:
        print(f"{type(model).__name__} from {preset}: {report}")
    return model


@contextlib.contextmanager
def preset_weights(cls: Any, preset: str | Path) -> Iterator[PresetWeights]:
    """Configuration and weights of a preset, one read at a time, without building its model.

    Args:
        cls: `Qwen3Next` or `Qwen3NextClassifier`.
        preset: A directory, or `"hf://owner/name"`.

    Raises:
        ValueError: as `from_preset`, before anything is read.
    """
    with _opened(cls, preset, None, {}) as (described, checkpoint, plan):
        sources = {source.path: source for source in plan.sources}

        def read(path):
            source = sources[path]
            return source.layout.load(Tensors(checkpoint, source.names))

        yield PresetWeights(described.config, tuple(sources), read, plan.unused)


@contextlib.contextmanager
def _opened(cls, preset, dtype, options):
    """What a preset describes, its open weight files, and what is to be read of them."""
    directory = _directory(preset)
    saved = _read_config(directory)
    own = {name: options.pop(name) for name in cls.constructor_options() if name in options}
    is_own = "registered_name" in saved
    saved_class = _saved_class(saved) if is_own else check_model_type(saved)
    with Checkpoint(directory) as checkpoint:
        _check_counts(saved["config"] if is_own else saved, checkpoint)
        if is_own:
            cls, config, arguments = _describe_own(cls, saved_class, saved["config"])
        else:
            cls, config, arguments = _describe_published(cls, saved)
        arguments |= own if dtype is None else {**own, "dtype": dtype}
        if "num_labels" in cls.constructor_options():
            require(integer(1), "num_labels", arguments.get("num_labels"))
        config = config.replace(**options)
        if "freeze_backbone" not in own and not config.learns_beside_backbone:
            arguments.pop("freeze_backbone", None)  # what was to learn beside it was taken away
        rows = weight_table(config, arguments.get("num_labels"))
        if is_own:
            sources = [Source(r.path, (r.path,), r.shape, SAME, r.optional) for r in rows]
        else:
            sources = published_sources(rows, checkpoint)
        plan = plan_loading(checkpoint, sources, arguments.get("num_labels"))
        yield Described(cls, config, arguments), checkpoint, plan


def preset_config(preset: str | Path) -> Qwen3NextConfig:
    """The configuration of a preset, without its weights."""
    saved = _read_config(_directory(preset))
    if "registered_name" in saved:
        cls = _saved_class(saved)
        return _describe_own(cls, cls, saved["config"]).config
    return Qwen3NextConfig.from_dict(config_from_hugging_face(saved))


def save_to_preset(model: Any, directory: str | Path, max_shard_size: str | int = "5GB") -> None:
    """Writes a model to a directory in our own layout; see `Task.save_to_preset`."""
    config = model.get_config()
    del config[FIELD]  # what learns is the affair of a training run, and of its `.keras` files
    name = keras.saving.get_registered_name(type(model))
    saved = {"registered_name": name, "config": config}
    _check_readable(model, saved)
    specs = [
        TensorSpec(variable.path, tuple(variable.shape), np.dtype(variable.dtype))
        for variable in model.weights
    ]

    def save(arrays):
        arrays = (
            array.astype(spec.dtype, copy=False) for array, spec in zip(arrays, specs, strict=True)
        )
        with staged(directory) as folder:
            write(folder, specs, arrays, max_shard_size)
            text = json.dumps(saved, indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")

    save_once(save, model.weights)


def _check_readable(model, saved):
    """Raises `ValueError` for a model that `from_preset` would refuse or make into another."""
    cls = _saved_class(saved)
    if cls is not type(model):
        raise ValueError(
            "The class of a preset must be registered with Keras. "
            f"Received: a model of class {type(model).__name__}"
        )
    config = _describe_own(cls, cls, saved["config"]).config
    rows = {row.path: row.shape for row in weight_table(config, getattr(model, "num_labels", None))}
    found = {v.path: tuple(v.shape) for v in model.weights if v.dtype not in _COUNTERS}
    if config != model.config or found != rows:
        differing = sorted(path for path, _ in rows.items() ^ found.items())
        raise ValueError(
            "A preset holds the variables that its configuration asks for, nothing that was "
            "added (by LoRA, or in a class of one's own) or taken away. "
            f"Received: {listed(differing)}"
        )


def _directory(preset):
    """The local directory of a preset, downloaded if it is on the hub."""
    require(PATH, "preset", preset)
    if not str(preset).startswith(HUB):
        if not os.path.isdir(preset):
            raise ValueError(
                f"`preset` must be a directory or begin with {HUB!r}. Received: {preset=}"
            )
        return Path(preset)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            'Presets on the hub need huggingface_hub: pip install "qwen3-next-keras[hf]". '
            f"Received: {preset=}"
        ) from error
    name = str(preset).removeprefix(HUB)
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def _read_config(directory):
    path = files_of(directory).get("config.json")
    if path is None:
        raise ValueError(f"{directory} is no preset: it holds no config.json.")
    saved = read_json(path)
    if not isinstance(saved, dict) or not {"model_type", "registered_name"} & set(saved):
        raise ValueError(f"{path} must name a `model_type` or, as saved here, a `registered_name`.")
    return saved


def _describe_published(cls, saved):
    arguments = {}
    if "num_labels" in cls.constructor_options():
        require(_LABELS, "id2label", saved.get("id2label"))
        if saved.get("id2label") is not None:
            arguments["num_labels"] = len(saved["id2label"])
        if saved.get("pad_token_id") is not None:
            arguments["pad_token_id"] = saved["pad_token_id"]
    config = Qwen3NextConfig.from_dict(config_from_hugging_face(saved))
    return Described(cls, config, arguments)


def _saved_class(saved):
    """The class of a preset of one's own, whose configuration is complete."""
    name = saved["registered_name"]
    saved_class = keras.saving.get_registered_object(name) if isinstance(name, str) else None
    if not (isinstance(saved_class, type) and issubclass(saved_class, ConfiguredModel)):
        raise ValueError(
            "The class of a preset must be a model that is registered with Keras: import it "
            f"first. Received: registered_name={shown(name)}"
        )
    fields = saved.get("config")
    missing = Qwen3NextConfig.missing_from(fields) if isinstance(fields, dict) else "any field"
    if missing:
        raise ValueError(
            f"A saved configuration holds every field. Received: one without {missing}"
        )
    return saved_class


def _describe_own(cls, saved_class, fields):
    """A model of the saved class if that is a `cls`, else a `cls` with the saved configuration."""
    if issubclass(saved_class, cls):
        cls = saved_class
    known = {field.name for field in dataclasses.fields(Qwen3NextConfig)}
    others = {*saved_class.constructor_options(), "name", "dtype"} - known
    config = Qwen3NextConfig.from_dict({k: v for k, v in fields.items() if k not in others})
    wanted = others & {*cls.constructor_options(), "name", "dtype"}
    arguments = {name: fields[name] for name in wanted if name in fields}
    return Described(cls, config, arguments)


def _check_counts(fields, checkpoint):
    most = max(len(checkpoint.names), checkpoint.largest_dim)
    mtp = fields.get("mtp")
    given = [(name, fields.get(name)) for name in COUNTS]
    if isinstance(mtp, dict):
        given.append(("num_predict_tokens", mtp.get("num_predict_tokens")))
    for name, value in given:
        if isinstance(value, int) and value > most:
            raise ValueError(
                f"`{name}` must be at most {most}, as the weights in {checkpoint.directory} have "
                f"no larger dim nor number of tensors. Received: {name}={value}"
            )


def _draw_initialised(model, report):
    """Initial values for weights that the checkpoint did not have: they were made as zeros."""
    optional = {row.path for row in table_of(model) if row.optional and not row.zeros}
    for variable in model.weights:
        if variable.path in optional and variable.path in report.initialised:
            draw = Normal(model.config.initializer_range)
            set_values(variable, draw.on_host(tuple(variable.shape), variable.dtype))
