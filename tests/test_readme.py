"""The README's Python, as written, from top to bottom; what needs several devices is in `scale`."""

import re

import pytest

from tests.support.memory import free_programs
from tests.support.readme import README, blocks
from tests.support.running import BACKEND


@pytest.mark.skipif(BACKEND != "jax", reason="a long way through, once is enough")
def test_the_readme_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(several_devices=False):
        exec(compile(block, "README.md", "exec"), names)
        free_programs()  # 4 GB in the end else
    assert [len(row) for row in names["tokens"]] == [8, 8]
    assert names["logits"].shape == (2, 3, 512)
    assert names["classifier"].num_labels == 2
    assert "copied" in capsys.readouterr().out


def test_the_table_of_sizes_is_what_describe_counts():
    from qwen3_next import describe

    rows = re.findall(r"\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", README)
    assert len(rows) == 4
    for name, total, active in rows:
        sizes = describe(name)
        assert (f"{sizes.total:,}", f"{sizes.active:,}") == (total, active)
