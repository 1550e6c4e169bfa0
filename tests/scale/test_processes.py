"""Two processes of four devices do what one process of eight does."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from qwen3_next import Qwen3Next
from tests.support.devices import distribution_of, eight_devices, jax_only
from tests.support.other_backend import environment_without_tensorflow
from tests.support.paths import ROOT
from tests.support.process_runs import BATCHES, train

pytestmark = jax_only

# Two replicas in each process, and one that spans both.
MESHES = ["4,2,1", "1,2,4"]
SECONDS = 400


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left, one folder for each mesh."""
    folder = tmp_path_factory.mktemp("processes")
    for mesh in MESHES:
        (folder / mesh).mkdir()
    environment = {
        **os.environ,
        **environment_without_tensorflow(tmp_path_factory.mktemp("modules")),
    }
    common = ["2", str(free_port()), *MESHES]
    started = []
    for process in range(2):
        command = [sys.executable, "-m", "tests.support.process_runs", str(folder), str(process)]
        with open(f"{folder}/log-{process}", "w") as log:
            options = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log}
            started.append(subprocess.Popen([*command, *common], **options))
    try:
        codes = [process.wait(SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], open(f"{folder}/log-0").read()[-4000:]
    return folder


def found_by(folder, mesh):
    return [dict(np.load(folder / mesh / f"found-{process}.npz")) for process in range(2)]


def rows_together(parts, rows, replicas):
    """Rows of whole batches, from what each process has of them."""
    if replicas == 1:
        return parts[0]
    parts = [part.reshape(rows, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(parts, axis=1).reshape(-1, *parts[0].shape[2:])


@eight_devices
@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_learn_what_one_learns(folder, mesh):
    replicas = int(mesh[0])
    with distribution_of("data=2,expert=4"):
        _, one = train(0, 1, replicas)
    both = found_by(folder, mesh)
    for name in ("losses", "evaluated", "on_batch"):
        for found in both:
            np.testing.assert_allclose(found[name], one[name], rtol=1e-5)
    for name, rows in (("predicted", BATCHES), ("predicted_on_batch", 1)):
        together = rows_together([found[name] for found in both], rows, replicas)
        np.testing.assert_allclose(together, one[name], atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_what_one_process_saves_all_load_to_the_bit(folder, mesh):
    for found in found_by(folder, mesh):
        assert [found[name] for name in ("preset", "published", "keras")] == [0, 0, 0]
        assert found["steps"] == 2 * BATCHES
        names = {"model.keras", "model.weights.h5", "preset", "published"}
        assert names <= set(found["saved"])
        assert not any(name.startswith(".writing") for name in found["saved"])


def test_one_device_loads_what_two_processes_saved(folder):
    found = found_by(folder, MESHES[0])
    model = Qwen3Next.from_preset(folder / MESHES[0] / "preset", progress=False)
    rows = np.random.default_rng(0).integers(0, 64, (BATCHES, 8, 8)).reshape(-1, 8)
    predicted = rows_together([part["predicted"] for part in found], BATCHES, 2)
    np.testing.assert_allclose(model.predict(rows, verbose=0), predicted, atol=1e-5)


def test_no_process_is_left_waiting(folder):
    first, second = found_by(folder, MESHES[0])
    assert (first["failure"], second["failure"]) == ("NotADirectoryError", "OSError")
    assert "Other processes refused their data" in str(first["wrong"])
    assert "Received ids from 64" in str(second["wrong"])
    for found in (first, second):
        assert "Received: rows=[4, 8], batch_size=[4, 4]" in str(found["others"])
        assert "2 in every process" in str(found["uneven"])
