"""Recipes of merges: reading their files, checking their entries, and mergekit's filters."""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_next.checkpoints.staging import read_json, require_once, require_regular
from qwen3_next.config.validation import PATH, require, shown
from qwen3_next.models.weight_rows import PARTS
from qwen3_next.transfer.merge.merge_amounts import REST


def read_recipe(path: str | Path) -> dict[str, Any]:
    """What a JSON or YAML file holds.

    Raises:
        ValueError: no file, another kind of file, or one that cannot be read.
    """
    require(PATH, "recipe", path)
    path = Path(path)
    if path.suffix == ".json":
        found = read_json(path)
    elif path.suffix in (".yaml", ".yml"):
        found = _read_yaml(path)
    else:
        raise ValueError(
            f"`recipe` must be a dict or a .json, .yaml or .yml file. Received: recipe={path}"
        )
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold names and values. Received: {shown(found)}")
    return found


def amount_of(name: str, value: Any) -> Any:
    """mergekit's list of filters as the dict it stands for; anything else as it is."""
    if not (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
        return value
    amounts: dict[str, Any] = {}
    for item in value:
        require_keys(name, item, ("filter", "value"), ("value",))
        piece = item.get("filter")
        if piece is None or piece == REST:
            key = REST
        elif isinstance(piece, str):
            # A filter is a piece of a path even where a part has that name.
            key = f"(?:{piece})" if piece in PARTS else re.escape(piece)
        else:
            raise ValueError(f"A `filter` of `{name}` must be a piece of a path. Received: {item}")
        if key in amounts:
            raise ValueError(f"Every `filter` of `{name}` must be there once. Received: {value}")
        amounts[key] = item["value"]
    return amounts


def require_keys(name: str, fields: Any, known: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Raises `ValueError` unless an entry has names and values, the needed and known ones."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"`{name}` must hold names and values. Received: {name}={shown(fields)}")
    unknown = sorted(set(fields) - set(known), key=str)
    if unknown:
        raise ValueError(f"Unknown entries of `{name}`: {unknown}. Known here: {list(known)}")
    missing = [key for key in needed if key not in fields]
    if missing:
        raise ValueError(f"`{name}` must have {missing}. Received: {sorted(fields, key=str)}")


def _read_yaml(path):
    require_regular(path)
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise ValueError(
            'Recipes in YAML need PyYAML: pip install "qwen3-next-keras[yaml]". '
            f"Received: recipe={path}"
        ) from error
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _safe_loader(yaml))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def _safe_loader(yaml):
    """PyYAML's safe loader, which refuses a name that is there twice."""

    def compose_mapping_node(loader, anchor):  # later, names that `<<` brings are among them
        node = yaml.SafeLoader.compose_mapping_node(loader, anchor)
        require_once([str(name.value) for name, _ in node.value])
        return node

    return type("Loader", (yaml.SafeLoader,), {"compose_mapping_node": compose_mapping_node})
