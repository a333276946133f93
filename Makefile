# `make up` runs the example fleet; `make test` proves that all of this works. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3; do command -v $$each && break; done)
FLEET ?= $(or $(RECOVERY_FLEET),examples/fleet.json)
# Extra options of `recovery up` (make up ARGS=--leave-models) and of pytest (make test PYTEST="-k up -x").
ARGS ?=
PYTEST ?=
# Most tests wait for processes; two at a time keep two cores busy. Tests of one file share what they started.
JOBS ?= 2
# In CI a test of real processes that failed is tried once more, and the summary counts it as "rerun": a look worth taking.
RERUNS := $(if $(CI),--reruns 1,)
RUN := -n $(JOBS) --dist loadfile $(RERUNS)

# What `.ci/run` runs beside `make test`.
SHARES := test-operate test-frontdoor test-durability test-deploy test-vllm
# Folders of tests that belong to a share, so `make test` leaves them out.
APART := tests/api tests/browser tests/frontdoor tests/change tests/durability tests/deploy tests/vllm

.PHONY: help up down status install dev check lint types layers pure test shares test-operate test-frontdoor test-durability test-deploy test-vllm bench soak-frontdoor bench-frontdoor bench-vllm readme clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

up: $(VENV)/.installed ## everything on this machine: Redis, workers, clock, API, front door, Flower, the example fleet
	@exec $(BIN)/recovery up --fleet $(FLEET) $(ARGS)

down: $(VENV)/.installed ## end whatever an earlier `make up` left, even after its kill -9
	@exec $(BIN)/recovery down $(ARGS)

status: $(VENV)/.installed ## what runs where, and how it is
	@exec $(BIN)/recovery status

install: $(VENV)/.installed ## the virtual environment with what running needs
dev: $(VENV)/.installed-dev ## the same with what the tests need

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment: install your system's python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

check: lint types layers pure ## the fast half: ruff, mypy --strict, the layer rules, the pure tests

lint: dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: dev
	$(BIN)/mypy

layers: dev
	$(BIN)/lint-imports

pure: dev
	$(BIN)/python -m pytest tests/core

test: lint types layers ## everything: checks, pure, contract, process and command line tests
	$(BIN)/python -m pytest $(RUN) -m 'not vllm' $(addprefix --ignore=,$(APART)) $(PYTEST)

shares: $(SHARES) ## what .ci/run runs beside `make test`

test-operate: dev ## management API, metrics, alert rules, the status page in a headless Chromium
	$(BIN)/python -m pytest $(RUN) tests/api $(wildcard tests/browser) $(PYTEST)

test-frontdoor: dev ## the front door on simulated replicas, rolls and changed fleet files under load
	$(BIN)/python -m pytest $(RUN) tests/frontdoor $(wildcard tests/change) $(PYTEST)

test-durability: dev ## random walks through a simulated world, a cut at every step, chaos on real processes
	$(BIN)/python -m pytest $(RUN) tests/durability $(PYTEST)

test-deploy: dev ## compose, units, access rules, packages, a clean clone, every command of the README
	$(BIN)/python -m pytest $(RUN) tests/deploy $(PYTEST)

test-vllm: dev ## a real vLLM on CPU (built once into the cache, 3.5 GB), broken in every way; 10 to 15 minutes
	@if tests/vllm/setup/build.sh; then $(BIN)/python -m pytest $(RUN) tests/vllm --durations 15 $(PYTEST); \
	elif [ -n "$$CI" ]; then exit 1; \
	else echo "test-vllm: skipped, because a vLLM for CPU cannot be installed here (above is why); in CI this fails"; fi

soak-frontdoor: dev ## a thousand streams through the front door for ten minutes: every token, and level memory
	FRONTDOOR_STREAM_S=600 $(BIN)/python -m pytest -s tests/frontdoor/test_streams.py

bench-frontdoor: dev ## the front door beside nginx, vllm-router and no proxy at all
	$(BIN)/python -m tests.bench.frontdoor $(ARGS)

bench-vllm: dev ## seconds from each fault to the first good token of a real vLLM, into docs/figures/vllm.json; about 15 minutes
	@tests/vllm/setup/build.sh
	$(BIN)/python -m tests.bench.vllm --json docs/figures/vllm.json $(ARGS)

bench: dev ## the figures of the README, beside their floors and peers, into bench.json; takes about half an hour
	$(BIN)/python -m tests.bench.control_plane $(ARGS)

readme: dev ## write the README's tables anew, from the code
	$(BIN)/python -m tests.cli.render_readme

clean: ## remove what was built; what runs and RECOVERY_HOME stay
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: mutants chaos chaos-long walk-long
mutants: dev ## break one rule after another in a copy: which test catches it; about ten minutes
	$(BIN)/python -m tests.durability.mutants $(ARGS)

chaos: dev ## 90 s of faults against an installation of its own, the same ones each time
	$(BIN)/recovery chaos --seconds 90 --seed 7

chaos-long: dev ## 15 minutes of faults with each of three other seeds, into docs/figures/chaos.json
	$(BIN)/python -m tests.durability.chaos_figures $(ARGS)

walk-long: dev ## 10,000 random walks through a simulated world, and 1,250 on the real scripts
	RECOVERY_WALKS=10000 $(BIN)/python -m pytest tests/durability/test_walk.py
