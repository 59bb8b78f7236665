# `make validate` and `make test` set up .venv on a fresh machine with Python 3.11; `make check` is what CI runs.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: validate test sweep check lint types format coverage clean

validate: $(STAMP)
	$(BIN)/python -m moe_dispatch validate

test: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

sweep: $(STAMP)
	$(BIN)/python -m pytest -q -m sweep

check: test lint types

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
	touch $(STAMP)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
