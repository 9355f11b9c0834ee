# `make demo` and `make test` need nothing but Python 3.11 to 3.13: each makes .venv, installs
# and builds into it, and runs. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT_FROM := pyproject.toml constraints.txt setup.py $(wildcard csrc/*)

# The first Python of the right version that really runs; `make PYTHON=... demo` overrides.
NEWEST := 13
FIND_PYTHON = for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $(NEWEST)))' \
		2>/dev/null && { echo "$$python"; exit 0; }; done; \
	echo "no Python from 3.11 to 3.$(NEWEST) runs here; install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1

.PHONY: help demo test test-slow test-emulated test-gpu test-vllm test-peers rivals bench bench-vllm bench-gpu lint ci install-check clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# torch goes first and alone: pip then takes the build that fits the machine, and what depends
# on torch finds it there.
$(READY): $(BUILT_FROM)
	@python=$$($(FIND_PYTHON)); \
	if ! $(BIN)/python -c 'import pip' 2>/dev/null; then "$$python" -m venv --clear $(VENV); fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/rlhf-fast doctor
	@touch $@

demo: $(READY)  ## SFT, a reward model and PPO on embedded data, in minutes on a CPU
	$(BIN)/rlhf-fast demo

# A process a core, but no more than memory has room for.
SIDE_BY_SIDE := -n auto --maxprocesses 4

test: $(READY)  ## the tests, without the slow ones
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not processes"
	$(BIN)/python -m pytest -m "not slow and processes"

test-slow: $(READY)  ## the slow tests: longer learning runs, real data
	$(BIN)/python -m pytest -m slow

# As TRITON_INTERPRET=1 is for Triton: csrc's CUDA kernels, compiled for the CPU. With
# RLHF_FAST_EMULATED_RACES=1 all tests look for races, not only those that are about them (3 times the
# time, 50 times the memory of what they touch).
EMULATOR := build/emulator
test-emulated: $(READY)  ## the CUDA kernels in their emulator, on a CPU
	$(BIN)/cmake -S tests/emulator -B $(EMULATOR) -G Ninja \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build $(EMULATOR)
	RLHF_FAST_STRICT_SKIPS=1 RLHF_FAST_EMULATED_CUDA=$(EMULATOR) $(BIN)/python -m pytest \
		tests/ops tests/emulator tests/test_learning.py -m emulated $(SIDE_BY_SIDE)

# In processes side by side where pytest-xdist is there: most of the time compiles Triton's kernels.
# vLLM's with nothing beside them, since vLLM measures the GPU's memory; 5: FILES holds none of them.
test-gpu:  ## the GPU tests, with the current Python and without the network
	failed=0; \
	python3 -m pytest -m "gpu and not vllm" \
		$$(python3 -c 'import xdist; print("-n 8")' 2>/dev/null) $(FILES) || [ $$? = 5 ] || failed=1; \
	python3 -m pytest -m "gpu and vllm" -rs $(FILES) || [ $$? = 5 ] || failed=1; \
	exit $$failed

# Our dependencies without our build: the tests run the checkout itself. Then the peers, whose own
# requirements are not wanted, and which know no Python beyond 3.12.
PEERS := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check
DEPENDENCIES := import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")
$(PEERS)/.ready: NEWEST := 12
$(PEERS)/.ready: pyproject.toml constraints.txt tests/peers/imports.txt tests/peers/peers.txt
	@python=$$($(FIND_PYTHON)); \
	if ! $(PEERS)/bin/python -c 'import pip' 2>/dev/null; then "$$python" -m venv --clear $(PEERS); fi
	$(PEERS)/bin/python -c '$(DEPENDENCIES)' > $(PEERS)/dependencies.txt
	$(PEERS_PIP) -c constraints.txt torch
	$(PEERS_PIP) -c constraints.txt -r $(PEERS)/dependencies.txt -r tests/peers/imports.txt \
		pytest pytest-timeout
	$(PEERS_PIP) --no-deps -r tests/peers/peers.txt
	@touch $@

test-peers: $(PEERS)/.ready  ## our ops against verl's, OpenRLHF's and TRL's own code
	$(PEERS)/bin/python -m pytest tests/peers

# vLLM's CPU build declares more than it needs here, and other versions than constraints.txt: what it
# imports is in vllm.txt.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check
$(VLLM)/.ready: Makefile pyproject.toml constraints.txt tests/rollout/vllm.txt
	@python=$$($(FIND_PYTHON)); \
	if ! $(VLLM)/bin/python -c 'import pip' 2>/dev/null; then "$$python" -m venv --clear $(VLLM); fi
	$(VLLM)/bin/python -c '$(DEPENDENCIES)' > $(VLLM)/dependencies.txt
	$(VLLM_PIP) -c constraints.txt torch
	$(VLLM_PIP) -c constraints.txt -r $(VLLM)/dependencies.txt requests aiohttp psutil peft \
		pytest pytest-timeout pytest-benchmark pytest-xdist hypothesis
	$(VLLM_PIP) --no-deps -r tests/rollout/vllm.txt
	@touch $@

# Beside $(READY) for the C++ kernels, which this environment uses from the checkout. Two engines at a
# time: while one starts or compiles, the other has a core.
test-vllm: $(READY) $(VLLM)/.ready  ## rollouts with vLLM itself, on a CPU
	$(VLLM)/bin/python -c 'import vllm'
	RLHF_FAST_STRICT_SKIPS=1 $(VLLM)/bin/python -m pytest -m "vllm and not slow and not processes" \
		-n auto --maxprocesses 2 --dist loadfile
	RLHF_FAST_STRICT_SKIPS=1 $(VLLM)/bin/python -m pytest -m "vllm and not slow and processes"

rivals: $(READY)  ## the wheels that the benchmarks compare with, into .benchmarks/rivals
	mkdir -p .benchmarks/rivals
	for wheel in openrlhf==0.11.2 trl==1.16.0 verl==0.9.1; do \
		$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
			--dest .benchmarks/rivals $$wheel \
			|| echo "$$wheel was not fetched: its comparisons are skipped" >&2; \
	done

# -rs: a contender that is left out says why.
BENCH := -m pytest --benchmark-columns=median,iqr,rounds -s -rs
# Passive: on a busy machine threads that spin at barriers measure the scheduler's tick instead.
# Again with huge pages for torch: without them page faults are most of what some rivals pay.
bench: rivals  ## the CPU benchmarks; the rivals' wheels are fetched
	OMP_WAIT_POLICY=passive $(BIN)/python $(BENCH) benchmarks -m "not gpu"
	OMP_WAIT_POLICY=passive THP_MEM_ALLOC_ENABLE=1 $(BIN)/python $(BENCH) -m "not gpu" \
		benchmarks/bench_token_logprobs.py benchmarks/bench_full_kl.py

bench-vllm: $(READY) $(VLLM)/.ready  ## rollout engines and LoRA on the CPU, vLLM among them
	OMP_WAIT_POLICY=passive $(VLLM)/bin/python $(BENCH) -m "not gpu" \
		$(or $(FILES),benchmarks/bench_rollout.py benchmarks/bench_lora.py)

bench-gpu:  ## the GPU benchmarks, or those in FILES, with the current Python and no network
	python3 $(BENCH) $(or $(FILES),benchmarks) -m gpu

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install-check: $(READY)  ## every kind of install, into throw-away environments
	scripts/check_install.sh $(BIN)/python

# nvcc compiles once, in install-check: without a GPU the tests have no use for what it makes.
ci: export RLHF_FAST_CUDA ?= $(if $(shell command -v nvidia-smi 2>/dev/null),AUTO,OFF)
ci: lint install-check demo  ## everything that must hold before a merge
	RLHF_FAST_STRICT_SKIPS=1 $(MAKE) --no-print-directory test
	$(MAKE) --no-print-directory test-emulated
	$(MAKE) --no-print-directory test-vllm

clean:  ## what was built, .venv included
	rm -rf $(VENV) $(PEERS) $(VLLM) build dist *.egg-info rlhf_fast/*.so
