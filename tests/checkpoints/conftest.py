"""The smallest published checkpoint, on disk and loaded."""

import json

import pytest
from safetensors.numpy import save_file

from qwen3_next.checkpoints.safetensors_files import SINGLE
from tests.support.published import SMALLEST, load, published, weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A published checkpoint in one file, written by the reference implementation."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config, tensors = published(SMALLEST)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / SINGLE)
    return folder


@pytest.fixture(scope="module")
def checkpoint_weights(checkpoint):
    return weights(load(checkpoint))
