"""The files of stored logits: what they are called, and how a damaged one is found."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_next.checkpoints.staging import INDEX, SHARD, SINGLE, files_of, read_json
from qwen3_next.config.validation import POSITIVE, integer, one_of

IDS, LOG_PROBS, CHECKSUMS = "teacher_ids.npy", "teacher_log_probs.npy", "teacher_checksums.npy"
DESCRIPTION, FORMAT = "stored_logits.json", 1
PROMPTS = "prompts"  # beside what a teacher read, where it decided from labels
FIELDS = {
    "format": integer(FORMAT, FORMAT),
    "vocab_size": integer(1),
    "top_n": integer(1),
    "temperature": POSITIVE,
    "rows": integer(1),
    "length": integer(1),
    "dtype": one_of(("float32", "float16")),
}


def fingerprints(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """SHA-256 of every array with its shape and dtype."""
    return {name: _fingerprint(array) for name, array in arrays.items()}


def _fingerprint(array):
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()


def refuse_checkpoints(directory: str | Path) -> None:
    """Raises `ValueError` for a directory with the weights of a model.

    What replaces the files of a directory takes those of an earlier checkpoint away.
    """
    weights = [n for n in files_of(directory) if n in (SINGLE, INDEX) or SHARD.fullmatch(n)]
    if weights:
        raise ValueError(
            "`directory` must not hold the weights of a model. "
            f"Received: {directory} with {sorted(weights)}"
        )


def read_description(path: Path) -> dict[str, Any]:
    """The fields of a description; `ValueError` that names the file if one is missing or wrong."""
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("sha256"), dict):
        raise ValueError(f"{path} is damaged. Received: no description of stored logits")
    for name, rule in FIELDS.items():
        if not rule.fits(found.get(name)):
            raise ValueError(
                f"{path} is damaged: `{name}` must be {rule.what}. "
                f"Received: {name}={found.get(name)!r}"
            )
    return found


def memory_map(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array on disk; `ValueError` that names the file unless it is of this shape and dtype."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"{path} is damaged: it must hold {dtype} of shape {shape}. "
            f"Received: {found.dtype} of shape {found.shape}"
        )
    return found
