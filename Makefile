# One line a target over ordinary commands. `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The versions that are installed.
CONSTRAINTS ?= tests/constraints.txt

# The tests compile the CUDA kernels themselves; FASTLM_CUDA=1 installs them too, which takes longer.
export FASTLM_CUDA ?= 0

.PHONY: demo test test-gpu-code test-slow test-no-compiler test-versions sanitize lint bench bench-cpu gpu-check environment clean

# The stamp of an installed extra, remade when the build or the C++ changes.
$(VENV)/.%: pyproject.toml setup.py tests/constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	@$(MAKE) --no-print-directory environment
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[$*]'
	touch $@

# What an extra adds to the installed package, without building it anew.
$(VENV)/.with-%: $(VENV)/.test
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) 'fastlm[$*]'
	touch $@

demo: $(VENV)/.train
	$(BIN)/fastlm demo

# Whole files to a process: some share a fixture that takes long to make. One thread each: the tests' arrays are small,
# and those about threads set their own number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile
test: $(VENV)/.test
	FASTLM_FUZZ_INPUTS=200 $(PYTEST) -m "not gpu_code and not slow"

# Every Triton and CUDA kernel for every architecture (those of Triton in every configuration for five of them, in the
# largest for the others), of which `make test` compiles one each, and every case of those that run on the CPU, of which
# it runs a few a test.
test-gpu-code: $(VENV)/.test
	$(PYTEST) -m gpu_code

# The package as a user builds it, ten times as many damaged inputs to every reader, and what takes long otherwise; Ray,
# of 260 MB, for a cluster of two nodes, and datasets, of 94 MB, for folders that it saved.
test-slow: $(VENV)/.test $(VENV)/.with-ray $(VENV)/.with-datasets
	$(PYTEST) -m slow
	$(PYTEST) tests/data/test_data_fuzz.py tests/formats/test_fuzz_models.py tests/training/test_run_folder_fuzz.py

# Every verb where fastlm was installed without a compiler, and without Python's headers.
test-no-compiler: $(VENV)/.test
	$(BIN)/python tools/no_compiler.py

# All of `make test` with each version of torch that was tried, or with those of VERSIONS="2.10.0 2.15.0".
test-versions: $(VENV)/.test
	$(BIN)/python tools/versions.py $(VERSIONS)

# The CPU kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests of the ops.
sanitize: $(VENV)/.test
	$(BIN)/python tools/sanitize.py

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/fastlm bench all --quick

# Every case of the CPU, about ten minutes on two quiet cores.
bench-cpu: $(VENV)/.bench
	mkdir -p runs/bench
	$(BIN)/fastlm bench all --device cpu --json runs/bench/cpu.json --csv runs/bench/cpu.csv --plot runs/bench

# On a machine with a GPU, in an environment that has torch, triton and pytest; downloads nothing.
gpu-check:
	FASTLM_CUDA= $(PYTHON) -m pip install -q --no-build-isolation --no-deps .
	$(PYTHON) tools/gpu_check.py

# A virtual environment with pip, whole or not at all: one that was left half made is made anew.
# Of its 3 GB, 2.1 stay with torch's build for CPUs; CUDA's libraries, which PyPI's brings on Linux, are more.
DISK_MB := 3000
environment:
	@say() { echo "make: $$*" >&2; }; fail() { say "$$@"; exit 1; }; \
	command -v $(PYTHON) >/dev/null || fail "$(PYTHON) is not there: install Python 3.10 or newer, or give PYTHON="; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  fail "$(PYTHON) is too old, fastlm needs Python 3.10 or newer: install it, or give PYTHON="; \
	command -v $${CXX:-g++} >/dev/null || command -v c++ >/dev/null || \
	  say "no C++ compiler, so no CPU kernels: install one (apt: g++) and give FASTLM_CPU=1 to see that it works"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_paths()["include"] + "/Python.h")' \
	  2>/dev/null || say "no Python.h, so no CPU kernels: install Python's headers (apt: python3-dev)"; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 && exit 0; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  fail "$(PYTHON) can make no virtual environment: install its venv module (apt: python3-venv)"; \
	test ! -e $(VENV) -o -e $(VENV)/pyvenv.cfg || rmdir $(VENV) 2>/dev/null || fail "$(VENV) is there and no virtual environment: remove it"; \
	mkdir -p $(VENV) || exit 1; free=$$(df -Pm $(VENV) | awk 'END { print $$4 }'); \
	test "$$free" -ge $(DISK_MB) || { rmdir $(VENV) 2>/dev/null; \
	  fail "$$free MB of disk are free for $(VENV), $(DISK_MB) are needed: make room, or give VENV="; }; \
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); fail "$(PYTHON) -m venv $(VENV) failed, as said above"; }

clean:
	rm -rf build dist *.egg-info $(VENV)
