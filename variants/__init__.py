"""Named configurations, one JSON file each."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def names():
    """Names of all variants, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name):
    """The fields of a variant; an unknown name raises `ValueError` that lists the known ones."""
    if not isinstance(name, str) or name not in names():
        raise ValueError(f"Unknown variant. Known variants: {names()}. Received: {name!r}")
    return json.loads((FOLDER / f"{name}.json").read_text())
