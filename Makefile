PYTHON ?= python

.PHONY: test lint types bench docs

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

bench:
	$(PYTHON) -m pytest benchmarks/ --benchmark

docs:
	$(PYTHON) -m pytest tests/docs
