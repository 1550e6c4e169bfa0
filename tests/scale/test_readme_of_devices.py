"""The README's Python for several devices, as written, with one layer for two."""

import keras

from tests.support.devices import eight_devices
from tests.support.readme import blocks


@eight_devices
def test_the_section_on_several_devices_runs_as_written_but_for_a_layer(capsys):
    (block,) = blocks(several_devices=True)
    assert block.count("num_layers=2") == 1
    block = block.replace("num_layers=2", "num_layers=1")  # the second is one like the first
    names = {}
    try:
        exec(compile(block, "README.md", "exec"), names)
    finally:
        keras.distribution.set_distribution(None)
    assert [len(row) for row in names["tokens"]] == [4, 4]
    printed = capsys.readouterr().out
    assert "expert=8,tensor=8, 64 devices" in printed
    assert "least possible" in printed and "all-gather" in printed
