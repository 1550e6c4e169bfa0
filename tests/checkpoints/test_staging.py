"""A directory is replaced all at once: after a kill at any moment it is the old or the new one."""

import subprocess
import sys

import pytest

from qwen3_next.checkpoints.staging import COMMITTED, WRITING, files_of, staged
from tests.support.paths import ROOT

SHARDED = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = (*SHARDED, "model.safetensors.index.json")
SINGLE = ("config.json", "model.safetensors")

# Loads the module alone, without Keras: a process with JAX or TensorFlow must not fork.
KILL_EVERYWHERE = """
import importlib.util, itertools, os, pathlib, shutil, sys
spec = importlib.util.spec_from_file_location("staging", {module!r})
staging = importlib.util.module_from_spec(spec)
spec.loader.exec_module(staging)
root = pathlib.Path({root!r})
kinds = {kinds!r}

def save(folder, kind):
    with staging.staged(folder) as new:
        for name in kinds[kind]:
            (new / name).write_text(kind)

def killed_at(step, folder, kind):
    if os.fork() == 0:
        count = itertools.count()
        def dying(function):
            def call(*args, **kwargs):
                if next(count) == step:
                    os._exit(9)
                return function(*args, **kwargs)
            return call
        for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        save(folder, kind)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1]) == 9

def read(folder):
    found = staging.files_of(folder)
    found.pop("tokenizer.json")
    assert len({{path.read_text() for path in found.values()}}) == 1, sorted(found)
    kind = found["config.json"].read_text()
    assert set(found) == set(kinds[kind]), (kind, sorted(found))
    return kind

for old, new in (("sharded", "single"), ("single", "sharded")):
    seen = []
    for step in itertools.count():
        folder = root / f"{{old}}{{step}}"
        folder.mkdir()
        (folder / "tokenizer.json").write_text("mine")
        save(folder, old)
        was_killed = killed_at(step, folder, new)
        seen.append(read(folder))
        save(folder, old)
        assert {{p.name for p in folder.iterdir()}} == {{"tokenizer.json", *kinds[old]}}
        if not was_killed:
            break
    assert seen[-1] == new and seen == sorted(seen, key=lambda kind: kind == new), seen
    print(len(seen), seen.count(old))
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_files(tmp_path):
    module = str(ROOT / "qwen3_next" / "checkpoints" / "staging.py")
    kinds = {"sharded": SHARDED, "single": SINGLE}
    script = KILL_EVERYWHERE.format(module=module, root=str(tmp_path), kinds=kinds)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        moments, before = map(int, line.split())
        assert moments > 15 and before > 5


def test_a_full_disk_leaves_the_old_files_and_is_named(tmp_path):
    for text, fails in (("old", False), ("new", True)):
        try:
            with staged(tmp_path) as folder:
                (folder / "config.json").write_text(text)
                if fails:
                    raise OSError(28, "No space left on device")
        except OSError as error:
            assert str(tmp_path) in str(error) and error.errno == 28
    assert files_of(tmp_path)["config.json"].read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_leftovers_of_a_stopped_save_are_cleared(tmp_path):
    (tmp_path / f"{WRITING}xyz").mkdir()
    (tmp_path / f"{WRITING}xyz" / "model.safetensors").write_text("half")
    (tmp_path / COMMITTED).mkdir()
    with staged(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Received"), staged(tmp_path / "file"):
        pass
