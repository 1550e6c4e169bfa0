"""Reads and writes `safetensors` checkpoints with one tensor in memory at a time.

A file is the length of its header (8 bytes, little-endian), the header, a JSON object
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, and the data the offsets count from.
A checkpoint is `model.safetensors`, or several files (shards) with `model.safetensors.index.json`,
which names the shard of every tensor.

The safetensors library checks a file as a whole and writes it from tensors that are all in memory;
here a truncated file is refused with the name of its broken tensor, and writing streams.

Source: https://huggingface.co/docs/safetensors
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from qwen3_next.checkpoints.staging import INDEX, SINGLE, files_of

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
        self._open: dict[Path, BinaryIO] = {}
        for path, indexed in _shards(self.directory).items():
            entries = _read_header(path)
            _check_index(path, indexed, entries)
            self._entries.update(entries)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

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
        """The largest dim of any tensor."""
        return max((dim for entry in self._entries.values() for dim in entry.shape), default=0)

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor as a NumPy array of its own dtype."""
        dtype, entry = self.dtype(name, DTYPES | COUNTER_DTYPES), self._entries[name]
        if entry.path not in self._open:
            self._open[entry.path] = entry.path.open("rb")
        file = self._open[entry.path]
        file.seek(entry.begin)
        data = np.fromfile(file, np.uint8, entry.end - entry.begin)
        if data.size != entry.end - entry.begin:
            raise ValueError(f"{entry.path} was truncated while it was read, at tensor {name!r}.")
        return data.view(dtype).reshape(entry.shape)


class _Entry(NamedTuple):
    """Where a tensor is.

    Attributes:
        path: The file.
        code: Its dtype as the format spells it.
        shape: Its shape.
        begin: Its first byte, counted from the start of the file.
        end: The byte behind its last.
    """

    path: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _shards(directory):
    """The files of a checkpoint, each with the names its index gives it (`None` without one)."""
    files = files_of(directory)
    if SINGLE in files and INDEX in files:
        raise ValueError(f"{directory} holds both {SINGLE} and {INDEX}: remove the stale one.")
    if SINGLE in files:
        return {files[SINGLE]: None}
    if INDEX not in files:
        raise ValueError(f"{directory} holds neither {SINGLE} nor {INDEX}.")
    names: dict[str, set[str]] = {}
    for name, file in _weight_map(files[INDEX]).items():
        if Path(file).name != file:
            raise ValueError(
                f"{files[INDEX]} must name files beside it. Received: {file!r} for {name!r}"
            )
        names.setdefault(file, set()).add(name)
    for file, held in names.items():
        if file not in files:
            raise ValueError(
                f"{directory / file} is missing: by {INDEX} it holds {min(held)!r} and "
                f"{len(held) - 1} other tensors."
            )
    return {files[file]: held for file, held in names.items()}


def _weight_map(index):
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from error


def _check_index(path, indexed, entries):
    if indexed is None or indexed == set(entries):
        return
    lacking, extra = sorted(indexed - set(entries)), sorted(set(entries) - indexed)
    raise ValueError(
        f"{path} and {INDEX} disagree: tensors that the file lacks {lacking[:10]}, "
        f"tensors that the index lacks {extra[:10]}."
    )


def _read_header(path):
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is truncated or no safetensors file: a header of {length} bytes in a "
                f"file of {size}."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, fields) for name, fields in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The header of {path} is corrupt: {error!r}") from error
    _check_data(path, 8 + length, size, entries)
    return entries


def _entry(path, start, fields):
    begin, end = (start + int(offset) for offset in fields["data_offsets"])
    return _Entry(path, fields["dtype"], tuple(int(n) for n in fields["shape"]), begin, end)


def _check_data(path, start, size, entries):
    """The tensors must fill the file, one behind the other."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name!r} ends at byte {entry.end} of {size}."
            )
        known = (DTYPES | COUNTER_DTYPES).get(entry.code)
        length = entry.end - entry.begin
        if entry.begin != position or (
            known is not None and length != TensorSpec(name, entry.shape, known).nbytes
        ):
            raise ValueError(
                f"The header of {path} is corrupt: tensor {name!r}, {entry.code} of shape "
                f"{entry.shape}, cannot be bytes {entry.begin} to {entry.end}."
            )
        position = entry.end
    if position != size:
        raise ValueError(f"{path} is corrupt: {size - position} bytes follow its last tensor.")


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
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", str(size).strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"`max_shard_size` must be like '5GB' or a number. Received: {size!r}")
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
