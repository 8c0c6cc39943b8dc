# Everything here works on a fresh clone with Python 3.11+ and a package index; each target sets up
# what it needs. `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
READY  := $(VENV)/.ready
KVCM   := $(VENV)/bin/kvcm
DATA   ?= ./kvcm-data
PORT   ?= 6382

.DEFAULT_GOAL := help
.PHONY: help setup up demo test lint test-crash test-heavy bench clean

help:
	@echo "make up          set up, then serve in the foreground (DATA=$(DATA) PORT=$(PORT); Ctrl-C stops)"
	@echo "make demo        set up, start, replay a real trace with real bytes for a minute, report, stop"
	@echo "make test        set up, lint, type-check and run the tests"
	@echo "make setup       only make $(VENV)"
	@echo "make test-crash  kill -9 suites, minutes long"
	@echo "make bench       print the figures of docs/performance.md (an hour)"

setup: $(READY)

# The stamp is written last, so an interrupted install is done again.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvcm-ray needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)

up: $(READY)
	$(KVCM) up --data-dir $(DATA) --port $(PORT)

demo: $(READY)
	$(KVCM) demo

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/python -m pytest -q

test-crash: $(READY)
	$(VENV)/bin/python -m pytest -q -m crash

test-heavy: $(READY)
	$(VENV)/bin/python -m pytest -q -m heavy

bench: $(READY)
	$(KVCM) bench data
	$(KVCM) bench lookup
	$(KVCM) bench write
	$(KVCM) bench http
	$(KVCM) bench reclaim
	$(KVCM) bench reclaim --soak 60
	$(KVCM) bench capacity

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
