# Everything runs in .venv, which each target makes when it is missing.
# `make bench REFERENCE=DIR` sets BDH beside a clone of pathwaycom/bdh in DIR; with NANOGPT=DIR and
# TEXT=FILE, GPT beside a clone of karpathy/nanoGPT.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

# The default torch for Linux brings gigabytes of CUDA. On a machine without a GPU, name the index of
# PyTorch's CPU wheels (pytorch.org, Get Started): make TORCH_INDEX=https://... demo
TORCH_INDEX ?=

.PHONY: help demo quick test kernels check facts browser bench clean

help:
	@echo "make demo    install, train a small BDH for minutes, print a sample, write a report"
	@echo "make quick   lint, types and the tests that take no processes or training: a minute or so"
	@echo "make test    install, then lint, types and all tests"
	@echo "make kernels Triton kernels without a GPU: interpreted, and compiled for several GPUs"
	@echo "make check   lint and types only"
	@echo "make facts   measures of the code: lines, functions, comments, import depth"
	@echo "make bench   speed and memory against the physical limits (minutes)"

demo: $(VENV)/run
	$(BIN)/python train.py --config configs/quickstart.yaml
	$(BIN)/python sample.py checkpoints --prompt "def " --max-new-tokens 400 --temperature 0.7 --seed 1
	$(BIN)/python runs.py report checkpoints -o checkpoints/report.html

# Tests start hundreds of processes; without bytecode files each would compile the program anew.
unexport PYTHONDONTWRITEBYTECODE

# A process per core, up to 4, and a thread in each (tests/conftest.py). `worksteal` starts with whole
# stretches of files, so that most fixtures of a file are made once, and shares out what is left at
# the end: by file, the longest one would be waited for.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal

test: check browser
	$(BIN)/python -m pytest $(PARALLEL)

quick: check
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not browser and not gpu"

# In an environment of its own: Triton's interpreter needs an older numpy.
kernels: $(VENV)-kernels/triton
	$(VENV)-kernels/bin/python -m pytest tests/model/test_bdh_triton.py tests/precision/test_fp8_cast.py

$(VENV)-kernels/triton: requirements.txt requirements-dev.txt requirements-gpu-dev.txt
	$(MAKE) VENV=$(VENV)-kernels $(VENV)-kernels/dev
	$(VENV)-kernels/bin/pip install --quiet --no-deps -r requirements-gpu-dev.txt
	@touch $@

facts: $(VENV)/bin/python
	@$(BIN)/python -m bench.facts

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

# The report is tested in a real browser where there is one. As root on Debian, as in a container for
# tests, Chromium is installed for that; `make NO_BROWSER=1 test` leaves the machine as it is.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || [ -n "$(NO_BROWSER)" ] \
	|| [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null \
	|| { echo "Installing Chromium for the tests of the report..."; \
	apt-get -qq update && apt-get -qq install --yes chromium >/dev/null; } \
	|| echo "Chromium could not be installed: the tests that need it will be skipped."

bench: $(VENV)/run
	$(BIN)/python -m bench.loader
	$(BIN)/python -m bench.checkpoint
	$(BIN)/python -m bench.loop
	$(BIN)/python -m bench.precision --only size,time
	$(BIN)/python -m bench.runs
	$(BIN)/python -m bench.forecast --steps 20
	$(BIN)/python -m bench.recompute --output
	$(BIN)/python -m bench.bdh $(if $(REFERENCE),--reference $(REFERENCE)) --output
ifneq ($(TEXT),)
	$(BIN)/python -m bench.gpt $(if $(NANOGPT),--reference $(NANOGPT)) --text $(TEXT) --output
endif

clean:
	rm -rf $(VENV) $(VENV)-kernels .pytest_cache .ruff_cache .mypy_cache .hypothesis

# A venv that was made in part (Debian without python3-venv) would pass for a whole one.
$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or \
	newer, or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or \
	newer is needed, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Name another one: \
	make PYTHON=python3.12 ..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/torch: requirements.txt | $(VENV)/bin/python
	@index="$(strip $(TORCH_INDEX))"; torch="$$(grep '^torch' requirements.txt)"; \
	[ -z "$$index" ] \
	|| $(PIP) --no-deps --index-url "$$index" "$$torch"
	@touch $@

$(VENV)/run: requirements.txt $(VENV)/torch
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt $(VENV)/torch
	$(PIP) -r requirements-dev.txt
	@touch $@ $(VENV)/run
