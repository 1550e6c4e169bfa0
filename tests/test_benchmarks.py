"""The benchmark's rows and its command, without measuring anything."""

import sys

import pytest

from benchmarks import run
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
