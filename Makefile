# Two commands: `make demo` and `make test`. Each sets up .venv on its first run; the second run starts in seconds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One job per core for the native build and the tests.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
# The CUDA kernels on the emulator: the tests run them.
export FASTGPT_SIMT ?= on

# Runs Triton's intermediate code on the CPU, and finds races and stray accesses: for `make test-triton`. An alpha, which
# declares Python >= 3.12 and other versions of torch and Triton, but works on Python 3.10 and 3.11 with Triton 3.9: so
# pip must be told to ignore both.
SANITIZER := ttsem==0.1.0

NATIVE := CMakeLists.txt setup.py $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test test-triton test-slow test-levels sanitize mutate gate gpu bench lint format doctor clean

help: ## Show what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

demo: $(READY) ## Train a GPT on English text with the fused kernels, then let it write
	@$(BIN)/fastgpt demo

# Passive: threads that wait must not take the core from the test process beside them.
test: $(READY) ## Run the tests (without those marked slow or triton)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and not triton" --benchmark-disable

test-triton: $(READY) ## Run the Triton kernels' tests in Triton's interpreter, then in a sanitizer, bfloat16 among them (Linux)
	OMP_WAIT_POLICY=passive FASTGPT_TRITON_RUNNER=interpreter $(BIN)/python -m pytest -q -n $(JOBS) -m "triton and not slow" --benchmark-disable
	OMP_WAIT_POLICY=passive FASTGPT_TRITON_RUNNER=sanitizer $(BIN)/python -m pytest -q -n $(JOBS) -m "triton and not slow" --benchmark-disable

test-slow: $(READY) ## Run the tests marked slow
	$(BIN)/python -m pytest -q -m slow --benchmark-disable

gate: $(READY) ## Check the compiled CUDA and Triton kernels against their budgets (ONLY=cuda or triton: those)
	@$(BIN)/fastgpt gate $(if $(ONLY),--only $(ONLY))

# The command itself compiles the CUDA side, for the GPU that is there alone.
gpu: ## On a machine with an NVIDIA GPU: build, test, sanitize, benchmark; writes results/gpu.md
	@nvidia-smi -L >/dev/null 2>&1 || { echo "make gpu: this machine has no NVIDIA GPU (nvidia-smi finds none), so nothing was built or measured"; exit 1; }
	@FASTGPT_CUDA=off $(MAKE) --no-print-directory $(READY)
	@$(BIN)/fastgpt gpu

# The budget is plain torch's error on such a machine, so torch gets no instructions that the level lacks: without FMA its
# own products round twice too. Skipped: a level that this machine lacks. The fastest level is the one of `make test`.
LEVEL_baseline := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41
LEVEL_avx2 := ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
test-levels: $(READY) ## Run the operators' tests on each slower instruction-set level of the CPU kernels
	$(foreach level,$(shell $(BIN)/python -c "from fastgpt.ops.native import _C; print(*[n for n, _, can in _C.cpu.isas() if can and n != _C.cpu.isa()])"),\
	FASTGPT_CPU_ISA=$(level) $(LEVEL_$(level)) OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) --benchmark-disable tests/ops \
	-m "not slow and not triton" -k "cpu and not instruction_set and not registration" &&) true

sanitize: $(READY) ## Run the operators' tests on the native core under the address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m tests.sanitize -j $(JOBS)

mutate: $(READY) ## Plant known bugs in the CUDA and Triton kernels, one at a time: the tests must notice each
	$(BIN)/python -m tests.mutation -j $(JOBS)

bench: $(READY) ## Time every operator and a training step against their peers (ten minutes; QUICK=1: two); writes results/
	$(BIN)/fastgpt bench $(if $(QUICK),--quick)

lint: $(READY) ## Formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cu')
	$(BIN)/mypy

format: $(READY) ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cu')

doctor: $(READY) ## Print versions, instruction set, and which kernel runs what
	@$(BIN)/fastgpt doctor

clean: ## Remove the environment, builds and results (not runs/, where trained models lie)
	rm -rf $(VENV) build dist results *.egg-info fastgpt/_C*.so fastgpt/_simt*.so

# Rebuilt when a native source or the dependencies change; Python sources need nothing, the installation is editable.
$(READY): pyproject.toml constraints.txt $(NATIVE)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "A C++ compiler is needed (on Debian or Ubuntu: apt install g++)"; exit 1; }
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the dependencies and building the native core (a few minutes the first time)"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt torch
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@if [ "$$(uname -s)" = Linux ]; then PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python $(SANITIZER); fi
	@$(BIN)/python -c "from fastgpt.ops.native import cuda_summary; print('CUDA:', cuda_summary())"
	@touch $@
