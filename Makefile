# `make reproduce` and `make test` work on a fresh checkout: they make .venv from the lock first.
PROFILE ?= standard
JOBS ?= 0
SEEDS ?= 0
DEVICE ?= auto
KILLS ?= 200
FUZZ_CASES ?= 100000
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test lint report notebooks verify chaos fuzz clean

help: ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20
	@echo "Variables: PROFILE=smoke|standard|full  JOBS=N (0: one a core)  SEEDS=N (0: the profile's)  DEVICE=auto|cpu|cuda"

setup: $(STAMP) ## make .venv and install the locked versions

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed, and $(PYTHON) is `$(PYTHON) -V`; use make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/replicate list > /dev/null # compiles the modules, and keeps the list for the next call
	@touch $@

reproduce: $(STAMP) ## compute PROFILE afresh, write results/PROFILE and its report (full: data from REPLICATE_DATA)
	$(BIN)/replicate reproduce --profile $(PROFILE) --jobs $(JOBS) --seeds $(SEEDS) --device $(DEVICE)

test: $(STAMP) ## run all tests, the smoke profile inside
	$(BIN)/python -m pytest

lint: $(STAMP) ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

report: $(STAMP) ## write report, tables and README headline again from the last runs
	$(BIN)/replicate report --profile $(PROFILE) $(if $(filter standard full,$(PROFILE)),--readme README.md)

notebooks: $(STAMP) ## execute every notebook on results/PROFILE into results/notebooks, as pages that need no network
	PROFILE=$(PROFILE) $(BIN)/python -m nbconvert --to replicate.report.notebooks.OfflineHTML --execute --output-dir results/notebooks notebooks/*.ipynb

verify: $(STAMP) ## check committed results against their records and manifest
	$(BIN)/replicate verify --profile $(PROFILE)

chaos: $(STAMP) ## kill KILLS sweeps at random times; each must complete on the next call with the same bytes
	$(BIN)/python -m pytest -m slow
	$(BIN)/python tests/chaos.py --kills $(KILLS)

fuzz: $(STAMP) ## feed FUZZ_CASES damaged files to every reader
	FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest tests/fuzz

clean: ## remove .venv, caches and unfinished runs (results stay)
	rm -rf $(VENV) .runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
