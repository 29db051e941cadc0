# make demo and make test are all that README asks for; the rest is for those who change the code.

SHELL := /bin/bash
EXTRAS := .[test,lint]
VENV ?= .venv
BIN := $(VENV)/bin

# the first of these that runs and is new enough; a name on PATH may be a shim of nothing
NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)

# another TORCH brings a Triton of its own, so the tested one is then not asked for
TESTED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(TESTED_TORCH)
CONSTRAINTS := $(VENV)/constraints.txt
FREE := torch$(if $(filter $(TORCH),$(TESTED_TORCH)),,|triton)
# the CPU build is a tenth of the size of the CUDA build; off Linux the plain one is a CPU build
GPU := $(shell nvidia-smi -L 2>/dev/null)
CPU_ONLY := $(if $(GPU),,$(filter Linux,$(shell uname -s)))

# -qq leaves errors
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
ARGS ?=

# $(call timed,what,command): runs it and says how long it took
timed = start=$$SECONDS; $(2) || exit; printf '%-52s %5d s\n' '$(1)' $$((SECONDS - start))

.PHONY: help demo test test-slow lint types stubs setup clean venv
help:
	@echo 'make demo       set up, train, kill an actor, recover, speak: about 3 minutes'
	@echo 'make test       set up, pass the tests'
	@echo 'make test-slow  the tests that take longer, and properties on new examples'
	@echo 'make lint       ruff and the import linter'
	@echo 'make types      mypy --strict'
	@echo 'make stubs      the gRPC stubs of moe_router/serving/router.proto'
	@echo 'make setup      the virtual environment in $(VENV) alone'
	@echo 'make clean      remove it, and what tools left behind; runs/ and data/ stay'

demo: setup
	@$(call timed,demo,$(BIN)/moe-router train configs/quickstart.yaml --kill 1@0.5 --restart)

# Triton interprets or compiles, never both in one process. Tests that only compute share two cores;
# the others start processes and measure times, so they run one after another
COMPUTE := $(addprefix tests/,compile kernels layers models routing)
SERIAL := $(addprefix --ignore=,tests/interpreter $(COMPUTE))
test: setup
	@$(call timed,tests,$(PYTEST) -m "not slow" $(SERIAL) $(ARGS))
	@$(call timed,tests in the interpreter,TRITON_INTERPRET=1 $(PYTEST) -n 2 -m "not slow" tests/interpreter $(ARGS))
	@$(call timed,tests that only compute,$(PYTEST) -n 2 -m "not slow" $(COMPUTE) $(ARGS))

test-slow: setup
	@$(call timed,slow tests,$(PYTEST) -m slow $(ARGS))
	@$(call timed,properties on new examples,HYPOTHESIS_PROFILE=explore $(PYTEST) -m hypothesis)

lint: setup
	@$(call timed,ruff,$(BIN)/ruff check . && $(BIN)/ruff format --check .)
	@$(call timed,import linter,PYTHONPATH=.:kernels:cluster $(BIN)/lint-imports)

types: setup
	@$(call timed,mypy,$(BIN)/mypy)

# tests/serving/test_stubs.py holds that they are what router.proto says
stubs: setup
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. moe_router/serving/router.proto

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	@$(MAKE) --no-print-directory venv
	@$(call timed,packages and moe_router,$(PIP) -c $(CONSTRAINTS) -e '$(EXTRAS)')
	@touch $@

# an environment with torch alone
venv:
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer on PATH; install one, or make PYTHON=/path/to/python3'; exit 1; }
	@$(call timed,virtual environment of $(if $(PYTHON),$(shell $(PYTHON) --version 2>&1)),$(PYTHON) -m venv $(VENV))
	@sed -E 's/^($(FREE))==.*//; $$ a torch==$(TORCH)' constraints.txt > $(CONSTRAINTS)
	@$(call timed,torch $(TORCH)$(if $(CPU_ONLY),+cpu),$(if $(CPU_ONLY),$(CPU_TORCH),$(PIP) -c $(CONSTRAINTS) torch))

# PyPI has no CPU build of its own: a configured index or wheel folder may have one
NO_CPU_BUILD := no CPU build of torch on your indexes, taking the larger one; for a small one set PIP_EXTRA_INDEX_URL to the CPU index of PyTorch
CPU_TORCH = { $(PIP) -c $(CONSTRAINTS) torch==$(TORCH)+cpu 2>/dev/null || { echo '$(NO_CPU_BUILD)'; $(PIP) -c $(CONSTRAINTS) torch; }; }

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
