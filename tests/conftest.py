"""What the whole suite needs before Keras is imported, and the ways to run a function."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import pytest  # noqa: E402
from running import MODES  # noqa: E402


@pytest.fixture(params=MODES)
def compiled(request):
    """Every way in which the active backend runs a function."""
    return request.param
