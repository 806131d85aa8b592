# Everything runs in .venv, which is made from whatever python3 is there. `make help` lists the targets.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
# What an installation depends on: extras, packages, and the sources of the compiled module.
SETUP := pyproject.toml setup.py constraints.txt $(wildcard csrc/host/*.cpp csrc/include/raven/*.h)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport TRITON_INTERPRET
unexport RAVEN_BACKEND

.PHONY: help demo test lint format test-cpp test-aot test-interpret test-cpu test-gpu bench wheel clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-15s %s\n", $$1, $$2}'

demo: .venv/demo.stamp  ## train, stream, and write a report; ARGS="--size small" and others: raven demo --help
	$(BIN)/raven demo $(ARGS)

test: lint test-cpp test-aot test-interpret test-cpu  ## everything that needs no GPU

lint: .venv/test.stamp  ## ruff and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $$(git ls-files 2>/dev/null | grep -vE '^raven/kernels$$|\.safetensors$$|^bench/results/' || echo README.md raven)

format: .venv/test.stamp  ## rewrite the Python files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-cpp: .venv/test.stamp  ## C++ build and its tests
	@if ! command -v $${CXX:-c++} > /dev/null; then echo "no C++ compiler: the C++ build is left out"; else set -ex; \
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_ROOT_DIR=$(CURDIR)/.venv \
		-Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"; \
	$(BIN)/cmake --build build/cmake; \
	$(BIN)/ctest --test-dir build/cmake --output-on-failure; fi

test-aot: .venv/test.stamp  ## compile every Triton kernel for sm_80, 90, 100 and 120, without a GPU
	$(BIN)/python -m pytest -q tests/test_aot.py $(ARGS)

test-interpret: .venv/test.stamp  ## Triton kernels on the CPU, in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "interpret and not gpu" $(ARGS)

test-cpu: .venv/test.stamp  ## the tests that need neither a GPU nor Triton
	$(BIN)/python -m pytest -q -m "not gpu and not interpret and not aot" $(ARGS)

test-gpu: .venv/test.stamp  ## the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

bench: .venv/test.stamp  ## speed against the peers, on a GPU
	$(BIN)/raven bench $(ARGS)

wheel: .venv/test.stamp  ## source distribution and wheel in dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove what was built here, .venv included
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache .benchmarks *.egg-info raven/_C*.so
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
