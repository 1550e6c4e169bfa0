"""Runs one row for one contender in a process of its own and prints the figures as JSON.

python -m benchmarks.worker CONTENDER '{"task": ..., "model": ..., "size": {...}, "gpu": false}'

With `--wait` it says READY after its first call and measures when it is told a line.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.workloads import DEVICES, FIRST_CALLS, MODELS, NOT_TIMED

BUDGET = 5.0  # seconds of repeated runs
MOST_RUNS = 9
GPU_BUDGET = 1.0
GPU_RUN = 0.1  # seconds of work that is waited for at once
# A program that never runs needs no machine code that is fast.
SIMULATED = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
WITH_CONFIG = (
    "prefill",
    "read",
    "read_prompts",
    "train",
    "decode",
    "gradients",
    "products",
    *FIRST_CALLS,
    *NOT_TIMED,
)


def main():
    contender, row = sys.argv[1], {"gpu": False, **json.loads(sys.argv[2])}
    with TemporaryDirectory() as folder:
        if row["size"].pop("kept", False):
            os.environ |= programs_kept_in(folder)
            command = [sys.executable, "-m", "benchmarks.worker", contender, json.dumps(row)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measure(contender, row)


def programs_kept_in(folder):
    """The environment in which JAX and TensorFlow keep programs, and read those of others."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "TF_XLA_FLAGS": f"--tf_xla_persistent_cache_directory={folder}",
    }


def measure(contender, row):
    library, _, backend = contender.partition("-")
    os.environ["KERAS_BACKEND"] = backend or "jax"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if row["task"] in NOT_TIMED:  # before JAX starts
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SIMULATED}"

    # What else is on the GPU may need the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if contender == "transformers":  # it would take the kernels of fla where that is installed
        sys.modules["fla"] = None

    module = importlib.import_module(f"benchmarks.contenders.{library}{'_gpu' * row['gpu']}")
    if row["gpu"] and not module.sees_gpu():
        raise SystemExit(f"{contender} sees no GPU")
    size = row["size"]
    if row["task"] in WITH_CONFIG:
        size = {"config": MODELS[row["model"]], **size}
    work = getattr(module, row["task"])(**size)
    figures = work.notes() if row["task"] in NOT_TIMED else timed(work, row["gpu"])
    print("RESULT " + json.dumps(figures))


def timed(work, gpu=False):
    """Seconds of the first run and of those after it, memory, and what the work notes itself."""
    before = _peak()
    first = _timed(work.run)
    peak_first = _peak()
    if "--wait" in sys.argv:  # for its turn: others are timed, or still compile
        print("READY", flush=True)
        sys.stdin.readline()
    runs = _gpu_runs(work.run) if gpu else _runs(work.run, BUDGET)
    # The second run still warms caches and allocators up.
    seconds = median(runs[1:])
    figures = {
        "seconds": seconds,
        "fastest": min(runs),
        "slowest": max(runs[1:]),
        "units_per_second": work.units / seconds,
        "first_call_seconds": first,
        "peak_mib": _peak(),
        "peak_mib_before": before,
        "peak_mib_first": peak_first,
    }
    if work.temp_bytes is not None:
        figures["temp_mib"] = work.temp_bytes() / 2**20
    if work.error is not None:
        figures["error"] = work.error()
    if work.notes is not None:
        figures |= work.notes()
    return figures


def _runs(run, budget):
    runs, spent = [], 0.0
    while len(runs) < 2 or (spent < budget and len(runs) < MOST_RUNS):
        runs.append(_timed(run))
        spent += runs[-1]
    return runs


def _gpu_runs(run):
    """Seconds of the work done once, and then of each time of as many as `GPU_RUN` has room for."""
    once = _timed(run)
    times = max(1, round(GPU_RUN / once))
    return [once, *(spent / times for spent in _runs(lambda: run(times), GPU_BUDGET))]


def _timed(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
