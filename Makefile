PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
CONSTRAINTS := tests/constraints.txt

.PHONY: demo test test-all check bench test-zoo clean

demo: .venv/installed  ## train on real digits with every callback, show what it found (seconds, after the installation)
	$(BIN)/bn-lightning demo

test: .venv/installed  ## the whole test suite
	$(BIN)/python -m pytest

test-all: .venv/installed  ## the same with many more random networks and trainings in several processes (half an hour)
	FOLDING_EXAMPLES=5000 $(BIN)/python -m pytest -m "slow or not slow"

check: .venv/installed  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed  ## what the README's table quotes
	$(BIN)/python tests/benchmarks/watching.py
	$(BIN)/python tests/benchmarks/monitors_run.py
	$(BIN)/python tests/benchmarks/folding.py
	$(BIN)/python tests/benchmarks/variants.py
	$(BIN)/python tests/benchmarks/false_alarms.py
	$(BIN)/python tests/benchmarks/recalibration.py
	$(BIN)/python tests/benchmarks/audit.py
	$(BIN)/python tests/benchmarks/audit_static.py
	$(BIN)/python tests/benchmarks/audit_passive.py
	$(BIN)/python tests/benchmarks/audit_rules.py

test-zoo: .venv/installed  ## fold every timm and torchvision network with BN, resumable: make test-zoo ZOO='--minutes 20'
	PYTHONPATH=tests $(BIN)/python -m zoo $(ZOO)

# torchvision goes in without its dependencies: it must not replace the torch that is there.
.venv/installed: pyproject.toml $(CONSTRAINTS) $(wildcard tests/environment/*.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 …")'
	@echo "Setting up .venv (once; torch is the large part) …"
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint $(CONSTRAINTS) --editable '.[demo,test]'
	$(PIP) install --constraint $(CONSTRAINTS) --no-deps torchvision
	$(PIP) install --constraint $(CONSTRAINTS) timm
	$(BIN)/python tests/environment/repair_torchvision.py
	@touch $@

clean:  ## remove what was built and written here
	rm -rf .venv runs build dist lightning_logs
