# Everything runs in .venv, made on first use from setup.cfg and constraints.txt. A call that finds it complete installs nothing.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
# The folder of bench's data: it holds sst2/ and mrpc/, each with train.jsonl and validation.jsonl.
DATA_ROOT ?=
# Test processes side by side. Launched tests start up to two ranks, each a core and about a gigabyte.
WORKERS ?= 2

VENV := .venv
EXTRAS := quickstart,peft,nlg,plots,test,dev
# The checkout's path is part of it: a virtual environment does not survive being moved.
IDENTITY := $(shell { cat setup.cfg constraints.txt pyproject.toml; echo "$(CURDIR) $(EXTRAS)"; } | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(IDENTITY)

# Any shell but make's default one makes it look commands up in the PATH exported here.
SHELL := /bin/bash
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install train test test-cluster bench check clean

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

install: $(STAMP) ## the environment in .venv

train: $(STAMP) ## the default fine-tuning run
	deepspeed launch/train.py --deepspeed ds_configs/zero2.json

# A file's tests share its fixtures, so they stay in one process; the launched ones, which take longest, come first.
test: check ## check, then all tests but test-cluster's (PYTEST_ARGS="-k name" chooses, WORKERS=1 for less memory)
	@python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-cluster: $(STAMP) ## the tests on a Slurm cluster of 4 hosts, made here (root, Debian; elsewhere they say SKIPPED)
	@python -m tests.cluster.parts
	@python -m pytest -m cluster tests/cluster $(PYTEST_ARGS)

bench: $(STAMP) ## speed and memory beside other trainers' (DATA_ROOT=DIR holds sst2/ and mrpc/; or BENCH_ARGS="--task_name sst2 --data_dir DIR")
	python launch/bench.py $(or $(BENCH_ARGS),--suite --data_root "$(DATA_ROOT)")

check: $(STAMP) ## lint, format, types, import layers
	ruff check .
	ruff format --check .
	mypy adakron launch
	lint-imports --no-logo

clean: ## remove .venv and everything else that can be made again (never runs/)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment without .complete was interrupted, or is another checkout's: it is made again from nothing.
$(STAMP):
	@command -v "$(PYTHON)" >/dev/null || { echo "make: no command '$(PYTHON)'; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1), AdaKron needs 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	@if [ "$$(cat $(VENV)/.complete 2>/dev/null)" != "$(CURDIR)" ]; then \
		"$(PYTHON)" -m venv --clear $(VENV) || { echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@rm -f $(VENV)/.complete $(VENV)/.installed-*
	@echo "make: installing into $(VENV); the first time takes a few minutes"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@echo "$(CURDIR)" > $(VENV)/.complete
	@touch $@
