"""What the whole suite needs before Keras is imported, and the ways to run a function."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the suite's time would go into machine code that runs for milliseconds: it is made without
# optimization, by the emitters that take half as long, and in one piece, for the workers have all
# cores already. XLA's own passes, on which memory and the order of operations depend, are those of
# any program.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1",
)

import pytest

from tests.support.memory import free_programs
from tests.support.running import MODES


@pytest.fixture(params=MODES)
def compiled(request):
    """Every way in which the active backend runs a function."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed_after_a_module():
    yield
    free_programs()
