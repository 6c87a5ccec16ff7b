PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test bench check format clean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed ## create .venv with everything the demo and the tests need

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install ## rank the embedded collection, then inside LlamaIndex, LangChain and Haystack
	$(BIN)/python examples/demo.py

test: install ## run the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: install ## measure the CPU table, memory and many clients (an hour), and write docs/performance.md
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.concurrency
	$(BIN)/python -m benchmarks.report

check: install ## style, types, import direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/zerank_integrations/test_import.py tests/zelo_train/test_import.py

format: install ## lay the code out as `make check` wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
