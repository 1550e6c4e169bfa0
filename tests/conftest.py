"""What the whole suite needs, and the ways to run a function."""

import collections
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

from tests.support.memory import free_programs
from tests.support.paths import ROOT
from tests.support.running import MODES
from tests.support.xla_flags import set_xla_flags

# Files that take minutes: workers begin with them, so that none is left alone with one at the end.
LONGEST = (
    "test_notebooks.py",
    "test_routed_tasks.py",
    "test_routing.py",
    "test_speculation.py",
    "test_variants.py",
    "test_thinking.py",
    "test_thinking_gradients.py",
    "test_router_training.py",
    "test_saving.py",
    "test_thinking_tasks.py",
    "test_mirrored.py",
)


SEVERAL_DEVICES = ROOT / "tests" / "scale"


def pytest_configure(config):
    # Before the first program, which reads them.
    set_xla_flags(8 if any(map(needs_several_devices, config.args)) else 1)


def needs_several_devices(argument):
    """Whether an argument of pytest names tests of several devices, not just all tests."""
    return Path(str(argument).partition("::")[0]).resolve().is_relative_to(SEVERAL_DEVICES)


def pytest_collection_modifyitems(items):
    """The longest files first, then those of most tests; the order inside of a file stays."""
    tests = collections.Counter(item.path for item in items)
    rank = {name: place for place, name in enumerate(LONGEST)}

    def order(item):
        return rank.get(item.path.name, len(rank)), -tests[item.path], str(item.path)

    items.sort(key=order)


@pytest.fixture(params=MODES)
def compiled(request):
    """Every way in which the active backend runs a function."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed_after_a_module():
    yield
    free_programs()
