"""Presets: directories that hold the configuration and the weights of a model.

Two layouts are read. The published one has a `config.json` with a `model_type`. Our own has a
`config.json` with the class and what its `get_config` gives, and the weights under the paths of
the variables; it also holds what no published model type can express.
"""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np

from qwen3_next.checkpoints.hugging_face_config import config_from_hugging_face
from qwen3_next.checkpoints.interchange import Source, load_hugging_face, load_sources, table_of
from qwen3_next.checkpoints.safetensors_files import Checkpoint, TensorSpec, write
from qwen3_next.checkpoints.staging import files_of, staged
from qwen3_next.config import Qwen3NextConfig
from qwen3_next.layers.initializers import Normal, weights_to_be_loaded
from qwen3_next.models.weight_layouts import SAME

HUB = "hf://"


def from_preset(
    cls: Any, preset: str | Path, *, dtype: Any = None, progress: bool = True, **options: Any
) -> Any:
    """Builds a model of class `cls` from a preset; see `Task.from_preset`."""
    directory = _directory(preset)
    saved = _read_config(directory)
    own = "registered_name" in saved
    with weights_to_be_loaded():
        model = (_from_own if own else _from_published)(cls, saved, dtype, options)
    if own:
        with Checkpoint(directory) as checkpoint:
            report = load_sources(model, checkpoint, _own_sources(model), progress=progress)
    else:
        report = load_hugging_face(model, directory, progress)
    _draw_initialised(model, report)
    model.coverage_report = report
    if progress:
        print(f"{type(model).__name__} from {preset}: {report}")
    return model


def save_to_preset(model: Any, directory: str | Path, max_shard_size: str | int = "5GB") -> None:
    """Writes a model to a directory in our own layout; see `Task.save_to_preset`."""
    saved = {
        "registered_name": keras.saving.get_registered_name(type(model)),
        "config": model.get_config(),
    }
    specs = [
        TensorSpec(variable.path, tuple(variable.shape), np.dtype(variable.dtype))
        for variable in model.weights
    ]
    arrays = (keras.ops.convert_to_numpy(variable.value) for variable in model.weights)
    arrays = (
        array.astype(spec.dtype, copy=False) for array, spec in zip(arrays, specs, strict=True)
    )
    with staged(directory) as folder:
        write(folder, specs, arrays, max_shard_size)
        text = json.dumps(saved, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _directory(preset):
    """The local directory of a preset, downloaded if it is on the hub."""
    if not str(preset).startswith(HUB):
        if not Path(preset).is_dir():
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
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(saved, dict) or not {"model_type", "registered_name"} & set(saved):
        raise ValueError(f"{path} must name a `model_type` or, as saved here, a `registered_name`.")
    return saved


def _from_published(cls, saved, dtype, options):
    own = {name: options.pop(name) for name in cls.constructor_options() if name in options}
    if "num_labels" in cls.constructor_options() and "id2label" in saved:
        own.setdefault("num_labels", len(saved["id2label"]))
    config = Qwen3NextConfig.from_dict(config_from_hugging_face(saved))
    return cls(config.replace(**options), dtype=dtype, **own)


def _from_own(cls, saved, dtype, options):
    """A model of the saved class if that is a `cls`, else a `cls` with the saved configuration."""
    saved_class = keras.saving.get_registered_object(saved["registered_name"])
    if saved_class is None:
        raise ValueError(
            "The class of a preset must be registered: import it first. "
            f"Received: registered_name={saved['registered_name']!r}"
        )
    if issubclass(saved_class, cls):
        cls = saved_class
    foreign = set(saved_class.constructor_options()) - set(cls.constructor_options())
    fields = {name: value for name, value in saved["config"].items() if name not in foreign}
    if dtype is not None:
        fields["dtype"] = dtype
    return cls.from_config({**fields, **options})


def _own_sources(model):
    optional = {row.path for row in table_of(model) if row.optional}
    return [
        Source(v, (v.path,), tuple(v.shape), SAME, optional=v.path in optional)
        for v in model.weights
    ]


def _draw_initialised(model, report):
    """Initial values for weights that the checkpoint did not have: they were made as zeros."""
    optional = {row.path for row in table_of(model) if row.optional}
    for variable in model.weights:
        if variable.path in optional and variable.path in report.initialised:
            draw = Normal(model.config.initializer_range)
            variable.assign(draw(variable.shape, variable.dtype))
