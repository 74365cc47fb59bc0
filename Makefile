# Everything here sets up what it needs in .venv; a clean machine needs Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One stamp for each set of extras, so that a target installs what it needs and no more.
STAMP = $(VENV)/.installed-

.PHONY: demo test test-all check format fuzz bench golden golden-all clean

demo: $(STAMP)examples ## train, save, load in another process, compare
	$(BIN)/python examples/digits.py --out demo

test: $(STAMP)dev ## the tests, on the oldest JAX that is supported, on python3's newest, and on the newest of all
	$(BIN)/python tests/versions.py test

test-all: $(STAMP)dev ## the same at length: all tests that depend on JAX on each
	$(BIN)/python tests/versions.py test --all

check: $(STAMP)dev ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(STAMP)dev ## hostile input for SECONDS, of every kind or of KIND
	$(BIN)/python -m tests.adversarial fuzz --seconds $(or $(SECONDS),60) $(addprefix --kind ,$(KIND))

bench: $(STAMP)bench ## the tables of docs/benchmarks.md
	$(BIN)/python -m benchmarks

golden: $(STAMP)dev ## golden packages of this version of JAX; never touches those that are there
	$(BIN)/python tests/golden/make.py

golden-all: $(STAMP)dev ## the same with every JAX that the tests run on
	$(BIN)/python tests/versions.py golden

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(STAMP)%: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis demo
