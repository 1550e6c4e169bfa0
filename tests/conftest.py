"""What the whole suite needs, and the ways to run a function."""

import collections
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

from tests.support.memory import free_programs
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


def pytest_configure():
    set_xla_flags()  # before the first program, which reads them


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
