"""The rooms of the house: who may import whom, what modules are called, how long they are."""

import ast
import inspect
import statistics
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

import qwen3_next
from tests.support.paths import ROOT
from tests.support.running import BACKEND

# A module may import from its own room and from those named here, all of them further down.
BELOW_MODELS = {"config", "config.validation", "variants", "layers", "layers.ops"}
BELOW_TASKS = {*BELOW_MODELS, "models", "training", "generation", "checkpoints"}
ARROWS = {
    "variants": set(),
    # The rules of arguments stand below all that has arguments.
    "config.validation": set(),
    "layers.ops": {"config.validation"},
    "layers": {"layers.ops", "config.validation"},
    "config": {"variants", "config.validation"},
    "models": BELOW_MODELS,
    "training": {*BELOW_MODELS, "models"},
    "generation": {*BELOW_MODELS, "models"},
    "checkpoints": {*BELOW_MODELS, "models"},
    "tasks": BELOW_TASKS,
    "think": {*BELOW_TASKS, "tasks"},
    "scale": {*BELOW_TASKS, "tasks", "think"},
    "transfer": {*BELOW_TASKS, "tasks", "think"},
    "cli": {*BELOW_TASKS, "tasks", "think", "transfer", "scale"},
    "": {*BELOW_TASKS, "tasks", "think", "transfer", "scale", "cli"},
}
PYTHON = sys.stdlib_module_names
# What a room may import besides this package; rooms that are not listed, anything.
OUTSIDE = {
    "variants": PYTHON,
    "config": PYTHON,
    "config.validation": PYTHON,
    "layers": PYTHON | {"keras", "numpy"},
    # The maths is Keras; the bindings of the backends are all here.
    "layers.ops": PYTHON | {"keras", "numpy", "jax", "tensorflow", "torch"},
}
USERS = ("tests", "benchmarks", "notebooks")
REPEATED_NAMES = {"__init__.py", "__main__.py", "api.py"}


def sources():
    """`{path: text}` of every module, with `layers` and `variants` where they are imported from."""
    found = {}
    for top in ("qwen3_next", "layers", "variants", *USERS):
        for path in (ROOT / top).rglob("*.py"):
            place = path.relative_to(ROOT)
            if not {"layers", "variants"} & set(place.parts[1:2]) or top in USERS:
                inside = "qwen3_next" / place if top in ("layers", "variants") else place
                found[inside.as_posix()] = path.read_text()
    return found


def imports(path, text):
    """Dotted names of what a module imports, relative ones made absolute."""
    folder = PurePosixPath(path).parent.parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name):
    """The room of a dotted name inside the package; `""` for what stands above all rooms."""
    inside = name.removeprefix("qwen3_next").strip(".")
    return max((r for r in ARROWS if f"{inside}.".startswith(f"{r}.")), key=len, default="")


def wrong_imports(files):
    """Every import that does not point down, as text."""
    for path, text in files.items():
        top = path.split("/")[0]
        room = room_of(path.removesuffix(".py").replace("/", "."))
        for name in imports(path, text):
            package = name.split(".")[0]
            if package in ("layers", "variants"):
                fine = False
            elif top == "tests":
                fine = package != "tests" or name.startswith("tests.support")
            elif top != "qwen3_next":
                fine = package != "tests" or top == "benchmarks"
            elif package == "qwen3_next":
                fine = room_of(name) in ARROWS[room] | {room}
            else:
                fine = package in OUTSIDE.get(room, {package}) and package not in USERS
            if not fine:
                yield f"{path} imports {name}"


def touches_the_path(text):
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    return any(ast.unparse(node) == "sys.path" for node in nodes)


def package_files():
    return {path: text for path, text in sources().items() if path.startswith("qwen3_next/")}


def test_imports_point_down():
    assert len(package_files()) > 40
    assert list(wrong_imports(sources())) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("qwen3_next/layers/ops/attention/api.py", "from ...swiglu import SwiGLU"),
        ("qwen3_next/layers/swiglu.py", "from qwen3_next.config import Qwen3NextConfig"),
        ("qwen3_next/layers/swiglu.py", "from ..config.model_config import FFN_TYPES"),
        ("qwen3_next/config/validation.py", "from qwen3_next.config.mtp_config import HEAD_TYPES"),
        ("qwen3_next/layers/swiglu.py", "def f():\n    import jax"),
        ("qwen3_next/layers/swiglu.py", "from layers.norms import norm"),
        ("qwen3_next/config/model_config.py", "import keras"),
        ("qwen3_next/config/model_config.py", "from qwen3_next.layers.norms import NORMALIZATIONS"),
        ("qwen3_next/config/model_config.py", "from ..layers import norms"),
        ("qwen3_next/models/mtp.py", "from qwen3_next import Qwen3Next"),
        ("qwen3_next/models/mtp.py", "from qwen3_next.tasks.task import Task"),
        ("qwen3_next/training/data.py", "from qwen3_next.generation import sampling"),
        ("qwen3_next/checkpoints/presets.py", "import qwen3_next.training.data"),
        ("qwen3_next/tasks/task.py", "from qwen3_next.think.kneedle import kneedle"),
        ("qwen3_next/models/placement.py", "from qwen3_next.scale.layouts import layout_map"),
        ("qwen3_next/tasks/task.py", "import variants"),
        ("qwen3_next/tasks/task.py", "from tests.support import oracles"),
        ("tests/models/test_model.py", "from tests.models.test_mtp import two_steps"),
        ("tests/models/test_model.py", "from .test_mtp import two_steps"),
        ("notebooks/demo.py", "from layers import SwiGLU"),
    ],
)
def test_an_import_that_points_up_is_found(path, text):
    assert list(wrong_imports({path: text}))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("qwen3_next/layers/swiglu.py", "from qwen3_next.config.validation import require"),
        ("qwen3_next/layers/swiglu.py", "from .ops import expert_mlp\nimport keras, numpy, math"),
        ("qwen3_next/layers/ops/attention/api.py", "from ..backend import autodiff\nimport jax"),
        ("qwen3_next/config/model_config.py", "from qwen3_next import variants"),
        ("qwen3_next/checkpoints/presets.py", "from qwen3_next.models import weight_table"),
        ("qwen3_next/__init__.py", "from qwen3_next.tasks.factories import create_qwen3_next"),
        ("tests/models/test_model.py", "from tests.support import oracles\nimport qwen3_next"),
    ],
)
def test_an_import_that_points_down_is_not(path, text):
    assert list(wrong_imports({path: text})) == []


def test_configurations_need_no_keras():
    code = f"""
import sys, types
sys.modules["keras"] = None
package = types.ModuleType("qwen3_next")
package.__path__ = [{str(ROOT / "qwen3_next")!r}]
sys.modules["qwen3_next"] = package
from qwen3_next.config import Qwen3NextConfig
assert Qwen3NextConfig.from_variant("80b_a3b") == Qwen3NextConfig()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nobody_changes_the_path():
    assert touches_the_path("import sys\nsys.path.insert(0, '.')")
    assert [path for path, text in sources().items() if touches_the_path(text)] == []


def test_modules_have_names_of_their_own():
    names = [path.split("/")[-1] for path in package_files()]
    assert {name for name in names if names.count(name) > 1} <= REPEATED_NAMES
    tests = [path.split("/")[-1] for path in sources() if path.split("/")[-1].startswith("test_")]
    assert len(tests) == len(set(tests))


def test_no_function_hides_a_module():
    modules = {path.split("/")[-1].removesuffix(".py") for path in package_files()}
    public = {name: getattr(qwen3_next, name) for name in qwen3_next.__all__}
    assert {name for name in public if inspect.isfunction(public[name])} & modules == set()


def test_modules_are_short():
    lengths = {path: text.count("\n") for path, text in sources().items()}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
    package = [lengths[path] for path in package_files() if not path.endswith("__init__.py")]
    assert statistics.median(package) < 150


def test_make_runs_every_file_of_tests():
    parts = (ROOT / "Makefile").read_text().split("PARTS := \\\n")[1].split("\nQUICK")[0]
    parts = {part.strip() for part in parts.split("\\\n")}
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    assert [file for file in files if not {str(file), str(file.parent)} & parts] == []
    assert [part for part in parts if not (ROOT / part).exists()] == []


def test_keras_looks_for_tensorflow_on_tensorflow_alone():
    from keras.src.utils import module_utils

    assert module_utils.tensorflow.available == (BACKEND == "tensorflow")
