# `make demo` and `make test` set up everything they need in a local virtual environment.
PYTHON ?= python3
BACKEND ?= jax
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# One for each core, two to four: a worker may need 4 GB.
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

test: lint types test-jax test-tensorflow test-torch

# The inner loop: everything but whole models, on JAX.
quick: lint types
	KERAS_BACKEND=jax $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile tests/test_rooms.py tests/config tests/layers \
	  tests/models/test_refusals.py tests/models/test_weight_table.py tests/checkpoints/test_staging.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test
	$(VENV)/bin/mypy

# In the order of tests/conftest.py, which knows the files that take longest.
PYTEST := $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Part by part: TensorFlow keeps what XLA has compiled for as long as a process lives, and only
# `tests/scale` runs on several simulated devices.
PARTS := "tests/layers tests/config" "tests/transfer tests/cli" "tests/models tests/think tests/training" \
  "tests/tasks" "tests/generation" "tests/scale" "tests/checkpoints $(wildcard tests/test_*.py)"

test-jax test-tensorflow: test-%: $(VENV)/.test
	for part in $(PARTS); do \
	  KERAS_BACKEND=$* $(PYTEST) $$part || exit 1; \
	done

test-torch: $(VENV)/.test
	KERAS_BACKEND=torch $(VENV)/bin/python -m pytest -q -m portable

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
