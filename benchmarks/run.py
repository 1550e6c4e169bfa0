"""Measures this project and its peers on the same work, in turn, and writes what it found.

    python -m benchmarks.run [--quick] [--resume] [--only PATTERN] [--by PATTERN] [--out DIR]
                             [--together N]

Every row runs for every contender in a process of its own, one after the other; KerasHub, whose
programs take longest to compile, comes last. Results go to `results.json` after every row, and to
`results.md` and `scaling.png`.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.report import draw, table
from benchmarks.workloads import (
    FIRST_CALLS,
    FLA,
    LLAMA,
    MODELS,
    NOT_TIMED,
    TRANSFORMERS_FLA,
    everything,
)

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = (
    "jax",
    "tensorflow",
    "keras",
    "keras-hub",
    "torch",
    "transformers",
    "numpy",
    "llama-cpp-python",
    "flash-linear-attention",
)
# Contenders that not every machine has: the module they need, and what installs it.
OPTIONAL = {
    LLAMA: ("llama_cpp", "`make bench LLAMA=1`"),
    FLA: ("fla", "`pip install flash-linear-attention`"),
    TRANSFORMERS_FLA: ("fla", "`pip install flash-linear-attention`"),
}
PATIENCE = 600  # seconds for one row of one contender


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few rows, a few minutes")
    parser.add_argument("--only", default="", type=re.compile, help="rows whose name has it")
    parser.add_argument("--by", default="", type=re.compile, help="contenders whose name has it")
    parser.add_argument("--resume", action="store_true", help="keep what --out already holds")
    parser.add_argument(
        "--together",
        type=int,
        choices=range(1, 65),
        metavar="N",
        default=1,
        help="so many compile side by side, then each is timed alone: for a GPU that is lent",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    wanted = [row for row in everything() if args.only.search(row.name)]
    if args.quick:
        wanted = [row for row in wanted if row.quick]
    if not any(args.by.search(contender) for row in wanted for contender in row.contenders):
        parser.error("--only and --by leave nothing to measure")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results = {"machine": machine(), "models": MODELS, "rows": []}
    if args.resume and path.exists():
        before = json.loads(path.read_text())
        if before["machine"] != results["machine"] or before["models"] != MODELS:
            raise SystemExit(f"{path} is from another machine or of other models")
        results["rows"] = before["rows"]
    done = {(result["name"], result["contender"]) for result in results["rows"]}
    pairs = pairs_of(wanted, done, args)
    started = time.perf_counter()
    for number, (row, contender, figures) in enumerate(measured(pairs, args.together), start=1):
        results["rows"].append({**row._asdict(), "contender": contender, **figures})
        path.write_text(json.dumps(results, indent=1) + "\n")
        spent = time.perf_counter() - started
        print(f"[{number}/{len(pairs)}, {spent:.0f} s] {describe(results['rows'][-1])}", flush=True)
    (args.out / "results.md").write_text(table(results))
    if any(result["curve"] for result in results["rows"]):
        draw(results, args.out / "scaling.png")
    print("\n" + table(results))


def pairs_of(wanted, done, args):
    """Rows and contenders that are still to be measured, KerasHub last."""
    pairs = [(row, who) for row in wanted for who in row.contenders if args.by.search(who)]
    pairs = [pair for pair in pairs if (pair[0].name, pair[1]) not in done]
    if any(row.gpu for row, _ in pairs) and gpu() is None:
        print("There is no NVIDIA GPU here: the rows of one are left out")
        pairs = [pair for pair in pairs if not pair[0].gpu]
    for contender, (module, installs) in OPTIONAL.items():
        if find_spec(module) is None and any(who == contender for _, who in pairs):
            print(f"{contender} is not installed and left out: {installs} installs it")
            pairs = [pair for pair in pairs if pair[1] != contender]
    if args.quick:  # compiling KerasHub's alone would take minutes
        long = ("prefill", *FIRST_CALLS)
        pairs = [p for p in pairs if p[0].task not in long or "keras_hub" not in p[1]]
    return sorted(pairs, key=lambda pair: pair[1].startswith("keras_hub"))


def measured(pairs, together):
    """`(row, contender, figures)` one after the other, with `{"failed": why}` for figures."""
    for i in range(0, len(pairs), together):
        runs = [(*pair, Run(*pair)) for pair in pairs[i : i + together]]
        for _, _, run in runs:
            run.listen()
        for row, contender, run in runs:
            yield row, contender, run.figures()


class Run:
    """A row of one contender in a process of its own, that waits to be timed after its first call.

    Its errors go to a file: a pipe that nobody reads would stop it.
    """

    found = None

    def __init__(self, row, contender):
        work = json.dumps({key: getattr(row, key) for key in ("task", "model", "size", "gpu")})
        command = [sys.executable, "-m", "benchmarks.worker", contender, work, "--wait"]
        self.errors = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.patience = threading.Timer(PATIENCE, self.process.kill)
        self.patience.daemon = True  # an interrupted run does not wait for it
        self.patience.start()

    def listen(self):
        """Until it is ready to be timed, tells its figures, or ends."""
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                self.found = json.loads(line.removeprefix("RESULT "))
            if line.startswith(("READY", "RESULT ")):
                break

    def figures(self):
        if self.found is None:
            with contextlib.suppress(BrokenPipeError):  # it has failed: see what it said
                self.process.stdin.write("go\n")
                self.process.stdin.flush()
            self.listen()
        code = self.process.wait()
        late = not self.patience.is_alive()
        self.patience.cancel()
        if self.found is not None:
            return self.found
        if late:
            return {"failed": f"not done after {PATIENCE} s"}
        self.errors.seek(0)
        last = [line for line in self.errors.read().splitlines() if line.strip()][-1:]
        return {"failed": f"exit {code}: {''.join(last)[:200]}"}


def describe(result):
    what = f"{result['name']}, {result['contender']}: "
    if "failed" in result:
        return what + result["failed"]
    if result["task"] in NOT_TIMED:
        received, least = (result[f"{which}_bytes"] / 2**30 for which in ("received", "least"))
        return what + f"{received:.1f} GiB received per device, at least {least:.1f}"
    return (
        what + f"{result['seconds'] * 1e3:.1f} ms, first call {result['first_call_seconds']:.1f} s"
    )


def machine():
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = gpu()
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
    }
    return found if name is None else {**found, "gpu": name}


def gpu():
    """The name of the first NVIDIA GPU, or `None`; asked without JAX, which would take it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return names[0].strip() if names else None


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
