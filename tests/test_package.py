"""The package as others get it: wheel and sdist, with only the JAX extra, without TensorFlow."""

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.support.paths import ROOT
from tests.support.running import BACKEND

once = pytest.mark.skipif(BACKEND != "jax", reason="once is enough")

USE = """
import sys
import numpy as np
from qwen3_next import Qwen3Next, variants
model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=4)
model.compile("adamw")
model.fit(np.ones((2, 8), "int32"), verbose=0)
assert len(model.generate([[1, 2]], max_new_tokens=2).tokens[0]) == 2
assert variants.names() == ["80b", "80b_a3b", "small", "tiny"]
"""
ONLY_JAX = 'assert "tensorflow" not in sys.modules and "torch" not in sys.modules'


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@once
def test_the_wheel_has_one_package_with_everything(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"qwen3_next", "qwen3_next_keras-0.1.0.dist-info"}
    for path in (
        "layers/gated_delta_net.py",
        "layers/ops/gated_delta_rule/chunked.py",
        "variants/80b_a3b.json",
        "py.typed",
    ):
        assert f"qwen3_next/{path}" in names
    (sdist,) = distributions.glob("*.tar.gz")
    assert any(n.endswith("qwen3_next/variants/tiny.json") for n in tarfile.open(sdist).getnames())


@once
def test_the_wheel_works_alone_with_only_jax(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", f"{wheel}[jax]"]
    subprocess.run(install, check=True, capture_output=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["KERAS_BACKEND"] = "jax"
    subprocess.run([str(python), "-c", USE + ONLY_JAX], cwd=tmp_path, env=environment, check=True)


@once
def test_importing_never_imports_tensorflow_on_jax():
    code = "import sys, qwen3_next; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_backend_needs_no_other_one():
    others = {"jax", "tensorflow", "torch"} - {BACKEND}
    shut = f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
    subprocess.run([sys.executable, "-c", shut + USE], cwd=ROOT, check=True)
