# Every target sets up .venv by itself the first time, and again when the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-levels sanitize check bench native gpu-check

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,dev,peers]'
	touch $(STAMP)

demo: $(STAMP)  ## Train a small hybrid on real text, generate, compare with full attention, write a report.
	$(BIN)/kimi-linear demo

test: $(STAMP)  ## Run the test suite.
	$(BIN)/python -m pytest --numprocesses auto

test-levels: $(STAMP)  ## Run the operator tests at every instruction level, and without native kernels.
	$(BIN)/python scripts/test_levels.py

sanitize: $(STAMP)  ## Run the operator tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.
	$(BIN)/python scripts/test_levels.py --sanitize address,undefined

native: $(STAMP)  ## Compile the native kernels again after a change in csrc.
	$(BIN)/python csrc/build.py

check: $(STAMP)  ## Format, lint, types, import direction.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

bench: $(STAMP)  ## Measure operators and model beside other engines, after the operators' tests; 25 minutes on two cores.
	$(BIN)/python benchmarks/run.py

gpu-check: $(STAMP)  ## Run contracts and benchmarks on a GPU, 10 minutes; says so and stops where there is none.
	$(BIN)/python benchmarks/gpu_check.py
