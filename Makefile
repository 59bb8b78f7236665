# Each target but `clean` sets up .venv on a fresh machine with Python 3.11; `make check` is for before a merge.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
# Processes that run tests. Each has up to ten ranks of its own, most of them idle: two for two cores.
WORKERS ?= 2
DOCS_STAMP := .venv/.docs_installed
TESTS := -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: example validate test coverage test-gpu sweep hosts check docs lint types format clean

example: $(STAMP)
	$(BIN)/python examples/block.py

validate: $(STAMP)
	$(BIN)/python -m moe_dispatch validate

test: $(STAMP)
	$(BIN)/python $(TESTS)

# The same tests, which take a quarter longer.
coverage: $(STAMP)
	$(BIN)/python $(TESTS) --cov

# One process per CUDA device. Without a device it says so, and fails.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu tests/cuda

sweep: $(STAMP)
	$(BIN)/python $(TESTS) -m sweep

# As root: it makes two network namespaces with a link, and removes them.
hosts: $(STAMP)
	$(BIN)/python -m pytest -q -m hosts tests/hosts

check: coverage lint types docs

docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/pyright --project pyproject.toml

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
# Without what it trains with (datasets, wandb, tensorboard): the tests import its MoE layer, whose needs are in dev.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps torchtitan
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $(DOCS_STAMP)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* docs/_build
