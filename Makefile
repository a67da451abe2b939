# Every target sets up what it needs: .venv, the dependencies at the versions in constraints-dev.txt, lastgood itself.
#
#   make test PYTHON=python3.12           another Python (for a new .venv)
#   make test ARGS='tests/unit -k events' part of the tests
#   make demo ARGS='--help'               options of the command behind demo and bench

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints-dev.txt
# Tests that mostly wait for processes and disks: one more at a time than there are processors.
TOGETHER := -n $(shell expr $$(nproc 2>/dev/null || echo 1) + 1) --dist loadgroup --no-loadscope-reorder --timeout-method=signal --timeout=400
DEV_READY := $(VENV)/.ready-dev
BENCH_READY := $(VENV)/.ready-bench
FUZZ_READY := $(VENV)/.ready-fuzz

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test coverage crash gate check format bench clean

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(DEV_READY) ## the virtual environment alone

demo: $(DEV_READY) ## train, kill, resume: the main job on real text, in about two minutes
	$(BIN)/lastgood demo $(ARGS)

test: $(DEV_READY) ## the tests, several files at a time
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest $(TOGETHER)
else
	$(BIN)/python -m pytest $(ARGS)
endif

coverage: $(DEV_READY) ## the same with line and branch coverage, which takes longer
	$(BIN)/python -m pytest $(TOGETHER) --cov --cov-report=term

# Marked `crash` in the tests: the same promises as in `make test`, broken into a hundred times instead of five.
crash: $(FUZZ_READY) ## the tests that take too long for make test: power cuts, faults, kills, fuzzing, long runs
	$(BIN)/python -m pytest $(TOGETHER) -m crash $(ARGS)

gate: $(DEV_READY) ## the mutation gate: takes one safeguard after the other out of a copy; a test has to notice
	$(BIN)/python -m tests.mutations.gate $(ARGS)

check: $(DEV_READY) ## lint, format, types, layers
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo

format: $(DEV_READY) ## rewrite the code the way check wants it, where that can be done by a tool
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(BENCH_READY) ## saves and loads against the disk's limit and other libraries
	$(BIN)/python benchmarks/run.py $(ARGS)

clean: ## remove .venv and all that was generated
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: whatever else is resolved later then finds the pinned build in place.
$(DEV_READY): pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lastgood needs Python 3.11 or newer; '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments: install its venv and ensurepip modules" >&2; \
	    echo "(on Debian and Ubuntu: apt-get install python3-venv), or name another: make PYTHON=... " >&2; exit 1; }; \
	  echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing what lastgood needs into $(VENV) (once; torch is large)"
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

# Not to be had for every Python and platform: its tests say so, and are skipped then.
$(FUZZ_READY): $(DEV_READY)
	@$(PIP_INSTALL) -e '.[fuzz]' || echo "atheris cannot be installed here: the tests that need it are skipped" >&2
	@touch $@

$(BENCH_READY): $(DEV_READY)
	@$(PIP_INSTALL) -e '.[bench]'
	@touch $@
