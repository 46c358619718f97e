# Everything sets itself up: `make demo` and `make test` need python3 (3.10 or later) and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint bench clean

# One stamp per set of extras; a changed pyproject.toml installs again.
$(VENV)/base.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	touch $@

$(VENV)/bench.stamp: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

demo: $(VENV)/base.stamp
	$(BIN)/python examples/stdlib_census.py
	$(BIN)/python examples/pipeline.py

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/basedpyright --verifytypes mp_ipcchan --ignoreexternal

test: lint
	$(BIN)/python -m pytest -n 3 --maxschedchunk 1

# The same tests on every other CPython that this machine has.
test-all: test
	PYTHON=$(BIN)/python sh scripts/test-all

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks --json benchmarks.json --svg docs

clean:
	rm -rf $(VENV) .envs
