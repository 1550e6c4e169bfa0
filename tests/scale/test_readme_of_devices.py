"""The README's Python for several devices, as written."""

import keras

from tests.support.devices import eight_devices
from tests.support.readme import blocks


@eight_devices
def test_the_section_on_several_devices_runs_as_written(capsys):
    (block,) = blocks(several_devices=True)
    names = {}
    try:
        exec(compile(block, "README.md", "exec"), names)
    finally:
        keras.distribution.set_distribution(None)
    assert [len(row) for row in names["tokens"]] == [4, 4]
    printed = capsys.readouterr().out
    assert "expert=8,tensor=8, 64 devices" in printed
    assert "least possible" in printed and "all-gather" in printed
