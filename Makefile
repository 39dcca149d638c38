# The environments: vLLM and the tools in VENV=... or QNEXT_VENV=..., by default .venv here; SGLang in its neighbour.
VENV ?= $(or $(QNEXT_VENV),.venv)
SGLANG_VENV ?= $(VENV)-sglang
BIN := $(VENV)/bin
SGLANG_BIN := $(SGLANG_VENV)/bin
TYPED := kernels qnext_plugins vllm_plugin sglang_plugin $(wildcard examples/demo_*.py)
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# One server or test run at a time: they share the cores.
.NOTPARALLEL:
.PHONY: help env env-sglang demo demo-sglang test test-kernels test-vllm test-sglang test-fast lint format wheel train-tiny clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: ## Make or update the environment of vLLM and the tools (3.5 GB; skipped when up to date)
	@scripts/setup_env.sh vllm "$(VENV)"

env-sglang: ## Make or update the environment of SGLang (11 GB; skipped when up to date)
	@scripts/setup_env.sh sglang "$(SGLANG_VENV)"

demo: env ## Serve the tiny checkpoint with vLLM, talk to it, print what was measured
	@"$(BIN)/python" examples/demo_vllm.py $(ARGS)

demo-sglang: env-sglang ## The same with SGLang
	@"$(SGLANG_BIN)/python" examples/demo_sglang.py $(ARGS)

test: lint ## Lint, then every test in both environments (starts engines; takes a while)
	@$(MAKE) --no-print-directory --keep-going test-kernels test-vllm test-sglang

test-kernels: env ## The tests of the kernels and of the model, one a core at a time
	"$(BIN)/python" -m pytest -n auto --durations=10 tests/kernels tests/model $(ARGS)

test-vllm: env ## vLLM's tests
	"$(BIN)/python" -m pytest -v --durations=10 tests/vllm $(ARGS)

test-sglang: env env-sglang ## SGLang's tests, which start vLLM too, to compare
	QNEXT_VLLM_PYTHON="$$(cd "$(BIN)" && pwd)/python" \
		"$(SGLANG_BIN)/python" -m pytest -v --durations=10 tests/sglang $(ARGS)

test-fast: env ## The tests that start no engine and take less than a minute each
	"$(BIN)/python" -m pytest -m "not vllm and not slow" --ignore=tests/sglang $(ARGS)

lint: env ## ruff, mypy and the import contracts
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	MYPYPATH=kernels:vllm_plugin:sglang_plugin:. "$(BIN)/mypy" $(TYPED)
	"$(BIN)/lint-imports"

format: env ## Format the code and sort its imports
	"$(BIN)/ruff" check --select I --fix .
	"$(BIN)/ruff" format .

wheel: env ## Build the wheel into dist/ and check it in an empty environment, with the libraries of each that is made
	rm -rf build/lib build/bdist* dist
	"$(BIN)/python" -m build --quiet --wheel --outdir dist
	"$(BIN)/python" scripts/check_wheel.py dist/*.whl
	@if [[ -f "$(SGLANG_VENV)/qnext-setup.stamp" ]]; then "$(SGLANG_BIN)/python" scripts/check_wheel.py dist/*.whl; fi

train-tiny: env ## Train examples/tiny/checkpoint again
	"$(BIN)/python" examples/tiny/train.py $(ARGS)

clean: ## Remove what was built; the environments and the checkpoint stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -path "./.venv*" -prune -o -name __pycache__ -prune -exec rm -rf {} +
