# Everything runs in .venv, which each target makes when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test check bench clean

help:
	@echo "make demo    install, train a small BDH for two minutes, print a sample"
	@echo "make test    install, then lint, types and all tests"
	@echo "make check   lint and types only"
	@echo "make bench   speed and memory against the physical limits (minutes)"

demo: $(VENV)/run
	$(BIN)/python train.py --config configs/quickstart.yaml
	$(BIN)/python sample.py checkpoints --prompt "def " --max-new-tokens 400 --temperature 0.7 --seed 1

test: check
	$(BIN)/python -m pytest

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

bench: $(VENV)/run
	$(BIN)/python -m bench.loader
	$(BIN)/python -m bench.checkpoint
	$(BIN)/python -m bench.loop

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: requirements.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/run
