# Every target makes its own environment first: scripts/environment.py says where and how.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
PY := .venv/bin/python
JOBS ?= 2
TESTS ?= tests src/inlay
CHECK := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
XDIST := --numprocesses $(JOBS) --dist worksteal
PYTEST := $(CHECK) $(PY) -m pytest $(XDIST) --doctest-modules
# tests/dropin runs where dropin/ is installed in the place of PEFT
DROPIN := $(CHECK) .venv-dropin/bin/python -m pytest $(XDIST) tests/dropin

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all bench lint types format clean

help:
	@echo "make demo      adapt a real pretrained model, and show what came of it"
	@echo "make test      what has to pass: lint, types, tests (TESTS=..., JOBS=$(JOBS))"
	@echo "make test-all  the slow tests too"
	@echo "make bench     speed and memory, beside the incumbent"
	@echo "make format    rewrite the sources in the house's style"
	@echo "make clean     remove .venv and everything that tools left in the tree"

env:
	@$(PYTHON) scripts/environment.py

demo: env
	@$(PY) -m inlay demo

test: lint types
	$(DROPIN) -m "not slow"
	$(PYTEST) -m "not slow" $(TESTS)

test-all: lint types
	$(DROPIN)
	$(PYTEST) $(TESTS)

bench: env
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(PY) -m benchmarks

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: env
	$(PY) -m mypy --strict src
	MYPYPATH=src:dropin $(PY) -m mypy --strict -p peft

format: env
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv .venv-dropin build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src dropin tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
