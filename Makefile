PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
FLOOR_PIP := .venv-floor/bin/python -m pip --quiet --disable-pip-version-check
CONSTRAINTS := tests/constraints.txt

.PHONY: demo test test-all test-floor check bench test-zoo clean

demo: .venv/installed  ## train on real digits with every callback, show what it found (seconds, after the installation)
	$(BIN)/bn-lightning demo

# A file of tests at a time to each process; torch's own threads would only wait for each other.
test: .venv/installed  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-all: .venv/installed  ## the same with many more random networks and trainings in several processes (half an hour)
	FOLDING_EXAMPLES=5000 $(BIN)/python -m pytest -m "slow or not slow"

# What old versions say of newer ones beside them is nobody's matter here.
test-floor: .venv-floor/installed  ## what touches Lightning, at the lowest versions pyproject.toml allows, in .venv-floor
	OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -W ignore::DeprecationWarning -n auto --maxprocesses 4 --dist loadfile tests/test_autoload.py tests/callbacks tests/modules tests/projects tests/test_examples.py tests/test_existing_project.py

check: .venv/installed  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed  ## what the README's table quotes
	$(BIN)/python tests/benchmarks/imports.py
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
	$(PIP) install --constraint $(CONSTRAINTS) timm transformers
	$(BIN)/python tests/environment/repair_torchvision.py
	@touch $@

.venv-floor/installed: pyproject.toml $(CONSTRAINTS) $(wildcard tests/environment/*.py)
	@echo "Setting up .venv-floor (once) …"
	$(PYTHON) -m venv .venv-floor
	$(PYTHON) tests/environment/floors.py > .venv-floor/constraints.txt
	$(FLOOR_PIP) install --constraint .venv-floor/constraints.txt --editable '.[demo,test]'
	$(FLOOR_PIP) install --constraint .venv-floor/constraints.txt --no-deps torchvision
	$(FLOOR_PIP) install --constraint .venv-floor/constraints.txt timm transformers
	.venv-floor/bin/python tests/environment/repair_torchvision.py
	@touch $@

clean:  ## remove what was built and written here
	rm -rf .venv .venv-floor runs build dist lightning_logs
