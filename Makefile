# Every target installs what it needs into $(VENV) first, once; `make help` lists the targets and the settings.

VENV ?= .venv
JOBS ?= 2
NEWEST_TRITON ?= 3.9.0
NEWEST := $(VENV)/triton-$(NEWEST_TRITON)
ARGS ?=

# A second environment, with the oldest FlashInfer.
OLDEST ?= .venv-oldest-flashinfer

# Where pip takes torch from; empty is pip's own configuration. PyTorch's index of CPU wheels saves gigabytes of CUDA
# packages where pip would take those.
TORCH_INDEX ?=

# $(call with,EXTRAS) is what a target depends on: those extras of pyproject.toml, installed.
ifdef PYTHON
PY   := $(PYTHON)
with  = own-torch
else
PY   := $(VENV)/bin/python
with  = $(addprefix $(VENV)/.with-,$(1))
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest-flashinfer offline offline-newest lint typecheck bench clean own-torch
.NOTPARALLEL:  # one pip at a time

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Settings:"
	@echo "  PYTHON=...       use this interpreter as it is (it has its own torch, e.g. a CUDA build): nothing is installed"
	@echo "  VENV=.venv       where the virtual environment goes"
	@echo "  TORCH_INDEX=...  the index that torch comes from, e.g. that of PyTorch's CPU wheels (default: pip's own)"
	@echo "  JOBS=2           test processes; 1 runs without pytest-xdist"
	@echo "  ARGS=...         more arguments, e.g. make test ARGS='-k mm_fp4'"

demo: $(call with,demo)  ## quantize a real model and show what changes
	$(PY) -m torch_fp4ops demo $(ARGS)

test: $(call with,test demo bench)  ## all tests that this machine can run
	$(PY) -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS)) $(ARGS)

test-oldest-flashinfer: $(OLDEST)/.done  ## the FlashInfer adapters against the oldest version that they support
	$(OLDEST)/bin/python -m pytest tests/ops/test_flashinfer.py tests/ops/test_flashinfer_silu_and_mul.py $(ARGS)

offline: $(call with,test)  ## compile every Triton kernel for every target, without a GPU, and print a table
	$(PY) -m compile_tests.offline --jobs $(JOBS) $(ARGS)

# Compiling needs no torch that goes with this Triton, so it lies beside the environment's own.
offline-newest: $(call with,test)  ## the tests of that, with the newest Triton that is known to work
	test -d $(NEWEST) || $(PY) -m pip install -qq --no-deps --target $(NEWEST) triton==$(NEWEST_TRITON)
	PYTHONPATH=$(NEWEST) $(PY) -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS)) \
		compile_tests/test_triton_offline.py compile_tests/test_triton_gemm_offline.py $(ARGS)

lint: $(call with,dev)  ## style and format, nothing is changed
	$(PY) -m ruff check
	$(PY) -m ruff format --check

typecheck: $(call with,dev)  ## mypy
	$(PY) -m mypy

bench: $(call with,bench)  ## benchmarks; needs a GPU to mean anything
	$(PY) -m torch_fp4ops bench $(ARGS)

clean:  ## remove the virtual environment, caches and builds
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first and alone: see constraints.txt.
PIP_INSTALL = $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt

$(VENV)/.torch: constraints.txt
	python3 -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/.with-%: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) -e '.[$*]'
	touch $@

# Without CuTe DSL: FlashInfer before 0.7 can't be imported beside it where there is no GPU.
$(OLDEST)/.done: constraints.txt
	python3 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		pytest hypothesis numpy apache-tvm-ffi click einops ninja nvidia-ml-py packaging requests tabulate tqdm
	$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check --no-deps flashinfer-python==0.6.11
	touch $@

own-torch:
	@$(PY) -c 'import torch' || { echo "PYTHON=$(PYTHON) must have torch; leave PYTHON out to have a CPU build installed"; exit 1; }
