# One line a target over ordinary commands. `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The tests compile the CUDA kernels themselves; FASTLM_CUDA=1 installs them too, which takes longer.
export FASTLM_CUDA ?= 0

.PHONY: demo test test-gpu-code lint bench bench-cpu gpu-check clean

# The stamp of an installed extra, remade when the build or the C++ changes.
$(VENV)/.%: pyproject.toml setup.py tests/constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c tests/constraints.txt -e '.[$*]'
	touch $@

demo: $(VENV)/.train
	$(BIN)/fastlm demo

# Whole files to a process: some share a fixture that takes long to make. One thread each: the tests' arrays are small,
# and those about threads set their own number.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile -m "not gpu_code"

# Every Triton and CUDA kernel in every configuration for every architecture, of which `make test` compiles one each.
test-gpu-code: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile -m gpu_code

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/fastlm bench all --quick

# Every case of the CPU, about ten minutes on two quiet cores.
bench-cpu: $(VENV)/.bench
	mkdir -p runs/bench
	$(BIN)/fastlm bench all --device cpu --json runs/bench/cpu.json --csv runs/bench/cpu.csv --plot runs/bench

# On a machine with a GPU, in an environment that has torch, triton and pytest; downloads nothing.
gpu-check:
	FASTLM_CUDA= $(PYTHON) -m pip install -q --no-build-isolation --no-deps .
	$(PYTHON) tests/gpu_check.py

clean:
	rm -rf build dist *.egg-info $(VENV)
