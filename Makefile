# Everything below runs in .venv, which each target makes and fills by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
PEERS ?=

.PHONY: serve chat test check format bench kernels gemma reference clean help

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

serve: $(VENV)/.installed ## serve the default model on http://127.0.0.1:8000 (ARGS="MODEL --port 9000 ...")
	@$(BIN)/inflightd serve $(ARGS)

chat: $(VENV)/.installed ## talk to the running server in the terminal
	@$(BIN)/inflightd chat $(ARGS)

test: $(VENV)/.installed-dev ## run the tests (ARGS="tests/scheduler -k prefix")
	@# Tests start dozens of Python processes, each of which would compile everything anew without bytecode.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: $(VENV)/.installed-dev ## lint, formatting, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## reformat and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev ## benchmark over HTTP (PEERS=DIR adds the peers that were set up there)
	$(BIN)/python -m tests.benchmarks.serve $(if $(PEERS),--peers $(PEERS)) $(ARGS)

kernels: $(VENV)/.installed-dev ## compile the GPU kernels, without a GPU (ARGS="--arch 90" for one architecture)
	$(BIN)/python -m engine_runtime.kernels.compile $(ARGS)

gemma: $(VENV)/.installed-dev ## fetch Gemma 3 270M (240 MB, Gemma terms) and compare it with transformers
	$(BIN)/python -m tests.reference.gemma3_270m
	$(BIN)/python -m pytest tests/engine_runtime/models -k gemma3_270m $(ARGS)

reference: ## record again what transformers + torch answer (makes a venv of its own with torch)
	$(PYTHON) -m venv .venv-reference
	.venv-reference/bin/python -m pip install -q torch==2.13.0 accelerate -e '.[cpu]'
	.venv-reference/bin/python -m tests.reference.record

clean: ## remove the virtual environments and caches of this folder
	rm -rf $(VENV) .venv-reference .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "inflightd needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "On Debian: apt install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing inflightd into $(VENV) (once) ..."
	@$(PIP) install --quiet --editable '.[cpu]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing inflightd and its test tools into $(VENV) (once) ..."
	@$(PIP) install --quiet --editable '.[dev,cpu,gpu,kernels,otel]'
	@touch $@ $(VENV)/.installed
