# make demo            the main job, once, on a stack of its own      make demo ARGS=--container
# make up              the stack in the foreground until Ctrl-C
# make test            the tests, within 12 minutes on two cores       make test ARGS='-k cancel'
# make test-long       those that take minutes: faults of EC2, machines and container builds, software in containers
# make check           format, lint, types, layers
# Each does the set-up that is missing; a second time there is none to do.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON_READY := $(VENV)/.ready-python
PACKAGES_READY := $(VENV)/.ready-packages
KILN_READY := $(VENV)/.ready-kiln
ARGS ?=
# Most tests wait for processes rather than compute; a file's tests share what they start, and stay together.
JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup packer containers test-tools demo up test test-long check bench lock clean

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST))

setup: $(KILN_READY) packer containers

$(PYTHON_READY): | scripts/setup.sh
	scripts/setup.sh venv $(VENV)
	@touch $@

$(PACKAGES_READY): requirements.lock $(PYTHON_READY)
	@echo "setup: installing Python packages, some minutes the first time" >&2
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	@touch $@

$(KILN_READY): pyproject.toml $(PACKAGES_READY)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

packer:
	@scripts/setup.sh packer

containers:
	@scripts/setup.sh containers

test-tools:
	@scripts/setup.sh test-tools

demo: setup
	$(BIN)/kiln demo $(ARGS)

up: setup
	@exec $(BIN)/kiln up

test: setup test-tools
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not long" $(ARGS)

test-long: setup test-tools
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m long $(ARGS)

check: $(KILN_READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	@scripts/setup.sh bench-tools
	$(BIN)/python -m bench $(ARGS)

# Versions and hashes; no index is named, so that each host uses its own.
lock: $(KILN_READY)
	$(BIN)/uv pip compile pyproject.toml --group dev --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header -o requirements.lock

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
