# Everything happens in a virtual environment in this folder; nothing global is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# TORCH chooses the build: "make demo TORCH='torch==2.13.0 --index-url ...'" for CUDA or another index (see README).
TORCH ?= torch==2.13.0

.PHONY: demo test test-long lint install check clean
demo: $(VENV)/.kernels
	$(BIN)/mimoflash demo

test: $(VENV)/.kernels
	$(BIN)/python -m pytest

test-long: $(VENV)/.kernels
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.kernels

$(VENV)/.installed: pyproject.toml
	@$(MAKE) --no-print-directory check
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev,peers]'
	@touch $@

# pip has compiled the CPU kernels; this does it again after a change.
$(VENV)/.kernels: $(VENV)/.installed mimoflash/kernels/compile.py $(wildcard mimoflash/kernels/cpu/*.h mimoflash/kernels/cpu/*.cpp)
	$(BIN)/python -m mimoflash.kernels.compile
	@touch $@

# What pip cannot install, with the line that does.
check:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mimoflash needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Give another: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv is missing: sudo apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || \
	  { echo "Python's headers are missing: sudo apt-get install python3-dev"; exit 1; }
	@command -v g++ >/dev/null || \
	  { echo "a C++ compiler is missing: sudo apt-get install g++"; exit 1; }

clean:
	rm -rf $(VENV) mimoflash/kernels/cpu/*.so build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
