# The environment: VENV=... or QNEXT_VENV=..., by default .venv here.
VENV ?= $(or $(QNEXT_VENV),.venv)
BIN := $(VENV)/bin
TYPED := kernels qnext_plugins vllm_plugin examples/demo_vllm.py
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# One server or test run at a time: they share the cores.
.NOTPARALLEL:
.PHONY: help env demo test test-fast lint format wheel train-tiny clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: ## Make or update the environment (3.5 GB; skipped when up to date)
	@scripts/setup_env.sh "$(VENV)"

demo: env ## Serve the tiny checkpoint with vLLM, talk to it, print what was measured
	@"$(BIN)/python" examples/demo_vllm.py $(ARGS)

test: lint ## Lint, then every test (starts engines; takes a while)
	"$(BIN)/python" -m pytest -v --durations=10 $(ARGS)

test-fast: env ## The tests that start no engine and take less than a minute each
	"$(BIN)/python" -m pytest -m "not vllm and not slow" $(ARGS)

lint: env ## ruff, mypy and the import contracts
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	MYPYPATH=kernels:vllm_plugin:. "$(BIN)/mypy" $(TYPED)
	"$(BIN)/lint-imports"

format: env ## Format the code and sort its imports
	"$(BIN)/ruff" check --select I --fix .
	"$(BIN)/ruff" format .

wheel: env ## Build the wheel into dist/ and check it in an empty environment
	rm -rf build/lib build/bdist* dist
	"$(BIN)/python" -m build --quiet --wheel --outdir dist
	"$(BIN)/python" scripts/check_wheel.py dist/*.whl

train-tiny: env ## Train examples/tiny/checkpoint again
	"$(BIN)/python" examples/tiny/train.py $(ARGS)

clean: ## Remove what was built; the environment and the checkpoint stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
