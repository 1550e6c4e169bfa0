"""Reads and writes `safetensors` checkpoints with one tensor in memory at a time.

A file is the length of its header (8 bytes, little-endian), the header, a JSON object
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, and the data the offsets count from.
A checkpoint is `model.safetensors`, or several files (shards) with `model.safetensors.index.json`,
which names the shard of every tensor.

Files are read and judged by the safetensors library. What it cannot do is done here:

- its errors do not say which file, nor which tensor of a file is cut off;
- it knows no index of shards, and waits forever for the other end of a named pipe;
- it has no view of NumPy's bfloat16, which comes with `ml_dtypes`;
- it writes tensors that are all in memory, where a model may fill it: writing is a stream.

Source: https://huggingface.co/docs/safetensors
"""

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qwen3_next.checkpoints.staging import (
    INDEX,
    SINGLE,
    files_of,
    is_file_name,
    read_json,
    require_regular,
)
from qwen3_next.config.validation import Rule, require, shown

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
COUNTER_DTYPES = {"I32": np.dtype("int32"), "I64": np.dtype("int64")}
CODES = {dtype: code for code, dtype in (DTYPES | COUNTER_DTYPES).items()}


class TensorSpec(NamedTuple):
    """A tensor that is to be written.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: NumPy dtype, one of `DTYPES` or `COUNTER_DTYPES`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a directory, of which only the headers are read at first.

    Used as a context: `with Checkpoint(directory) as checkpoint`.

    Args:
        directory: Holds `model.safetensors`, or shards and their index.

    Raises:
        ValueError: a file that is missing, truncated or no safetensors file, or an index that
            does not agree with its shards. Raised at once, before a tensor is read.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._entries: dict[str, _Entry] = {}
        with contextlib.ExitStack() as opened:
            for path, indexed in _shards(self.directory).items():
                file = opened.enter_context(_open(path))
                names = file.offset_keys()
                _check_index(path, indexed, set(names))
                for name in names:
                    tensor = file.get_slice(name)
                    shape = tuple(tensor.get_shape())
                    self._entries[name] = _Entry(path, file, tensor.get_dtype(), shape)
            self._opened = opened.pop_all()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str, known: dict[str, np.dtype] = DTYPES) -> np.dtype:
        """NumPy dtype of a tensor; `ValueError` where it is not one of the known ones."""
        entry = self._entries[name]
        if entry.code not in known:
            raise ValueError(
                f"Tensor {name!r} of {entry.path} must be one of {list(known)}. "
                f"Received: dtype={entry.code}"
            )
        return known[entry.code]

    def is_counter(self, name: str) -> bool:
        """Whether a tensor holds integers: no weight, but a counter of a preset of one's own."""
        return self._entries[name].code in COUNTER_DTYPES

    @property
    def largest_dim(self) -> int:
        """The largest dim of any tensor that has values."""
        shapes = (entry.shape for entry in self._entries.values() if 0 not in entry.shape)
        return max((dim for shape in shapes for dim in shape), default=0)

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor as a NumPy array of its own dtype."""
        self.dtype(name, DTYPES | COUNTER_DTYPES)
        entry = self._entries[name]
        try:
            return entry.file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{entry.path} cannot be read at tensor {name!r}: {error}") from error


class _Entry(NamedTuple):
    """Where a tensor is.

    Attributes:
        path: The file.
        file: The file, opened by the library.
        code: Its dtype as the format spells it.
        shape: Its shape.
    """

    path: Path
    file: Any
    code: str
    shape: tuple[int, ...]


_SHARD = Rule(
    "the name of a .safetensors file beside the index",
    lambda name: is_file_name(name) and name.endswith(".safetensors"),
)
_WEIGHT_MAP = Rule(
    "an object with a `weight_map` that names files",
    lambda saved: isinstance(saved, dict) and _is_filled(saved.get("weight_map")),
)


def _is_filled(table):
    return isinstance(table, dict) and len(table) > 0


def _shards(directory):
    """The files of a checkpoint, each with the names its index gives it (`None` without one)."""
    files = files_of(directory)
    if SINGLE in files and INDEX in files:
        raise ValueError(f"{directory} holds both {SINGLE} and {INDEX}: remove the stale one.")
    if SINGLE in files:
        return {files[SINGLE]: None}
    if INDEX not in files:
        raise ValueError(f"{directory} holds neither {SINGLE} nor {INDEX}.")
    index = read_json(files[INDEX])
    require(_WEIGHT_MAP, str(files[INDEX]), index)
    names: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        require(_SHARD, f"weight_map[{name!r}]` of `{files[INDEX]}", file)
        names.setdefault(file, set()).add(name)
    for file, held in names.items():
        if file not in files:
            raise ValueError(
                f"{directory / file} is missing: by {INDEX} it holds {min(held)!r} and "
                f"{len(held) - 1} other tensors."
            )
    return {files[file]: held for file, held in names.items()}


def _check_index(path, indexed, found):
    if indexed is None or indexed == found:
        return
    lacking, extra = sorted(indexed - found), sorted(found - indexed)
    raise ValueError(
        f"{path} and {INDEX} disagree: tensors that the file lacks {lacking[:10]}, "
        f"tensors that the index lacks {extra[:10]}."
    )


def _open(path):
    """A file whose header the library has found to be right, down to the length of the data."""
    require_regular(path)
    try:
        # Mapped into memory, a file that is truncated later would end the process.
        return safe_open(path, framework="np", backend="pread")
    except SafetensorError as error:
        cut = _first_beyond_end(path) if "not fully covered" in str(error) else None
        if cut is not None:
            raise ValueError(f"{path} is truncated at tensor {cut!r}.") from error
        raise ValueError(f"{path} is truncated, corrupt or no safetensors file: {error}") from error


def _first_beyond_end(path):
    """The first tensor that ends behind the end of a file; the header is known to be valid."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    held = path.stat().st_size - 8 - length
    ends = [(fields["data_offsets"][1], name) for name, fields in header.items()]
    return next((name for end, name in sorted(ends) if end > held), None)


def write(
    directory: str | Path,
    specs: list[TensorSpec],
    arrays: Iterable[np.ndarray],
    max_shard_size: str | int = "5GB",
) -> None:
    """Writes tensors to `model.safetensors`, or to shards and an index if one file is too small.

    Args:
        directory: Where to write, best a folder made by `staged`.
        specs: A list of `TensorSpec`.
        arrays: An iterable of the arrays in the same order; each is written before the next is
            asked for.
        max_shard_size: Size of a shard in bytes, or a string such as `"5GB"`. A larger tensor
            has a shard of its own.

    Raises:
        ValueError: an array that is not what its `TensorSpec` says, or too few arrays.
    """
    shards = _split(specs, parse_size(max_shard_size))
    arrays = iter(arrays)
    if len(shards) == 1:
        _write_file(Path(directory) / SINGLE, shards[0], arrays)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(Path(directory) / file, shard, arrays)
        weight_map |= {spec.name: file for spec in shard}
    total = sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (Path(directory) / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def parse_size(size: str | int) -> int:
    """Bytes of a size such as `"5GB"`, `"500MB"` or a plain number."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    size = int(size) if isinstance(size, np.integer) else size
    text = size if isinstance(size, str) else shown(size)
    match = re.fullmatch(r"(\d{1,30}(?:\.\d+)?)\s*([KMGT]B|)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(
            "`max_shard_size` must be like '5GB' or a number above 0. "
            f"Received: max_shard_size={shown(size)}"
        )
    return int(float(match[1]) * units[match[2]])


def _split(specs, limit):
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def _write_file(path, specs, arrays):
    # Readers in torch ask for this entry.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Wide types first, so that every tensor starts at a multiple of its item size.
    for name, shape, dtype in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        end = position + TensorSpec(name, shape, dtype).nbytes
        offsets = [position, end]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        position = end
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            array = next(arrays, None)
            if array is None or (array.shape, array.dtype) != (tuple(spec.shape), spec.dtype):
                found = "none" if array is None else f"{array.dtype} of shape {array.shape}"
                raise ValueError(f"An array must be what is announced, {spec}. Received: {found}")
            file.seek(8 + len(text) + header[spec.name]["data_offsets"][0])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
