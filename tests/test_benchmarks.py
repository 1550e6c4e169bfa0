"""The benchmark's rows and its command, without measuring anything."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import run, worker
from benchmarks.workloads import MODELS, everything


def test_every_row_is_found_by_its_name_and_has_its_model():
    rows = list(everything())
    assert len({row.name for row in rows}) == len(rows)
    assert {row.model for row in rows} <= MODELS.keys()


@pytest.mark.parametrize("options", [["--only", "no such row"], ["--by", "nobody"]])
def test_a_run_of_nothing_leaves_the_results_alone(options, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["run", *options, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        run.main()
    assert "nothing to measure" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_kept_programs_are_compiled_by_an_earlier_process(monkeypatch):
    row = {"task": "first_fit", "model": "model", "size": {"batch": 1}, "gpu": False}
    seen = []

    def started(command, **_):
        seen.append((json.loads(command[-1]), os.environ["JAX_COMPILATION_CACHE_DIR"]))

    def measured(_, row):
        seen.append((row, os.environ["JAX_COMPILATION_CACHE_DIR"]))

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr(worker, "measure", measured)
    kept = {**row, "size": {**row["size"], "kept": True}}
    monkeypatch.setattr(sys, "argv", ["worker", "ours-jax", json.dumps(kept)])
    worker.main()
    assert seen[0] == seen[1] == (row, seen[0][1])
