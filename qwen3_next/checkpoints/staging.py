"""Replacing a file, or the weights and the configuration in a directory, all at once or not at all.

New files are written to a folder inside the directory, with a list of their names. Once all of it
is on the disk, the folder is renamed to `COMMITTED`: until then the old files count, from then on
the new ones. They are moved to their places afterwards. Whoever is stopped in between leaves a
directory that `files_of` reads as the old or as the new checkpoint; the next save tidies it up.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen3_next.config.validation import PATH, Rule, is_list_of, require, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
WRITING, COMMITTED, LIST = ".writing-", ".committed", ".files.json"
FILE = Rule(
    "a path to a file in a folder that exists",
    lambda value: PATH.fits(value) and not Path(value).is_dir() and Path(value).parent.is_dir(),
)
_NAMES = Rule("a list of file names", lambda names: is_list_of(names, is_file_name))


@contextlib.contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """A new folder to write to, whose files replace those in `directory` at the end.

    Weight files of an earlier checkpoint go away with it, other files stay. After an error
    `directory` is what it was.

    Raises:
        ValueError: `directory` is a file.
        OSError: what went wrong with the disk, and where.
    """
    with _made(directory) as directory, _errors_name(directory):
        _tidy(directory)
        folder = Path(tempfile.mkdtemp(prefix=WRITING, dir=directory))
        try:
            yield folder
            _commit(folder, directory)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def require_writable(directory: str | Path) -> None:
    """Raises what `staged` would raise for a directory, before there is something to write.

    Raises:
        ValueError: `directory` is a file.
        OSError: it cannot be made or written to.
    """
    with _made(directory) as directory, tempfile.TemporaryDirectory(prefix=WRITING, dir=directory):
        pass


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place at the end; after an error it is gone.

    Raises:
        OSError: what went wrong with the disk, and where.
    """
    path = Path(path)
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        with _errors_name(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written nothing was
            temporary.unlink()


def files_of(directory: str | Path) -> dict[str, Path]:
    """The files in a directory by name, those of an unfinished replacement in its place."""
    directory = Path(directory)
    if not directory.is_dir():
        return {}
    found = {p.name: p for p in directory.iterdir() if p.exists() and not p.is_dir()}
    committed = _committed(directory)
    if committed:
        for name in _stale(found, committed):
            del found[name]
        for name in committed:
            path = directory / COMMITTED / name
            if path.exists():
                found[name] = path
    return found


def is_file_name(value: Any) -> bool:
    """Whether a value is the name of a file, and no way to another directory."""
    return isinstance(value, str) and Path(value).name == value and value not in ("", "..")


def require_regular(path: Path) -> None:
    """Raises `ValueError` for what may be in a directory but is no file, such as a named pipe."""
    if not path.exists():
        raise ValueError(f"{path} must be a file. Received: there is nothing of that name")
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file. Received: something else of that name")


def read_json(path: Path) -> Any:
    """What a JSON file holds; `ValueError` that names the file if it holds something else."""
    require_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_dict_of)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def require_once(names: Sequence[str]) -> None:
    """Raises `ValueError` for names of a file that are there twice: readers keep the last value."""
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise ValueError(f"a name must be there once. Received: {shown(twice)} more than once")


def _dict_of(pairs):
    require_once([name for name, _ in pairs])
    return dict(pairs)


@contextlib.contextmanager
def _made(directory):
    """A directory, which goes away again where it is new and nothing was written."""
    require(PATH, "directory", directory)
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`directory` must not be a file. Received: {directory}")
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    finally:
        if not existed and not any(directory.iterdir()):
            directory.rmdir()


@contextlib.contextmanager
def _errors_name(path):
    """Errors of the disk say what was being written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"{reason}, while writing {path}") from error


def _commit(folder, directory):
    names = sorted(path.name for path in folder.iterdir())
    (folder / LIST).write_text(json.dumps(names), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _sync(path)
    os.rename(folder, directory / COMMITTED)
    _sync(directory)
    _finish(directory)


def _tidy(directory):
    """Finishes a replacement that was stopped, and removes what another had only begun."""
    _finish(directory)
    for path in directory.glob(f"{WRITING}*"):
        shutil.rmtree(path)


def _finish(directory):
    committed = _committed(directory)
    for name in committed:
        path = directory / COMMITTED / name
        if path.exists():
            os.replace(path, directory / name)
    if committed:
        for name in _stale([path.name for path in directory.iterdir()], committed):
            os.unlink(directory / name)
        _sync(directory)
        os.unlink(directory / COMMITTED / LIST)
    if (directory / COMMITTED).exists():
        os.rmdir(directory / COMMITTED)


def _committed(directory):
    """Names of the files of a replacement that counts but may not have been finished."""
    path = directory / COMMITTED / LIST
    if not path.exists():
        return []
    names = read_json(path)
    require(_NAMES, str(path), names)
    return names


def _stale(names, committed):
    """Weight files that are none of the new ones."""
    weights = [name for name in names if name in (SINGLE, INDEX) or SHARD.fullmatch(name)]
    return [name for name in weights if name not in committed]


def _sync(path):
    """Waits until a file or the entries of a folder are on the disk."""
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
