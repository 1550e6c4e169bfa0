# `make demo` and `make test` set up everything they need in a local virtual environment.
PYTHON ?= python3
BACKEND ?= jax
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# One for each core, two to four: a part of the suite may need 4 GB.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, max(2, os.cpu_count())))")
export TF_CPP_MIN_LOG_LEVEL := 3

BENCH ?=
# `make bench LLAMA=1` measures llama.cpp too, which pip compiles: minutes, and a C++ compiler.
LLAMA ?=
.PHONY: demo bench test quick lint types test-jax test-tensorflow test-torch clean

demo: $(VENV)/.demo
	KERAS_BACKEND=$(BACKEND) $(VENV)/bin/python notebooks/standard_library_demo.py

# The rows on speculative decoding need the model that `make demo` leaves.
bench: $(VENV)/.bench $(if $(LLAMA),$(VENV)/.llama)
	$(VENV)/bin/python -m benchmarks.run $(BENCH)

test: lint types
	$(PARALLEL) $(foreach part,$(PARTS),jax/$(part) tensorflow/$(part)) test-torch

test-jax test-tensorflow: test-%:
	$(PARALLEL) $(addprefix $*/,$(PARTS))

test-torch: $(VENV)/.test
	KERAS_BACKEND=torch $(PYTEST) -m portable

# The inner loop: everything but whole models, on JAX.
quick: lint types
	$(PARALLEL) $(addprefix jax/,$(QUICK))

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test
	$(VENV)/bin/mypy

# Parts of the suite, as many at a time as there are workers: all of them, whatever fails, and what one
# prints in one piece, where make can do that.
SYNC := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
PARALLEL = +$(MAKE) --no-print-directory --keep-going --jobs=$(WORKERS) $(SYNC)
PYTEST := $(VENV)/bin/python -m pytest -q

# Every part is a process of its own: TensorFlow keeps what XLA has compiled for as long as a process
# lives. A part is a file, or all files of a folder that are not parts themselves; those that take
# longest come first, so that no worker is left alone with one at the end.
PARTS := \
  tests/scale \
  tests/test_notebooks.py \
  tests/tasks \
  tests/tasks/test_mirrored.py \
  tests/tasks/test_routed_tasks.py \
  tests/training \
  tests/models \
  tests/layers \
  tests/generation/test_speculation.py \
  tests/models/test_routing.py \
  tests/test_readme.py \
  tests/models/test_routed_caches.py \
  tests/tasks/test_variants.py \
  tests/generation \
  tests/tasks/test_routed_generation.py \
  tests/checkpoints \
  tests/transfer/conversion \
  tests/transfer/growth \
  tests/layers/ops \
  tests/tasks/test_thinking_tasks.py \
  tests/transfer/distill \
  tests/think \
  tests \
  tests/transfer/merge \
  tests/config \
  tests/cli
QUICK := tests/layers tests/layers/ops tests/config tests/test_rooms.py tests/models/test_refusals.py \
  tests/models/test_weight_table.py tests/checkpoints/test_staging.py
files = $(if $(filter %.py,$1),$1,$(filter-out $(PARTS),$(wildcard $1/test_*.py)))

JAX := $(addprefix jax/,$(sort $(PARTS) $(QUICK)))
TENSORFLOW := $(addprefix tensorflow/,$(PARTS))
.PHONY: $(JAX) $(TENSORFLOW)

$(JAX): jax/%: $(VENV)/.test
	KERAS_BACKEND=jax $(PYTEST) $(call files,$*)

$(TENSORFLOW): tensorflow/%: $(VENV)/.test
	KERAS_BACKEND=tensorflow $(PYTEST) $(call files,$*)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(PIP) --editable ".[$(BACKEND),demo]"
	touch $@

# The suite needs neither accelerator builds nor transformers: the CPU builds are enough.
$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[jax,demo,test]" tensorflow-cpu
	touch $@

# The peers pull in a torch of their own choice unless the CPU build is there first.
$(VENV)/.bench: $(VENV)/bin/python pyproject.toml
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[jax,bench,demo]" tensorflow-cpu
	touch $@

$(VENV)/.llama: $(VENV)/.bench
	$(PIP) --editable ".[llama]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo
