"""What the whole suite needs before Keras is imported, and the ways to run a function."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

from tests.support.running import MODES


@pytest.fixture(params=MODES)
def compiled(request):
    """Every way in which the active backend runs a function."""
    return request.param
