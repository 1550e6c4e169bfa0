"""What the whole suite needs, and the ways to run a function."""

import gc
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest

from tests.support.memory import free_programs
from tests.support.other_backend import keras_knows_no_tensorflow
from tests.support.paths import ROOT
from tests.support.running import BACKEND, MODES
from tests.support.xla_flags import set_xla_flags

# Tracing makes so many objects that Python would look for garbage for a fifteenth of the time.
gc.set_threshold(100_000, 50, 100)

if BACKEND != "tensorflow":
    keras_knows_no_tensorflow()

SEVERAL_DEVICES = ROOT / "tests" / "scale"


def pytest_configure(config):
    # Before the first program, which reads them.
    devices = 8 if any(map(needs_several_devices, config.args)) else 1
    set_xla_flags(devices, getattr(config, "cache", None))


def pytest_collection_finish():
    # What is imported stays: no search for garbage need look through it again.
    gc.collect()
    gc.freeze()


def needs_several_devices(argument):
    """Whether an argument of pytest names tests of several devices, not just all tests."""
    return Path(str(argument).partition("::")[0]).resolve().is_relative_to(SEVERAL_DEVICES)


@pytest.fixture(params=MODES)
def compiled(request):
    """Every way in which the active backend runs a function."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _modules_know_nothing_of_each_other():
    keras.utils.set_random_seed(0)
    yield
    free_programs()
