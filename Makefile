# The environments: vLLM and the tools in VENV=... or QNEXT_VENV=..., by default .venv here; SGLang in its neighbour.
VENV ?= $(or $(QNEXT_VENV),.venv)
SGLANG_VENV ?= $(VENV)-sglang
BIN := $(VENV)/bin
SGLANG_BIN := $(SGLANG_VENV)/bin
TYPED := kernels qnext_plugins vllm_plugin sglang_plugin $(filter-out examples/serving_demo.py,$(wildcard examples/*.py))
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# One server or test run at a time: they share the cores.
.NOTPARALLEL:
.PHONY: help env env-sglang demo demo-sglang compare test test-kernels test-cli test-vllm test-sglang test-clients test-fast
.PHONY: lint format docs wheel train-tiny clean

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

compare: env env-sglang ## Compare vLLM, SGLang and transformers on the tiny checkpoint
	@QNEXT_VLLM_PYTHON="$$(cd "$(BIN)" && pwd)/python" QNEXT_SGLANG_PYTHON="$$(cd "$(SGLANG_BIN)" && pwd)/python" \
		"$(BIN)/python" examples/compare_tiny.py $(ARGS)

test: lint ## Lint, then the tests of kernels, model and both engines (starts engines; takes a while)
	@$(MAKE) --no-print-directory --keep-going test-kernels test-cli test-vllm test-sglang

test-kernels: env ## The tests of the kernels, of the model and of the documentation, one a core at a time
	"$(BIN)/python" -m pytest -n auto --durations=10 -m "not vllm and not sglang" \
		tests/kernels tests/model tests/docs tests/benchmarks $(ARGS)

test-cli: env env-sglang ## The tests of the command line that start no engine and are not slow
	QNEXT_SGLANG_PYTHON="$$(cd "$(SGLANG_BIN)" && pwd)/python" \
		"$(BIN)/python" -m pytest -n auto --durations=10 -m "not vllm and not sglang and not slow" tests/cli $(ARGS)

test-vllm: env ## vLLM's tests
	"$(BIN)/python" -m pytest -v --durations=10 tests/vllm $(ARGS)

test-sglang: env env-sglang ## SGLang's tests, which start vLLM too, to compare
	QNEXT_VLLM_PYTHON="$$(cd "$(BIN)" && pwd)/python" \
		"$(SGLANG_BIN)/python" -m pytest -v --durations=10 tests/sglang $(ARGS)

test-clients: env env-sglang ## Examples, the rest of the command line, benchmarks, with both engines (not in `make test`)
	QNEXT_CLIENTS_PYTHON="$$(cd "$(SGLANG_BIN)" && pwd)/python" \
		"$(BIN)/python" -m pytest -v --durations=10 -m "not sglang" tests/examples $(ARGS)
	QNEXT_VLLM_PYTHON="$$(cd "$(BIN)" && pwd)/python" \
		"$(SGLANG_BIN)/python" -m pytest -v --durations=10 -m sglang tests/examples tests/cli tests/benchmarks $(ARGS)
	QNEXT_SGLANG_PYTHON="$$(cd "$(SGLANG_BIN)" && pwd)/python" \
		"$(BIN)/python" -m pytest -v --durations=10 -m "(vllm or slow) and not sglang" tests/cli tests/benchmarks $(ARGS)

test-fast: env ## The tests that start no engine and take less than a minute each
	"$(BIN)/python" -m pytest -m "not vllm and not sglang and not slow" --ignore=tests/sglang $(ARGS)

lint: env ## ruff, mypy and the import contracts
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	MYPYPATH=kernels:vllm_plugin:sglang_plugin:. "$(BIN)/mypy" $(TYPED)
	"$(BIN)/lint-imports"

format: env ## Format the code and sort its imports
	"$(BIN)/ruff" check --select I --fix .
	"$(BIN)/ruff" format .

docs: env ## Build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict

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
