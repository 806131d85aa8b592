# Everything runs in .venv, which is made from whatever python3 is there. `make help` lists the targets.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# The CUDA library is a step of its own here (`make cuda`): it takes minutes, and only a Hopper GPU runs it.
INSTALL := RAVEN_BUILD_NO_CUDA=1 $(BIN)/python -m pip install --quiet -c constraints.txt
# What an installation depends on: extras, packages, and the sources of the compiled module.
SETUP := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.py csrc/host/*.cpp csrc/include/raven/planner.h)
LIBRARY := raven/libraven_cuda.so
CUDA_SOURCES := raven/__init__.py $(wildcard csrc/*.json csrc/*.py csrc/*.cpp csrc/*.in csrc/ops/* csrc/include/raven/*)
# Tests without a GPU share the processors: a process for each, of one thread, and no more than memory has room for.
SHARED := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal
CXX_FILES = $$(git ls-files csrc 2>/dev/null | grep -E '\.(h|cpp|cu|cuh)$$' || find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport TRITON_INTERPRET
unexport RAVEN_BACKEND
unexport RAVEN_CUDA_BUILD_DIR

.PHONY: help demo test lint format test-cpp test-cuda test-aot test-interpret test-cpu test-gpu bench cuda cuda-if-useful wheel clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-15s %s\n", $$1, $$2}'

demo: .venv/demo.stamp cuda-if-useful  ## train, stream, and write a report; ARGS="--size small" and others: raven demo --help
	$(BIN)/raven demo $(ARGS)

test: lint test-cpp test-cuda test-aot test-interpret test-cpu  ## everything that needs no GPU

lint: .venv/test.stamp  ## ruff, clang-format and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/codespell $$(git ls-files 2>/dev/null | grep -vE '^raven/kernels$$|\.safetensors$$|^bench/results/' || echo README.md raven)

format: .venv/test.stamp  ## rewrite Python, C++ and CUDA files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

test-cpp: .venv/test.stamp  ## C++ build and its tests
	@if ! command -v $${CXX:-c++} > /dev/null; then echo "no C++ compiler: the C++ build is left out"; else set -ex; \
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_ROOT_DIR=$(CURDIR)/.venv \
		-Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DRAVEN_CUDA=OFF; \
	$(BIN)/cmake --build build/cmake; \
	$(BIN)/ctest --test-dir build/cmake --output-on-failure; fi

test-cuda: .venv/cuda.stamp  ## compile every CUDA source for sm_90a, without a GPU, and check what came out
	@if [ "$$(uname -s)" != Linux ] || ! command -v g++ > /dev/null; then echo "no Linux or no g++: the CUDA build is left out"; \
	else set -ex; \
	$(BIN)/python csrc/build_cuda.py --output build/cuda/libraven_cuda.so; \
	$(BIN)/python csrc/resources.py; \
	$(BIN)/python -m pytest -q -m cuda_build $(ARGS); fi

test-aot: .venv/test.stamp  ## compile every Triton kernel for sm_80, 90, 100 and 120, without a GPU
	$(SHARED) tests/test_aot.py $(ARGS)

test-interpret: .venv/test.stamp  ## Triton kernels on the CPU, in Triton's interpreter
	TRITON_INTERPRET=1 $(SHARED) -m "interpret and not gpu" $(ARGS)

test-cpu: .venv/test.stamp  ## the tests that need neither a GPU nor Triton
	$(SHARED) -m "not gpu and not interpret and not aot and not cuda_build" $(ARGS)

test-gpu: .venv/test.stamp cuda-if-useful  ## the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

bench: .venv/test.stamp cuda-if-useful  ## speed against the peers, on a GPU
	$(BIN)/raven bench $(ARGS)

cuda: .venv/cuda.stamp $(LIBRARY)  ## compile the CUDA library, here for use in this checkout

$(LIBRARY): $(CUDA_SOURCES) | .venv/cuda.stamp
	$(BIN)/python csrc/build_cuda.py

cuda-if-useful:
	@if ! nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -qx '9\.0'; then \
		echo "no GPU of compute capability 9.0: the CUDA library is not compiled (make cuda does it anyway)"; \
	elif ! command -v g++ > /dev/null; then \
		echo "no g++: the CUDA library is not compiled; Triton's kernels run instead"; \
	else $(MAKE) --no-print-directory cuda; fi

wheel: .venv/cuda.stamp  ## source distribution, and one wheel for every Python, in dist/
	RAVEN_BUILD_PORTABLE=1 RAVEN_CUDA_BUILD_DIR=$(CURDIR)/build/cuda $(BIN)/python -m build --no-isolation

clean:  ## remove what was built here, .venv included
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache .benchmarks *.egg-info raven/_C*.so $(LIBRARY)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian and Ubuntu leave ensurepip out of their python3; the pip that is there can fill the environment as well.
.venv/bin/pip:
	$(PYTHON) -m venv .venv \
		|| { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } \
		|| { echo "$(PYTHON) can neither make an environment nor run pip: install python3-venv or python3-pip"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/demo.stamp: $(SETUP) | .venv/bin/pip
	$(INSTALL) -e ".[demo,train]"
	@$(BIN)/python -c "from raven import planner; print('raven is installed;', planner.description())"
	@touch $@

.venv/test.stamp: $(SETUP) | .venv/bin/pip
	$(INSTALL) -e ".[demo,train,test,bench]"
	@$(BIN)/python -c "from raven import planner; print('raven is installed;', planner.description())"
	@touch $@ .venv/demo.stamp

# The same nvcc everywhere, from PyPI: what ptxas makes of a kernel depends on its version.
.venv/cuda.stamp: pyproject.toml constraints.txt | .venv/test.stamp
	$(INSTALL) -e ".[build-cuda]"
	@touch $@
