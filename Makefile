# One command each: demo, test, lint, docs, check. They make what they need in $(VENV); `rm -r .venv` starts over.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test lint docs check bench-simulation bench-network clean

help:
	@echo "make demo    federate a small digit classifier and write its report"
	@echo "make test    all tests"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the documentation into site/"
	@echo "make check   lint, test and docs"
	@echo "make bench-simulation    the simulator against pfl and Flower (an hour; ARGS=... as run.py --help says)"
	@echo "make bench-network    the deployment's numbers, on loopback (half an hour; ARGS=... as run.py --help says)"
	@echo "make clean   remove what builds and caches left; keeps $(VENV) and runs/"

demo: $(VENV)/.installed
	$(BIN)/coterie run examples/digits.toml

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-lint
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

check: lint test docs

bench-simulation: $(VENV)/.installed
	$(BIN)/python benchmarks/simulation/run.py $(ARGS)

bench-network: $(VENV)/.installed-test
	$(BIN)/python benchmarks/network/run.py $(ARGS)

clean:
	rm -rf site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# pip understands --group from 25.1 on; a new venv often brings an older one.
$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), Coterie needs 3.11 or newer: say make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) install -c constraints.txt --group $*
	@touch $@
