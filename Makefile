# Every target but gpu first makes what it needs: a virtual environment in .venv with the versions of requirements.txt,
# then the compiled extension. A second run finds both up to date and starts at once.
#
#   PYTHON=python3.12 make test     another interpreter (for a new .venv)
#   make demo ARGS="--steps 50"     arguments for the demo, the benchmarks or pytest

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
INSTALLED := $(VENV)/.installed
EXTENSION := seqops/_C.abi3.so
# The tests' own are 1 to 3; every number is another order of threads, warps and blocks.
SCHEDULES ?= 4 5 6 7 8 9 10 11 12
# Regimes of the kernels whose blocks share a head, and tests of the rooms that have CUDA kernels.
REGIMES ?= block cluster grid
SIMULATED := tests/test_scan.py tests/test_rnn.py tests/test_causal_conv1d.py
SOURCES := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup build demo test test-all simulate offline lint format docs examples bench gpu ci clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: $(READY) ## Make .venv with pinned versions

build: $(EXTENSION) ## Compile the extension and install seqops into .venv (editable)

demo: $(EXTENSION) ## Train a language model with seqops.nn.LSTM and torch.nn.LSTM side by side
	@$(RUN) -m seqops.demo $(ARGS)

test: lint docs ## Lint, docs and tests, under 15 minutes on 2 cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 $(ARGS)

test-all: lint docs ## The same with the slow tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not gpu" $(ARGS)

simulate: $(EXTENSION) ## Run the CUDA kernels on the simulator, in other orders of threads than the tests do
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not gpu" tests/test_simulator.py
	@set -e; for schedule in $(SCHEDULES); do for regime in $(REGIMES); do \
		echo "schedule $$schedule, $$regime"; \
		OMP_NUM_THREADS=1 SEQOPS_BACKEND=cuda SEQOPS_SIMULATE=$$schedule SIMULATED_REGIME=$$regime $(RUN) -m pytest \
			-n 2 --quiet -m "small and not slow and not gpu" $(SIMULATED) $(ARGS); \
	done; done

offline: $(EXTENSION) ## Compile every GPU kernel for every architecture, and hold its resources
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not gpu" tests/test_offline.py $(ARGS)

lint: $(READY) ## Check style: ruff and clang-format
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check .
	@find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	@echo "style: clean"

format: $(READY) ## Rewrite sources in that style
	@$(RUN) -m ruff check --quiet --fix .
	@$(RUN) -m ruff format .
	@find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(VENV)/bin/clang-format -i

docs: $(EXTENSION) ## Build the site into site/ (a warning is an error)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "docs: site/index.html"

examples: $(EXTENSION) ## Train the networks of docs/examples again, each script in under 3 minutes
	@set -e; for example in $(filter-out %/common.py,$(wildcard docs/examples/*.py)); do \
		echo "$$example"; $(RUN) $$example $(ARGS); \
	done

bench: $(EXTENSION) ## Measure against torch.nn and write a report
	@$(RUN) -m bench $(ARGS)

# A machine with a GPU has its own torch, Triton and CuPy: its Python runs, and no environment is made.
gpu: ## Build, test, sanitize and measure on this machine's GPU with its own Python, in under 10 minutes
	@$(PYTHON) -m bench.gpu $(ARGS)

ci: test ## What continuous integration runs

clean: ## Remove what was built, .venv excepted
	rm -rf build site seqops.egg-info $(EXTENSION) $(INSTALLED)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "seqops needs Python 3.10 or later, and '$(PYTHON)' is not: PYTHON=/path/to/python3.12 make ..." >&2; exit 1; }
	@echo 'int main() {}' | $${CXX:-c++} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null \
		|| { echo "seqops needs a C++20 compiler, and '$${CXX:-c++}' is not: install g++ 11 or later, or set CXX" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo "seqops needs Python's headers (Debian, Ubuntu: apt install python3-dev python3-venv)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch by itself and not quietly: it is the one long download, and nothing after it may replace its version. A CUDA
# build of torch brings its own Triton and NVRTC.
$(READY): requirements.txt pyproject.toml | $(RUN)
	@$(RUN) -m pip install --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	@echo "installing the pinned tools of requirements.txt"
	@if [ -n "$$($(RUN) -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null)" ]; then \
		grep -vE '^(triton|nvidia-cuda-nvrtc)==' requirements.txt; \
	else cat requirements.txt; fi > $(VENV)/requirements.txt
	@$(RUN) -m pip install --disable-pip-version-check --quiet --requirement $(VENV)/requirements.txt
	@rm -f $(INSTALLED)
	@touch $@

# The first time pip compiles and installs; later only what changed in csrc is compiled again.
$(EXTENSION): $(READY) setup.py $(SOURCES)
	@echo "compiling the extension (some minutes the first time; log in build/build.log)"
	@mkdir -p build
	@if [ -e $(INSTALLED) ]; then \
		$(RUN) setup.py build_ext --inplace; \
	else \
		$(RUN) -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .; \
	fi > build/build.log 2>&1 || { tail -n 60 build/build.log; exit 1; }
	@touch $(INSTALLED) $@
