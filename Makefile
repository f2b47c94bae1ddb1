# `make demo` and `make test` are all that a fresh machine with Python 3.11 or newer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_OPTIONS ?= --disable-pip-version-check --no-warn-script-location
# One thread for PyTorch in each of the two workers: threads that wait for a core that is busy make it slow.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: demo test sweep soak chaos bench bench-quick check lint format clean

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing PyTorch and the other packages into $(VENV), once: some minutes, and with"
	@echo "PyTorch's build for CUDA, which is Linux's default, 2 GB of downloads and 6 GB of disk."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt torch
	$(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt -e '.[bench,demo,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/shoal demo

test: $(STAMP)
	$(PYTEST) -m 'not sweep and not soak'

sweep: $(STAMP)
	$(PYTEST) -m sweep

soak: $(STAMP)
	$(PYTEST) --timeout 3600 -o faulthandler_timeout=3900 -m soak

chaos: $(STAMP)
	$(BIN)/python tests/lab/chaos.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks

bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks --quick

check: lint test

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
