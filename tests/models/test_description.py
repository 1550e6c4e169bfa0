"""What `describe` counts, without allocating a weight, and the command that prints it."""

import subprocess
import sys

import keras
import pytest

from qwen3_next import describe
from tests.support.paths import ROOT
from tests.support.small_models import small


def test_the_published_model_is_described_to_the_last_parameter():
    sizes = describe("80b_a3b")
    assert sizes.total == 79_674_391_296
    assert sizes.active == 3_874_929_408
    assert sizes.active - sizes.parts["embedding"][1] == 3_563_764_480
    assert sizes.cache_bytes_per_token["bfloat16"] == 24 * 1024
    assert sizes.weight_bytes["float32"] == 4 * sizes.total
    assert "79,674,391,296" in str(sizes)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_experts": 0}])
def test_a_description_counts_what_a_model_has(changes):
    model = small(**changes)
    sizes = describe(model.config)
    assert sizes.total == model.count_params()
    cache = model.init_cache(1, 8)
    held = sum(keras.ops.size(x) * 4 for x in keras.tree.flatten(cache.layers))
    assert held == sizes.cache_bytes_per_row["float32"] + 8 * sizes.cache_bytes_per_token["float32"]


def test_the_command_line_describes():
    command = [sys.executable, "-m", "qwen3_next", "describe", "80b_a3b"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "79,674,391,296" in printed
